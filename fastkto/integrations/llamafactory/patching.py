"""Puts fastkto's trainer in the place of LLaMA-Factory's, in one process."""

import os
from typing import Any

from fastkto.checkpoints import last_whole_checkpoint
from fastkto.integrations.llamafactory.arguments import check_options
from fastkto.integrations.llamafactory.trainer import CustomKTOTrainer

VERSION = "0.9.5"
# What `patch` has replaced: (module, name, what was there).
_originals: list[tuple[Any, str, Any]] = []


def patch(**options: Any) -> None:
    """Let LLaMA-Factory train `stage: kto` with `CustomKTOTrainer` of this package.

    Serves this process alone; for several, `fastkto llamafactory train` patches each of them.
    `options` are fields of `arguments.OPTIONS`. Those under `fastkto:` in a configuration that
    `run_exp` is given come on top, and are taken out of it. Patching again changes `options`.
    """
    check_options(options)
    tuner, trainer, workflow, parser = _modules()
    unpatch()
    patched: Any = type("CustomKTOTrainer", (CustomKTOTrainer,), {"options": options})
    read_args = tuner.read_args

    def read_args_without_ours(args: Any = None) -> Any:
        args = read_args(args)
        if isinstance(args, dict):
            args = dict(args)
            patched.options = {**options, **_take_options(args)}
        return args

    for module, name, new in (
        (trainer, "CustomKTOTrainer", patched),
        (workflow, "CustomKTOTrainer", patched),
        (tuner, "read_args", read_args_without_ours),
        (parser, "get_last_checkpoint", last_whole_checkpoint),  # a kill leaves half-written ones
    ):
        _originals.append((module, name, getattr(module, name)))
        setattr(module, name, new)


def unpatch() -> None:
    """Put back what `patch` has replaced; nothing if it has not."""
    while _originals:
        setattr(*_originals.pop())


def _modules() -> tuple[Any, Any, Any, Any]:
    try:
        from llamafactory.hparams import parser
        from llamafactory.train import tuner
        from llamafactory.train.kto import trainer, workflow
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":
            raise
        raise ValueError(
            f"LLaMA-Factory is not installed; pip install llamafactory=={VERSION}"
        ) from error
    return tuner, trainer, workflow, parser


def _take_options(args: dict[str, Any]) -> dict[str, Any]:
    """Takes `fastkto` out of LLaMA-Factory's arguments."""
    options = check_options(args.pop("fastkto", None) or {})
    stage = args.get("stage", "sft")
    if options and stage != "kto":
        raise ValueError(f"fastkto is given with stage: {stage}, and serves stage: kto alone")
    if stage == "kto" and os.getenv("USE_RAY", "0").lower() in ("1", "true", "y"):
        raise ValueError(
            "USE_RAY is set, and Ray's workers would train with LLaMA-Factory's own trainer; unset "
            "it, and start several processes with FORCE_TORCHRUN=1"
        )
    return options
