"""What `KTOConfig` refuses: values and settings that do not go together."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkto.config import KTOConfig

_CHOICES = (
    "truncation_mode", "loss_type", "kl_scope", "kl_pairing", "metrics", "nonfinite", "head",
    "backend", "train_sampling_strategy",
)  # fmt: skip
_COUNTS = (  # 1 or more
    "max_tokens_per_pass", "head_memory_mib", "max_length", "precompute_ref_batch_size",
    "ref_model_sync_steps", "gradient_accumulation_steps", "per_device_train_batch_size",
    "per_device_eval_batch_size",
)  # fmt: skip
_WEIGHTS = (  # 0 or more
    "learning_rate", "beta", "desirable_weight", "undesirable_weight", "router_aux_loss_coef",
    "ref_model_mixup_alpha",
)  # fmt: skip
_OPTIONAL = ("max_length", "precompute_ref_batch_size", "router_aux_loss_coef")


def check_config(args: KTOConfig) -> None:
    """Raise ValueError or TypeError that names a field and says what to do."""
    _check_numbers(args)
    for name in _CHOICES:
        choices = args.__dataclass_fields__[name].metadata["choices"]
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} is {getattr(args, name)!r}; choose from {choices}")
    _check_passes(args)
    _check_reference(args)
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}, whose noise is divided by the "
            "number of tokens of a forward, so that it would depend on max_tokens_per_pass; leave "
            "it out"
        )
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics has 'inputs', which are ragged here; the tokens are the label_ids "
            "that compute_metrics gets, so leave 'inputs' out"
        )


def _check_numbers(args: KTOConfig) -> None:
    if isinstance(args.max_tokens_per_pass, str) and args.max_tokens_per_pass != "auto":
        raise ValueError(
            f"max_tokens_per_pass is {args.max_tokens_per_pass!r}; give a number, or 'auto'"
        )
    for name in (*_COUNTS, *_WEIGHTS):
        value = getattr(args, name)
        is_auto = name == "max_tokens_per_pass" and value == "auto"
        if is_auto or (value is None and name in _OPTIONAL):
            continue
        kind, word = (Integral, "an integer") if name in _COUNTS else (Real, "a number")
        if isinstance(value, bool) or not isinstance(value, kind):
            or_none = ", or None" if name in _OPTIONAL else ""
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; pass {word}{or_none}")
        least = 1 if name in _COUNTS else 0
        if not least <= getattr(args, name) < float("inf"):
            finite = "" if name in _COUNTS else ", and finite"
            raise ValueError(f"{name} is {value}; it must be {least} or more{finite}")
    if args.beta == 0 or args.desirable_weight == args.undesirable_weight == 0:
        what = "beta is" if args.beta == 0 else "desirable_weight and undesirable_weight are both"
        raise ValueError(f"{what} 0, so that nothing would be learned; give a positive number")


def _check_passes(args: KTOConfig) -> None:
    if args.pad_to_multiple_of not in (None, 1):
        raise ValueError(
            f"pad_to_multiple_of is {args.pad_to_multiple_of!r}, and passes hold no padding to "
            "be rounded up; leave it out"
        )
    if args.nonfinite == "nanmean" and args.kl_scope == "window":
        raise ValueError(
            "nonfinite='nanmean' leaves rows out of their batch's mean, and kl_scope='window' "
            "has a mean over all batches of a step; use kl_scope='batch', or nonfinite='error'"
        )
    if args.kl_pairing == "dataset" and args.per_device_train_batch_size == 1 and args.needs_kl:
        raise ValueError(
            "kl_pairing is 'dataset', which pairs rows in blocks of per_device_train_batch_size, "
            "here of 1; use kl_pairing='rotate', or batches of 2 rows or more"
        )
    if args.checkpoint_passes not in (None, "auto"):
        raise ValueError(
            f"checkpoint_passes is {args.checkpoint_passes!r}; choose 'auto', or leave it out"
        )
    if args.checkpoint_passes == "auto" and not args.gradient_checkpointing:
        raise ValueError(
            "checkpoint_passes is 'auto', which decides whether gradient checkpointing is "
            "needed, and gradient_checkpointing is off; leave one of them out"
        )
    if args.activation_offloading and (args.gradient_checkpointing_kwargs or {}).get("offload"):
        raise ValueError(
            "activation_offloading is on and gradient_checkpointing_kwargs has offload=True, "
            "which both move the same activations; leave one of them out"
        )


def _check_reference(args: KTOConfig) -> None:
    if args.reference_cache is not None and not args.precompute_ref_log_probs:
        raise ValueError(
            f"reference_cache is {args.reference_cache!r}, but nothing is cached without "
            "precompute_ref_log_probs=True; set that too, or leave reference_cache out"
        )
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha is {args.ref_model_mixup_alpha}; it must be above 0 and at "
            "most 1"
        )
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model=True changes the reference while training, so that what "
            "precompute_ref_log_probs=True keeps would be another reference's; leave one out"
        )
