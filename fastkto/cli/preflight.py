"""What `fastkto train` refuses before anything is loaded."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations import get_reporting_integration_callbacks

from fastkto.checkpoints import is_whole, last_whole_checkpoint
from fastkto.cli.arguments import Arguments, ModelArguments
from fastkto.cli.console import CommandError, mistakes
from fastkto.config import KTOConfig
from fastkto.limits import check_arguments, check_run


def check(arguments: Arguments) -> None:
    """Refuse what can be refused before anything is loaded."""
    model, args = arguments.model, arguments.training
    _check_model_given(model)
    if arguments.data.dataset_name is None:
        raise CommandError(
            "--data is missing; give a .jsonl, .json, .csv or .parquet file, a folder, or a data "
            "set's id on the hub"
        )
    if args.n_gpu > 1:
        raise CommandError(
            f"{args.n_gpu} GPUs are visible to this process; start one process for each with "
            "`accelerate launch -m fastkto train ...`, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    check_arguments(model.model_name_or_path, None, args)
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise CommandError(
            f"num_train_epochs is {args.num_train_epochs} and max_steps {args.max_steps}, so "
            "nothing would be trained; give one of them a number above 0"
        )
    check_model(model)
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise CommandError(f"{bits} needs the package bitsandbytes; pip install bitsandbytes")
    with mistakes(ValueError, RuntimeError, ImportError, about="report_to"):
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # it looks for its package
    check_run(args, saves=True)
    checkpoint = resume_from(args)
    if checkpoint is not None and not model.use_peft:
        if (Path(checkpoint) / "adapter_config.json").is_file():
            raise CommandError(
                f"--resume_from_checkpoint: {checkpoint} holds an adapter; add --use_peft and the "
                "flags that it was trained with"
            )


def check_model(model: ModelArguments) -> None:
    """Refuse a model that is not there, and flags of it that contradict each other."""
    _check_model_given(model)
    _check_adapter_flags(model)
    for flag, name in (("--model", model.model_name_or_path), ("--ref_model", model.ref_model)):
        if name is not None:
            _check_folder(flag, name)
    if model.load_in_4bit and model.load_in_8bit:
        raise CommandError("load_in_4bit and load_in_8bit exclude each other; choose one")
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise CommandError(f"{bits} freezes the weights; add --use_peft to train an adapter")


def _check_model_given(model: ModelArguments) -> None:
    if model.model_name_or_path is None:
        raise CommandError("--model is missing; give a model's folder or its id on the hub")


def _check_adapter_flags(model: ModelArguments) -> None:
    """Refuse flags of an adapter that nobody asked for, which would train all weights instead."""
    if model.use_peft:
        return
    for field in dataclasses.fields(model):
        is_of_adapter = field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora")
        if is_of_adapter and getattr(model, field.name) != field.default:
            raise CommandError(f"--{field.name} is for an adapter; add --use_peft to train one")


def _check_folder(flag: str, name: str) -> None:
    """Refuse what looks like a local folder and holds no model; a hub id passes."""
    folder = Path(name)
    if not folder.exists():
        is_path = folder.is_absolute() or name.startswith((".", "~")) or name.endswith("/")
        if is_path or name.count("/") > 1:
            raise CommandError(f"{flag}: there is no folder {name}")
        return
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise CommandError(
            f"{flag}: {name} holds an adapter without its model; merge it into the model first "
            "(merge_and_unload), or train it from Python with peft.AutoPeftModelForCausalLM"
        )
    raise CommandError(f"{flag}: {name} holds no config.json, so it is no saved model")


def resume_from(args: KTOConfig) -> str | None:
    """The checkpoint to resume from: a folder, or the last whole one in output_dir for "true"."""
    asked = str(args.resume_from_checkpoint or "false")
    if asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not is_whole(asked):
            raise CommandError(f"--resume_from_checkpoint: {asked} is no checkpoint's folder")
        return asked
    last = last_whole_checkpoint(str(args.output_dir))
    if last is None:
        raise CommandError(
            f"--resume_from_checkpoint: there is no checkpoint in {args.output_dir}; leave the "
            "flag out to start from the beginning"
        )
    return last
