"""fastkto's trainer in place of TRL's: in a script that exists, and behind `trl kto`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fastkto.config import KTOConfig
from fastkto.trainer import KTOTrainer

_CLASSES = {"KTOTrainer": KTOTrainer, "KTOConfig": KTOConfig}
# Where TRL 1.16 has them; others import them from there.
_MODULES = ("trl", "trl.trainer", "trl.trainer.kto_trainer", "trl.trainer.kto_config")
_replaced: dict[tuple[ModuleType, str], Any] = {}


def patch() -> None:
    """Have `trl.KTOTrainer` and `trl.KTOConfig` be fastkto's, until `unpatch()`.

    Call it before the script imports them from TRL: a name that is imported already stays what it
    is. In this process only; `fastkto trl kto ...` patches the processes that TRL starts. Calling
    it twice is as calling it once. Raises ImportError if TRL is not there.
    """
    if _replaced:
        return
    for name in _MODULES:
        module = _import(name)
        for attribute, ours in _CLASSES.items():
            # A lazy module finds its classes when they are asked for.
            theirs = getattr(module, attribute, None)
            if theirs is not None:
                _replaced[module, attribute] = theirs
                setattr(module, attribute, ours)


def unpatch() -> None:
    """Give TRL its own classes back."""
    for (module, attribute), theirs in _replaced.items():
        setattr(module, attribute, theirs)
    _replaced.clear()


def run_command(words: list[str]) -> int:
    """`trl` with the arguments `words`, where `trl kto` trains with fastkto; its exit status.

    TRL's own command line parses them, and starts `accelerate launch` with its script `kto.py`;
    ours, which patches TRL first, is started in its place.
    """
    patch()
    try:
        with _own_script():
            return _import("trl.cli.main").main(words)
    finally:
        unpatch()


@contextmanager
def _own_script() -> Iterator[None]:
    launcher: Any = _import("trl.cli.accelerate_launcher")
    launch = launcher.launch_training_script
    script = Path(__file__).parent / "scripts" / "trl_kto.py"

    def launch_ours(script_name: str, **arguments: Any) -> None:
        # joined to TRL's folder of scripts, where an absolute path stays what it is
        launch(script_name=str(script) if script_name == "kto.py" else script_name, **arguments)

    launcher.launch_training_script = launch_ours
    try:
        yield
    finally:
        launcher.launch_training_script = launch


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"{name} cannot be imported ({error}); pip install trl==1.16.0"
        raise ImportError(text) from error
