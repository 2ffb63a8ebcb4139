"""Log-probabilities by key, in a file that several processes share and that survives a kill."""

import math
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

FILE_NAME = "reference.sqlite"
_WAIT_SECONDS = 60  # for another process to finish its transaction
_VALUE = struct.Struct("<d")  # SQLite's own REAL turns -0.0 into 0


class ReferenceCacheError(OSError):
    """The file of the reference cache cannot be read or written."""


def default_folder() -> Path:
    """Where all runs of a user find the cache, whatever their output_dir: `$HF_HOME/fastkto`."""
    return Path(constants.HF_HOME) / "fastkto"


class ScoreStore:
    """Log-probabilities (fp64, nats) by key, in an SQLite file in write-ahead-log mode.

    Several processes of one machine may read and write at once. A transaction is there as a whole
    or not at all, whenever a process is killed. A key keeps the value it got first.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).expanduser() / FILE_NAME
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=_WAIT_SECONDS, check_same_thread=False
            )
            _write_ahead(self._connection)
            # A power failure may cost the last transactions, a kill none: they are scored again.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS scores "
                    "(key BLOB PRIMARY KEY, logprob BLOB NOT NULL) WITHOUT ROWID"
                )

    def read(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The log-probabilities of those keys that are there."""
        query = "SELECT logprob FROM scores WHERE key = ?"
        with self._explained():
            rows = [(key, self._connection.execute(query, (key,)).fetchone()) for key in keys]
            return {key: _VALUE.unpack(row[0])[0] for key, row in rows if row is not None}

    def write(self, logprobs: dict[bytes, float]) -> None:
        """Add log-probabilities in one transaction; those that are not finite are left out."""
        rows = [
            (key, _VALUE.pack(value)) for key, value in logprobs.items() if math.isfinite(value)
        ]
        with self._explained(), self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file; nothing can be read or written afterwards."""
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise ReferenceCacheError(
                f"the reference cache {self.path} cannot be used: {error}. It needs a folder that "
                "can be written, on a disk of this machine with free space; choose another with "
                "reference_cache, or set precompute_ref_log_probs=False"
            ) from error
        except (sqlite3.DatabaseError, struct.error) as error:
            raise ReferenceCacheError(
                f"the reference cache {self.path} is damaged: {error}. Delete it with the files "
                "beside it whose names begin like its own; its scores are computed again"
            ) from error


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on; unlike others, this statement does not wait for its turn."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
