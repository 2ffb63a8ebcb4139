"""The model of a planned run, on the meta device: built from its config, without its weights."""

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastkto.cli.arguments import Arguments, ModelArguments
from fastkto.cli.console import mistakes
from fastkto.cli.train import SETTING_UP, peft_config
from fastkto.config import KTOConfig
from fastkto.memory import Deployment, MemoryEstimator
from fastkto.memory_probe import WITH_MASKS
from fastkto.policy import disable_dropout, prepare_adapter

# NF4 in blocks of 64 with an fp32 scale each, or scales quantised in turn (QLoRA, arXiv:2305.14314,
# section 3); 8 bits with a scale for a row.
BYTES_OF_4_BIT = 0.5 + 4 / 64
BYTES_OF_NESTED_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
BYTES_OF_8_BIT = 1.0


def plan_estimator(arguments: Arguments, processes: int) -> MemoryEstimator:
    """The memory of the run, with the policy and the reference that it would load."""
    model, args = arguments.model, arguments.training
    policy = meta_model(str(model.model_name_or_path), model.model_revision, model, args)
    reference = None
    if model.ref_model is not None:
        reference = meta_model(model.ref_model, "main", model, args)
    elif not model.use_peft:
        reference = meta_model(str(model.model_name_or_path), model.model_revision, model, args)
    adapter = peft_config(model)
    if adapter is not None:
        policy = get_peft_model(policy, adapter)
        base = policy.get_base_model()
        base.is_loaded_in_4bit, base.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit
        prepare_adapter(policy, args)
    if args.disable_dropout:  # the adapter's too
        disable_dropout(policy)
    return MemoryEstimator(
        policy, args, reference=reference, deployment=_deployment(model, args, processes)
    )


def meta_model(name: str, revision: str, model: ModelArguments, args: KTOConfig) -> PreTrainedModel:
    """The model `name` on the meta device, as the trainer would load it."""
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    with mistakes(*SETTING_UP, about=f"cannot read the config of {name}"):
        config = AutoConfig.from_pretrained(name, revision=revision, **kwargs)
    dtype = given.get("dtype", model.dtype)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    attention = given.get("attn_implementation", model.attn_implementation)
    if attention in (None, *WITH_MASKS):
        kwargs["attn_implementation"] = attention
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, str(dtype).removeprefix("torch.")), **kwargs
        )
    if attention is not None:  # which need not be installed here
        built.config._attn_implementation = attention
    return built


def _deployment(model: ModelArguments, args: KTOConfig, processes: int) -> Deployment:
    size = BYTES_OF_8_BIT if model.load_in_8bit else None
    if model.load_in_4bit:
        size = BYTES_OF_NESTED_4_BIT if model.use_bnb_nested_quant else BYTES_OF_4_BIT
    sharded = bool(args.fsdp) and processes > 1
    # Data of the command line always has a length.
    releases_reference = args.precompute_ref_log_probs and args.scores_are_known
    return Deployment(processes, sharded, size, releases_reference)
