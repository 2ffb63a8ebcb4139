"""What a training run is about to do, in a few lines, and what may be wrong with it.

Every number comes from the trainer that will run: its prepared data, its order of batches, its
plan of passes and its weights.
"""

from collections import Counter
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available

from fastkto.backend import choose_backend
from fastkto.config import KTOConfig
from fastkto.packing import expected_layout
from fastkto.plan_passes import plan_lengths
from fastkto.sharding import whole_size
from fastkto.trainer import KTOTrainer

# Device batches that are looked at; more would delay the start of a long run.
LOOKED_AT = 500
# Above the share that chance gives when shuffled, so many batches of one class are worth a warning.
ONE_CLASS_MARGIN = 0.05


class RunSummary(NamedTuple):
    """Facts as (name, text), and warnings as sentences."""

    facts: list[tuple[str, str]]
    warnings: list[str]


class BatchFacts(NamedTuple):
    """What the first device batches of this process hold, in the order of the run."""

    per_epoch: int
    looked_at: int
    one_class: float  # share of the batches, in [0, 1]
    one_class_shuffled: float  # the same, as chance would give it
    passes: list[int]  # of each batch, over its own sequences

    @property
    def extent(self) -> str:
        """Which batches were looked at."""
        return "" if self.looked_at == self.per_epoch else f" (of the first {self.looked_at:,})"


def describe_run(trainer: KTOTrainer) -> RunSummary:
    """What `trainer.train()` will do."""
    args, model = trainer.step_settings.args, trainer.model
    batches = look_at_batches(trainer)
    backend = choose_backend(args.backend, args.device)
    facts = [
        ("model", describe_model(model)),
        *_data(trainer),
        ("batches", _batches(trainer, batches)),
        ("passes", _passes(batches, args)),
        ("precision", precision(model, args)),
        ("reference", trainer.reference.description),
        ("backend", f"{backend.name} ({backend.reason})"),
        ("devices", f"{args.world_size} x {args.device.type}"),
        ("output", str(args.output_dir)),
    ]
    warnings = [
        *_class_warnings(batches, args),
        *precision_warnings(model, args, max(batches.passes)),
    ]
    return RunSummary(facts, warnings)


def look_at_batches(trainer: KTOTrainer) -> BatchFacts:
    """The first device batches of this process, without reading their tokens."""
    columns = trainer.train_dataset.with_format("numpy", columns=["label", "length"])[:]
    label, length = columns["label"], columns["length"]
    max_tokens = trainer.step_settings.args.grad_tokens
    layout = expected_layout(trainer.model).layout
    one_class, passes = 0, []
    cuda = [torch.cuda.current_device()] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the run draws its order afresh
        dataloader = trainer.get_train_dataloader()
        assert dataloader.batch_sampler is not None  # Trainer's always have one
        for rows in dataloader.batch_sampler:
            one_class += int(label[rows].all() or not label[rows].any())
            passes.append(len(plan_lengths(length[rows].tolist(), max_tokens, layout)))
            if len(passes) == LOOKED_AT:
                break
    desirable, size = label.mean(), trainer.args.train_batch_size
    return BatchFacts(
        per_epoch=len(dataloader),
        looked_at=len(passes),
        one_class=one_class / len(passes),
        one_class_shuffled=float(desirable**size + (1 - desirable) ** size),
        passes=passes,
    )


def describe_model(model: PreTrainedModel | PeftModel) -> str:
    """Its name, its parameters, and how many of them are trained."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        sizes = [(whole_size(p), p.requires_grad) for p in model.parameters()]
        total, trainable = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    name = model.config._name_or_path or type(model).__name__
    share = "all trainable" if trainable == total else f"{trainable:,} trainable"
    percent = "" if trainable == total else f" ({trainable / total:.2%})"
    return f"{name}, {total:,} parameters, {share}{percent}"


def _data(trainer: KTOTrainer) -> list[tuple[str, str]]:
    """Rows, classes, what was dropped or cut, and the longest sequence, of each data set."""
    facts = []
    for name, report in trainer.row_reports.items():
        facts += [(f"{name} data", report.classes), ("", report.losses)]
    return facts


def _batches(trainer: KTOTrainer, batches: BatchFacts) -> str:
    args = trainer.args
    sizes = [f"{args.train_batch_size} rows"]
    if args.gradient_accumulation_steps > 1:
        sizes.append(f"{args.gradient_accumulation_steps} accumulation steps")
    if args.world_size > 1:
        sizes.append(f"{args.world_size} processes")
    return (
        f"{batches.per_epoch:,} per epoch of {' x '.join(sizes)}, order "
        f"{args.train_sampling_strategy}; {batches.one_class:.0%} with one class only"
        f"{batches.extent}"
    )


def _passes(batches: BatchFacts, args: KTOConfig) -> str:
    if args.max_tokens_per_pass == "auto":
        return "as large as fits, which is found before the first step (max_tokens_per_pass=auto)"
    middle, most = round(median(batches.passes)), max(batches.passes)
    number = f"{middle}" if middle == most else f"{middle} (median), at most {most},"
    return (
        f"{number} per batch with gradient, of at most {args.grad_tokens:,} tokens "
        f"(max_tokens_per_pass){batches.extent}"
    )


def precision(model: nn.Module, args: KTOConfig) -> str:
    """Types of the weights and of the arithmetic, and why."""
    if args.deepspeed_plugin is not None and (args.bf16 or args.fp16):
        low = "bfloat16" if args.bf16 else "float16"
        return f"{low} weights and arithmetic, float32 copies in DeepSpeed's optimizer"
    numbers = Counter[torch.dtype]()
    for parameter in model.parameters():
        numbers[parameter.dtype] += whole_size(parameter)
    weights = " and ".join(_name(dtype) for dtype, _ in numbers.most_common())
    has_bf16 = is_torch_bf16_gpu_available() and not args.use_cpu
    if args.bf16:
        why = "this GPU supports it" if has_bf16 else "asked for"
        return f"{weights} weights, bfloat16 autocast ({why})"
    if args.fp16:
        return f"{weights} weights, float16 autocast (asked for)"
    why = "turned off" if has_bf16 else "no GPU for it"
    return f"{weights} weights, no bfloat16 autocast ({why})"


def precision_warnings(model: nn.Module, args: KTOConfig, most_passes: int) -> list[str]:
    """What the types of weights cost that could be had for less, or lose."""
    warnings = []
    autocast = "bfloat16" if args.bf16 else "float16"
    if args.deepspeed_plugin is not None:
        return _deepspeed_precision_warnings(args, autocast, most_passes)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    frozen = [p for p in matrices if not p.requires_grad and p.dtype == torch.float32]
    if frozen and (args.bf16 or args.fp16):
        gib = sum(p.numel() for p in frozen) * 2 / 2**30
        warnings.append(
            f"the frozen weights are float32 and autograd keeps {autocast} copies of them "
            f"({gib:.1f} GiB); load them with dtype={autocast}"
        )
    low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if low and most_passes > 1:
        names = " and ".join(sorted(_name(dtype) for dtype in low))
        warnings.append(
            f"trainable weights are {names}, so their gradients are rounded at every one of up to "
            f"{most_passes} passes of a batch; use dtype=float32, or raise max_tokens_per_pass"
        )
    return warnings


def _deepspeed_precision_warnings(args: KTOConfig, low: str, most_passes: int) -> list[str]:
    data_types = args.deepspeed_plugin.deepspeed_config.get("data_types", {})
    in_fp32 = data_types.get("grad_accum_dtype") in ("fp32", "float32")
    if in_fp32 or not (args.bf16 or args.fp16) or most_passes == 1:
        return []
    return [
        f"DeepSpeed adds gradients up in {low}, so they are rounded at every one of up to "
        f"{most_passes} passes of a batch; set data_types.grad_accum_dtype to fp32 in its "
        "configuration, or raise max_tokens_per_pass"
    ]


def _class_warnings(batches: BatchFacts, args: KTOConfig) -> list[str]:
    share, shuffled = batches.one_class, batches.one_class_shuffled
    if shuffled == 1.0:
        return [
            "all rows of the training data have the same label, so that nothing holds their reward "
            "back but the KL estimate; add rows of the other class"
        ]
    if share > shuffled + ONE_CLASS_MARGIN and args.train_sampling_strategy == "sequential":
        return [
            f"{share:.0%} of the batches hold one class only, and {shuffled:.0%} would if rows "
            "were shuffled; set train_sampling_strategy=random"
        ]
    if share > 0.5:
        return [
            f"{share:.0%} of the batches hold one class only; raise per_device_train_batch_size"
        ]
    return []


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
