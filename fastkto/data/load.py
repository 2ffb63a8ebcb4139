"""Data sets from local files, folders and the Hugging Face hub."""

import csv
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from fastkto.full_disk import WriteError, explaining_full_cache

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# What datasets raises for data it cannot read; StopIteration is a file of empty lines.
_READ_ERRORS = (DatasetsError, ValueError, KeyError, OSError, StopIteration)


def load_rows(
    path_or_name: str | Path, *, split: str = "train", config: str | None = None
) -> Dataset:
    """The rows of a local file, a local folder or a data set on the hub.

    A file is JSON Lines, JSON, CSV or Parquet, by its suffix, and its rows are the split `split`.
    Every cell of a CSV file is text, also 42 and NA. A folder is what `Dataset.save_to_disk`
    wrote, or a data set repository. `split` may have a slice, as in train[:100]; `config` names
    one of several data sets in a repository.

    Raises FileNotFoundError for a missing file, folder or hub name, ValueError for one that cannot
    be read, and WriteError if the data sets' cache finds no room.
    """
    path = Path(path_or_name).expanduser()
    is_path = path.is_absolute() or str(path_or_name).startswith((".", "~"))
    if not path.exists() and (is_path or path.suffix.lower() in BUILDERS):
        raise FileNotFoundError(f"there is no file or folder {path}")
    try:
        with explaining_full_cache(str(path_or_name)):
            return _load(path, str(path_or_name), split, config)
    except WriteError:
        raise
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{path_or_name} is no local file or folder, and the hub gave no such data set: {error}"
        ) from error
    except _READ_ERRORS as error:
        cause = error.__cause__ or error
        detail = "it has no rows" if isinstance(error, StopIteration) else f"{cause}"
        raise ValueError(f"cannot read split {split!r} of {path_or_name}: {detail}") from error


def _load(path: Path, name: str, split: str, config: str | None) -> Dataset:
    if path.is_file():
        return _load_file(path, split)
    if (path / "state.json").exists():
        return load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))[split]
    return load_dataset(str(path) if path.exists() else name, config, split=split)


def _load_file(path: Path, split: str) -> Dataset:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        known = ", ".join(BUILDERS)
        raise ValueError(f"a data file's name must end in {known}; convert or rename it")
    if path.stat().st_size == 0:
        raise ValueError("it has no rows")
    options = (
        {"features": _csv_features(path), "keep_default_na": False} if builder == "csv" else {}
    )
    files = {split.partition("[")[0]: str(path)}
    return load_dataset(builder, data_files=files, split=split, **options)


def _csv_features(path: Path) -> Features:
    """All columns as text: guessed types make 42.0 of the answer 42, and None of NA."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file))
    return Features({column: Value("string") for column in header})
