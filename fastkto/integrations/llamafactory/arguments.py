"""What LLaMA-Factory says about a run, as arguments of `KTOTrainer`."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

from transformers import TrainingArguments

from fastkto.config import KTOConfig
from fastkto.config_check import check_config

# Fields of KTOConfig that stand under `fastkto:` in LLaMA-Factory's YAML.
OPTIONS = (
    "loss_type",
    "kl_scope",
    "max_tokens_per_pass",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "reference_cache",
    "activation_offloading",
    "router_aux_loss_coef",
    "nonfinite",
    "head",
    "backend",
    "head_memory_mib",
)
# Where LLaMA-Factory has what other fields are for.
_ELSEWHERE = {
    "beta": "pref_beta",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
    "max_length": "cutoff_len",
    "train_sampling_strategy": "disable_shuffling",
    "dataset_num_proc": "preprocessing_num_workers",
    "checkpoint_passes": "disable_gradient_checkpointing",
    "model_init_kwargs": "the fields of its ModelArguments",
    "trust_remote_code": "trust_remote_code, beside fastkto",
}


def check_options(options: Any) -> dict[str, Any]:
    """`options`, if they are fields of `KTOConfig` that LLaMA-Factory has not; else ValueError."""
    if not isinstance(options, dict):
        raise ValueError(
            f"fastkto is {options!r}; give it fields, for example fastkto: "
            "{max_tokens_per_pass: 8192}"
        )
    for name in options:
        if name in _ELSEWHERE:
            raise ValueError(
                f"fastkto has {name}, which LLaMA-Factory has itself; use {_ELSEWHERE[name]}"
            )
        if name not in OPTIONS:
            raise ValueError(f"fastkto has no field {name!r} here; it has {', '.join(OPTIONS)}")
    return options


def kto_arguments(
    given: TrainingArguments,
    finetuning_args: Any,
    *,
    disable_dropout: bool,
    options: dict[str, Any],
) -> KTOConfig:
    """A copy of `given`, whatever its class, that is a `KTOConfig` too.

    Keeps its values as they are, since they have been checked and completed; the loss is that of
    LLaMA-Factory's `finetuning_args`, and `options` are fields named in `OPTIONS`.
    """
    kind = type(given)
    own = {one.name: one.default for one in fields(KTOConfig)}
    values = {name: value for name, value in own.items() if name not in vars(given)}
    values |= vars(given)
    values |= {
        "beta": finetuning_args.pref_beta,
        "desirable_weight": finetuning_args.kto_chosen_weight,
        "undesirable_weight": finetuning_args.kto_rejected_weight,
        "disable_dropout": disable_dropout,
        "max_length": None,  # rows are cut to cutoff_len already
        "remove_unused_columns": False,  # which no model's forward knows
    }
    if not isinstance(given, KTOConfig):
        values["router_aux_loss_coef"] = 0.0  # LLaMA-Factory's KTO has no such term
    if finetuning_args.disable_shuffling:
        values["train_sampling_strategy"] = "sequential"
    values |= check_options(options)
    arguments = _restore(kind, values)
    arguments._resolve()
    check_config(arguments)
    return arguments


class _BringsMismatched:
    """The batches bring their mismatched sequences, so that no row needs a partner."""

    needs_partners = False
    kind: ClassVar[type[TrainingArguments]]  # what was given

    def __reduce__(self) -> tuple[Any, ...]:
        # Trainer saves its arguments with each checkpoint, and a class made here has no name there.
        return _restore, (self.kind, vars(self))


@cache
def _combined(kind: type) -> Any:
    """`kind` with the fields and properties of `KTOConfig`."""
    bases: tuple[type, ...] = (kind, KTOConfig)
    if issubclass(kind, KTOConfig):
        bases = (kind,)
    elif issubclass(KTOConfig, kind):
        bases = (KTOConfig,)
    made = type(f"{kind.__name__}ForKTO", (_BringsMismatched, *bases), {"kind": kind})
    return dataclass(init=False, repr=False, eq=False)(made)


def _restore(kind: Any, values: dict[str, Any]) -> Any:
    made = _combined(kind)
    arguments = made.__new__(made)
    vars(arguments).update(values)
    return arguments
