"""Settings that need less memory, and what a run would need with each."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastkto.cli.arguments import Arguments
from fastkto.cli.console import mistakes
from fastkto.cli.plan_model import plan_estimator
from fastkto.cli.train import SETTING_UP

SMALL_HEAD_MIB = 32
# What counts as less: the rest is rounding.
LESS = 0.999


class Setting(NamedTuple):
    """Flags to add, and the total in bytes with them."""

    flags: str
    total: int


class _Option(NamedTuple):
    """Flags, and the fields of the model's and of the training's arguments that they change."""

    flags: str
    model: dict[str, Any]
    training: dict[str, Any]


def smaller_settings(
    arguments: Arguments, processes: int, memory: int, before: int
) -> list[Setting]:
    """Each option that needs less than `before` by itself; if none fits, options together too.

    Together come the options that keep all weights trainable, and those with an adapter: the first
    that are enough, beginning with those that cost least, or else all of them.
    """
    tried = [(option, _sum(arguments, [option], processes)) for option in _options(arguments)]
    helpful = [option for option, setting in tried if setting.total < LESS * before]
    settings = [setting for _, setting in tried if setting.total < LESS * before]
    if any(setting.total <= memory for setting in settings):
        return settings
    trains_all = [option for option in helpful if "use_peft" not in option.model]
    adapter = [option for option in helpful if "optim" not in option.training]
    for chain in [trains_all] if trains_all == adapter else [trains_all, adapter]:
        if len(chain) > 1:
            settings.append(_together(arguments, chain, processes, memory))
    return settings


def _together(arguments: Arguments, chain: list[_Option], processes: int, memory: int) -> Setting:
    setting = _sum(arguments, chain, processes)
    if setting.total > memory:
        return setting
    for length in range(2, len(chain)):
        fewer = _sum(arguments, chain[:length], processes)
        if fewer.total <= memory:
            return fewer
    return setting


def _sum(arguments: Arguments, options: list[_Option], processes: int) -> Setting:
    flags = " ".join(option.flags for option in options)
    start, *rest = flags.split("--use_peft ")  # said once
    flags = "--use_peft ".join([start, "".join(rest)]) if rest else start
    return Setting(flags, _total(arguments, options, processes))


def _options(arguments: Arguments) -> Iterator[_Option]:
    """What could be changed, beginning with what costs least in time and in what is trained."""
    model, args = arguments.model, arguments.training
    budget, length = args.given_tokens, args.max_length
    has_reference = model.ref_model is not None or not model.use_peft
    if has_reference and not args.precompute_ref_log_probs and not args.sync_ref_model:
        yield _Option("--precompute_ref_log_probs", {}, {"precompute_ref_log_probs": True})
    if budget is not None and length is not None and budget > length:
        yield _Option(f"--max_tokens_per_pass {length}", {}, {"max_tokens_per_pass": length})
    if not args.gradient_checkpointing:
        yield _Option("--gradient_checkpointing", {}, {"gradient_checkpointing": True})
    if not args.activation_offloading:
        yield _Option("--activation_offloading", {}, {"activation_offloading": True})
    if not args.bf16 and not args.fp16 and model.dtype == "float32":
        yield _Option("--bf16", {}, {"bf16": True})
    if args.head_memory_mib > SMALL_HEAD_MIB:
        flag = f"--head_memory_mib {SMALL_HEAD_MIB}"
        yield _Option(flag, {}, {"head_memory_mib": SMALL_HEAD_MIB})
    if model.dtype == "float32":
        yield _Option("--dtype bfloat16", {"dtype": "bfloat16"}, {})
    if model.use_peft:
        if not model.load_in_4bit:
            changes = {"load_in_4bit": True, "load_in_8bit": False}
            yield _Option("--load_in_4bit", changes, {})
        return
    yield _Option("--optim adamw_8bit", {}, {"optim": "adamw_8bit"})
    targets: dict[str, Any] = {"use_peft": True, "lora_target_modules": ["all-linear"]}
    yield _Option("--use_peft --lora_target_modules all-linear", targets, {})
    yield _Option("--use_peft --load_in_4bit", {"use_peft": True, "load_in_4bit": True}, {})


def _total(arguments: Arguments, options: list[_Option], processes: int) -> int:
    args = copy.copy(arguments.training)
    model = arguments.model
    for option in options:
        model = dataclasses.replace(model, **option.model)
        for name, value in option.training.items():
            setattr(args, name, value)
    with mistakes(*SETTING_UP):
        estimator = plan_estimator(arguments._replace(model=model, training=args), processes)
        assert args.max_length is not None
        return estimator.run(args.max_length, args.given_tokens).total
