"""The command `fastkto plan`: what a run will need in memory, before anything is loaded."""

import re
from collections.abc import Sequence
from textwrap import fill, wrap
from typing import NamedTuple

import torch

from fastkto.checkpoint_passes import MARGIN as SPARE
from fastkto.checkpoint_passes import WithoutCheckpointing, saving, without_checkpointing
from fastkto.cli.arguments import Arguments
from fastkto.cli.console import CommandError, mistakes, say, table
from fastkto.cli.parser import COMMON, TrainParser
from fastkto.cli.plan_model import plan_estimator
from fastkto.cli.plan_options import smaller_settings
from fastkto.cli.preflight import check_model
from fastkto.cli.summary import describe_model, precision
from fastkto.cli.train import SETTING_UP, quieten_libraries
from fastkto.memory import MemoryEstimator, RunMemory

GIB = 2**30
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
WIDTH = 52  # of a row's name in the tables
NOT_COUNTED = """\
Estimated from shapes: nothing was loaded. Not counted: the CUDA context and the libraries' own
buffers (about 1 GiB), fragmentation, and what other programs hold on the device."""


class Target(NamedTuple):
    """The device that the run is planned for."""

    memory: int  # bytes
    processes: int


class Peak(NamedTuple):
    """What comes on top of what stays, in bytes, and parts of it."""

    size: int
    where: str
    kept: int = 0  # for the backward
    gradients: int = 0  # of the head and the embedding, before they are added to the weights'


class PlanParser(TrainParser):
    """The arguments of `fastkto train`, and the device."""

    usage_text = "fastkto plan --model MODEL --max_length TOKENS --memory 80GB ..."
    groups = {"the device": ("memory", "num_processes"), **COMMON}

    def __init__(self) -> None:
        super().__init__()
        self.add_argument(
            "--memory",
            help="Memory of one device: 80GB (10^9 bytes), 80GiB or 80g (2^30 bytes). Default: "
            "that of this machine's GPU.",
            metavar="SIZE",
        )
        self.add_argument(
            "--num_processes",
            "--num-processes",
            type=int,
            default=1,
            help="Processes of the run, one for each device.",
        )

    def parse_plan(self, argv: Sequence[str]) -> tuple[Arguments, Target]:
        """The arguments of the run and the device; CommandError for what cannot be used."""
        values = self.read(argv)
        processes = values.num_processes
        if processes < 1:
            raise CommandError(f"--num_processes is {processes}; it must be 1 or more")
        if values.deepspeed is not None:
            raise CommandError(
                f"--deepspeed is {values.deepspeed!r}, and what ZeRO divides and copies is not "
                "planned; leave it out, or plan with --fsdp, which divides weights, gradients, "
                "optimizer state and reference by the processes"
            )
        target = Target(_memory(values.memory), processes)
        if not torch.cuda.is_available() and not values.use_cpu:
            # A GPU's default, which TrainingArguments refuses on a machine without one.
            values.bf16 = not values.fp16 if values.bf16 is None else values.bf16
            values.use_cpu = True
        return self.build(values), target


def _memory(text: str | None) -> int:
    if text is not None:
        return parse_memory(text)
    if not torch.cuda.is_available():
        raise CommandError("--memory is missing; give the device's, for example --memory 80GB")
    return int(torch.cuda.get_device_properties(0).total_memory)


def parse_memory(text: str) -> int:
    """Bytes of a size such as 80GB (10^9 bytes), 80GiB or 80g (2^30 bytes)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?B)?", text.strip().upper())
    if match is None:
        raise CommandError(
            f"--memory: {text!r} is no size; give a number with a unit, such as 80GB or 24GiB"
        )
    number, unit, suffix = match.groups()
    size = int(float(number) * (UNITS if suffix == "B" else BINARY_UNITS)[unit])
    if size == 0:
        raise CommandError(f"--memory: {text!r} is nothing; give the device's, such as 80GB")
    return size


def plan(arguments: Arguments, target: Target) -> None:
    """Say what the run needs, how much of it fits, and what would make it fit."""
    model, args = arguments.model, arguments.training
    quieten_libraries()
    check_model(model)
    length = args.max_length
    if length is None:
        raise CommandError("max_length is empty; give the longest sequence's tokens")
    with mistakes(*SETTING_UP):
        estimator = plan_estimator(arguments, target.processes)
        budget = args.given_tokens
        without = None
        if args.gradient_checkpointing:
            without = without_checkpointing(estimator, length, budget, target.memory)
            # as the trainer does, before it looks for the largest pass
            args.gradient_checkpointing = args.checkpoint_passes is None or not without.fits
        largest = budget or estimator.largest_budget(length, target.memory)
        memory = estimator.run(length, largest)
    say(table(_facts(arguments, estimator, memory, target)))
    say()
    say(_needs(memory, target))
    say()
    say(_passes(estimator, memory, length))
    say()
    say(fill(_verdict(estimator, memory, target, budget), 100))
    if without is not None and without.fits:
        say()
        say(fill(_without_checkpointing(estimator, without), 100))
    say()
    say(NOT_COUNTED)
    if memory.total > target.memory:
        say()
        _say_settings(arguments, memory, target)


def _facts(
    arguments: Arguments, estimator: MemoryEstimator, memory: RunMemory, target: Target
) -> list[tuple[str, str]]:
    args, policy = arguments.training, estimator.policy
    found = ", the largest that fits" if args.max_tokens_per_pass == "auto" else ""
    checkpointing = "gradient" if args.gradient_checkpointing else "no gradient"
    offloading = ", activations in host memory" if args.activation_offloading else ""
    devices = ""
    if target.processes > 1:
        kind = "FSDP" if estimator.deployment.sharded else "DistributedDataParallel"
        devices = f", on each of {target.processes} devices ({kind})"
    precise = precision(policy, args).replace("no GPU for it", "turned off")
    precise = re.sub(r"autocast \(.*\)", "autocast", precise)
    return [
        ("model", describe_model(policy)),
        ("precision", precise),
        (
            "pass",
            f"{memory.pass_tokens:,} tokens{found}, {checkpointing} checkpointing{offloading}",
        ),
        ("attention", policy.config._attn_implementation),
        ("optimizer", args.optimizer_name),
        ("memory", f"{target.memory / GIB:.2f} GiB{devices}"),
    ]


def _needs(memory: RunMemory, target: Target) -> str:
    """What stays and what the peak adds to it; the rows add up to the total."""
    peak = _peak(memory)
    is_filling = memory.total == memory.before_training
    copies = memory.gradient_pass.weight_copies if peak.kept else 0
    rows = [
        ("weights", memory.weights),
        ("weights gathered or unpacked for use", memory.unpacked),
        ("gradients", 0 if is_filling else memory.gradients),
        ("gradient buckets of DistributedDataParallel", memory.buckets),
        ("optimizer state", 0 if is_filling else memory.optimizer),
        ("reference model", 0 if memory.filling and not is_filling else memory.reference),
        ("activations kept for the backward", peak.kept - copies),
        ("low-precision copies of weights, kept too", copies),
        ("gradients of head and embedding, not added up yet", peak.gradients),
        (f"peak on top, {peak.where}", peak.size - peak.kept - peak.gradients),
    ]
    lines = [_row(name, size) for name, size in rows if size > 0]
    lines.append(_row("caches (none on the device)", 0))
    total = _row("total", memory.total)
    share = f"   {memory.total / target.memory:.0%} of {target.memory / GIB:.2f} GiB"
    return "\n".join([_row("the run", "GiB"), *lines, "  " + "-" * (WIDTH + 10), total + share])


def _peak(memory: RunMemory) -> Peak:
    if memory.total == memory.before_training:
        return Peak(memory.filling, "while the reference's scores are computed")
    largest, kept = memory.gradient_pass, memory.gradient_pass.kept
    peaks = [
        Peak(largest.head, "in the head", kept, largest.head_gradients),
        Peak(largest.backward, "in a layer's backward", kept, largest.backward_gradients),
        Peak(largest.end, "in the embedding's backward", gradients=largest.end_gradients),
        Peak(largest.forward, "in the forward", kept),
        Peak(memory.no_gradient_pass.peak, "in a pass without gradient"),
        Peak(memory.optimizer_step, "in the optimizer's step"),
    ]
    return max(peaks)


def _passes(estimator: MemoryEstimator, memory: RunMemory, length: int) -> str:
    """Peaks of one pass under either checkpointing, and what the head needs of them."""
    tokens = memory.pass_tokens
    with_, without = (
        estimator.pass_bytes(tokens, longest=length, checkpointing=checkpointing)
        for checkpointing in (True, False)
    )
    rows = [
        ("with gradient, with checkpointing", with_.peak),
        ("with gradient, without checkpointing", without.peak),
        ("of both: the head", max(with_.scoring, with_.head - with_.kept)),
        ("without gradient", memory.no_gradient_pass.peak),
    ]
    title = _row(f"one pass of {tokens:,} tokens", "GiB")
    return "\n".join([title, *(_row(name, size) for name, size in rows)])


def _row(name: str, size: int | str) -> str:
    number = size if isinstance(size, str) else f"{size / GIB:.2f}"
    return f"  {name:<{WIDTH}}{number:>10}"


def _verdict(
    estimator: MemoryEstimator, memory: RunMemory, target: Target, budget: int | None
) -> str:
    over = (memory.total - target.memory) / GIB
    fits = "It fits." if over <= 0 else f"It does not fit: {over:.2f} GiB too much."
    context = estimator.largest_context(target.memory, budget)
    if context == 0:
        stays = f"what stays in memory without a pass is {memory.lasting / GIB:.2f} GiB"
        return f"{fits} No context fits with these settings: {stays}."
    text = f"{fits} The largest context that fits has {context:,} tokens"
    positions = getattr(estimator.policy.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and context > positions:
        text += f", more than the {positions:,} positions of the model"
    return f"{text}."


def _without_checkpointing(estimator: MemoryEstimator, without: WithoutCheckpointing) -> str:
    args = estimator.args
    needs = f"needs {without.total / GIB:.2f} GiB, which fits with {SPARE:.0%} to spare"
    saved = f"saves {saving(estimator.policy, args)}"
    if args.gradient_checkpointing:
        return (
            f"Without gradient checkpointing the run {needs}. --checkpoint_passes auto turns it "
            f"off, which {saved}."
        )
    return f"Gradient checkpointing is turned off, which {saved}: without it the run {needs}."


def _say_settings(arguments: Arguments, memory: RunMemory, target: Target) -> None:
    settings = smaller_settings(arguments, target.processes, target.memory, memory.total)
    say(_row("what would change it", "total"))
    for setting in settings:
        verdict = "   fits" if setting.total <= target.memory else ""
        *first, last = wrap(
            setting.flags, WIDTH - 2, break_on_hyphens=False, subsequent_indent="  "
        )
        say("\n".join([*(f"  {line}" for line in first), _row(last, setting.total) + verdict]))
    least = min([memory.total, *(setting.total for setting in settings)])
    if least > target.memory:
        raise CommandError(
            f"{target.memory / GIB:.2f} GiB are too little with any of these settings: the least "
            f"is {least / GIB:.2f} GiB, and the weights alone, as asked for, are "
            f"{memory.weights / GIB:.2f} GiB; lower --max_length, or take a smaller model, a "
            "larger device, or several with --num_processes and --fsdp"
        )
