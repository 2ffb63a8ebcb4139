"""`fastkto llamafactory train ...`: LLaMA-Factory's own launcher, with patched processes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastkto.integrations.llamafactory.patching import patch


def train(words: Sequence[str]) -> None:
    """`llamafactory-cli train` with `words`, a YAML or JSON file and `field=value` on top.

    Patched is this process, or each that LLaMA-Factory's launcher starts with torchrun, under the
    variables that it knows (FORCE_TORCHRUN, NPROC_PER_NODE, NNODES and others). Exits as they do.
    """
    patch()
    from llamafactory import launcher

    # The file that torchrun runs in each process: by itself LLaMA-Factory names its own.
    launcher.__file__ = str(Path(__file__).with_name("worker.py"))
    sys.argv = ["llamafactory-cli", "train", *words]
    try:
        launcher.launch()
    except subprocess.CalledProcessError as error:  # the processes have said why
        raise SystemExit(error.returncode) from None
