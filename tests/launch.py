"""A script of the tests in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from accelerate import PartialState

ROOT = Path(__file__).parent.parent


def launch(script: Path, *arguments: object, processes: int = 1, timeout: int = 600) -> str:
    """Run `script`, under torchrun if there is more than one process; what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def finish() -> NoReturn:
    """End a launched script, together with the other ranks.

    At once: gloo's threads abort now and then in the interpreter's own end.
    """
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
