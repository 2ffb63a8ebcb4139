"""What the trainer refuses, and what to do instead; before anything is trained if it can be."""

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from fastkto.config import KTOConfig
from fastkto.data.batch import VOCABULARY_REMEDY
from fastkto.data.rows import RowReport
from fastkto.embeddings import vocabulary
from fastkto.sharding import reduce_at_every_backward


def check_batch_size(args: KTOConfig, name: str, batch_size: int, steps: int = 1) -> None:
    """Refuse batches in which no row has another to be paired with. `name` is the field's.

    `steps` is how many such batches an optimizer step has; it counts in the scope "window".
    """
    processes = args.world_size if args.accelerator_config.split_batches else 1
    rows = batch_size // processes
    if args.kl_scope == "window":
        rows *= steps * args.world_size
    if not args.needs_partners or rows >= 2:
        return
    split = f", split over {processes} processes," if processes > 1 else ""
    remedy = (
        "use at least 2 for each process, or kl_scope='window' with more than one row in an "
        "optimizer step, or loss_type='apo_zero_unpaired'"
        + (", or kl_pairing='dataset'" if name == "per_device_eval_batch_size" else "")
        if args.kl_scope == "batch"
        else "raise it, or for training gradient_accumulation_steps, or the number of processes, "
        "or use loss_type='apo_zero_unpaired'"
    )
    raise ValueError(
        f"{name} is {batch_size}{split} and loss_type='kto' estimates its KL term from each row's "
        f"prompt with another row's completion; {remedy}"
    )


def check_arguments(model: Any, ref_model: Any, args: KTOConfig) -> None:
    """Refuse what can be seen from the arguments alone."""
    if not isinstance(args, KTOConfig):
        raise TypeError(
            f"args is a {type(args).__name__}; pass a fastkto.KTOConfig, or any TrainingArguments"
        )
    _check_given_models(model, ref_model)
    _check_settings(args)
    _check_launch(args)


def _check_given_models(model: Any, ref_model: Any) -> None:
    if not isinstance(model, str | torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a path, a hub id or a model")
    if not (ref_model is None or isinstance(ref_model, PreTrainedModel | PeftModel)):
        named = f", {ref_model!r}" if isinstance(ref_model, str) else ""
        raise TypeError(
            f"ref_model is a {type(ref_model).__name__}{named}; pass a loaded model, for example "
            "AutoModelForCausalLM.from_pretrained(...), or leave it out to use the initial policy; "
            "torch_compile=True compiles them"
        )
    if ref_model is not None and not isinstance(model, str):
        shared = {id(p) for p in model.parameters()} & {id(p) for p in ref_model.parameters()}
        if shared:
            what = "are the same object" if ref_model is model else "share weights"
            raise ValueError(
                f"model and ref_model {what}, so the reference would be trained too; leave "
                "ref_model out to use the initial policy, or load it a second time"
            )


def _check_settings(args: KTOConfig) -> None:
    check_batch_size(
        args,
        "per_device_train_batch_size",
        args.train_batch_size,
        args.gradient_accumulation_steps,
    )
    if args.precompute_ref_log_probs and (args.bf16_full_eval or args.fp16_full_eval):
        name = "bf16_full_eval" if args.bf16_full_eval else "fp16_full_eval"
        raise ValueError(
            f"{name}=True converts the weights when it evaluates, so that log-probabilities which "
            "precompute_ref_log_probs=True has kept are another reference's; leave one of them out"
        )
    if args.gradient_accumulation_steps > 1 and args.steps_in_backward:
        raise ValueError(
            f"optim={args.optimizer_name!r} updates the weights inside backward, so the later of "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} micro-batches would "
            "have a KL estimate of other weights; use 1, or another optimizer"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, and KTO has no labels to "
            "smooth; leave it out"
        )
    if getattr(args, "ddp_static_graph", False):  # newer transformers have it
        raise ValueError(
            "ddp_static_graph=True promises that all steps are alike, and steps differ in their "
            "number of passes; leave it out"
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True replaces the model's forward, which scores sequences here; "
            "leave it out"
        )
    if not args.accelerator_config.even_batches and args.world_size > 1:
        raise ValueError(
            "accelerator_config has even_batches=False, and ranks with fewer batches would leave "
            "the others waiting; leave it out (repeated rows do not count in evaluation)"
        )


def _check_launch(args: KTOConfig) -> None:
    """Refuse processes that do not know of each other: each would train alone, into one folder."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"{started} processes were started, and this one would train alone: without a GPU they "
            "find each other only with use_cpu=True; set it, or start one process"
        )


def check_run(args: TrainingArguments, *, saves: bool) -> None:
    """Refuse what only a training run minds; every rank writes, and so every one looks."""
    if args.max_steps == 0:
        raise ValueError(
            "max_steps is 0; give a number above 0, or leave it out to go by num_train_epochs"
        )
    if not saves:
        return
    folder = Path(str(args.output_dir))
    if folder.is_file():
        raise ValueError(f"output_dir is {folder}, a file; give a folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir is {folder}, where nothing can be written ({error.strerror}); give "
            "another folder"
        ) from error


def check_evaluation(eval_dataset: Any, args: KTOConfig) -> None:
    """Refuse data sets that are not there, and batches that have no partners."""
    if eval_dataset is None:
        return
    check_batch_size(args, "per_device_eval_batch_size", args.eval_batch_size)
    if isinstance(eval_dataset, dict):
        for name, part in eval_dataset.items():
            if part is None:
                raise TypeError(
                    f"eval_dataset has None under {name!r}; pass a datasets.Dataset or "
                    "IterableDataset there, or leave the name out"
                )


def check_trainable(policy: Any) -> None:
    """Refuse a policy of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient, so nothing would be trained; an "
            "adapter from PeftModel.from_pretrained needs is_trainable=True"
        )


# Methods of TRL 1.16's trainer that nothing here calls.
TRL_METHODS = (
    "compute_ref_log_probs",
    "_compute_kl_logps",
    "_compute_loss",
    "_precompute_ref_logps",
    "_prepare_dataset",
)


def check_overrides(trainer: Trainer) -> None:
    """Refuse a subclass that was written for TRL's trainer and would not be asked."""
    if unused := [name for name in TRL_METHODS if hasattr(trainer, name)]:
        raise TypeError(
            f"{type(trainer).__name__} defines {', '.join(unused)}, which TRL's trainer calls and "
            "this one does not; override compute_loss, or write a loop with fastkto.loop"
        )


def check_vocabulary(reports: dict[str, RowReport], model: Any, name: str = "model") -> None:
    """Refuse tokens that the model does not have, which a GPU would answer with an abort."""
    size = vocabulary(model)
    for data, report in reports.items():
        if size is not None and report.largest_id >= size:
            raise ValueError(
                f"the {data} data has the token {report.largest_id:,}, and the {name} has a "
                f"vocabulary of {size:,}; {VOCABULARY_REMEDY}"
            )


def set_distributed_defaults(args: KTOConfig) -> None:
    """Settings that ragged batches and passes leave no choice about."""
    # Ragged batches cannot be concatenated on the main process and cut up for the others.
    args.accelerator_config.dispatch_batches = False
    if args.ddp_broadcast_buffers is None:
        # A broadcast at each forward would wait for ranks that have fewer passes.
        args.ddp_broadcast_buffers = False
    reduce_at_every_backward(args)


def check_devices(trainer: Trainer) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs are visible to one process; start one process for each "
            "with `accelerate launch` or torchrun, or choose one with CUDA_VISIBLE_DEVICES"
        )
    if trainer.args.device.type == "mps":
        raise ValueError(
            "the device is mps, which has no fp64, and sums over a completion's tokens are formed "
            "in it; set use_cpu=True"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise ValueError(
                f"parallelism_config has {name}={getattr(parallelism, name)}; tensor, context and "
                "sequence parallelism are not supported: use data parallelism"
            )
    kind = trainer.accelerator.distributed_type
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            "a DeepSpeed configuration is given, and accelerate does not use it: it takes "
            "DeepSpeed up on GPUs only; leave out deepspeed or use_cpu"
        )
    if plugin is not None:
        tensor_parallel = plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 1)
        if tensor_parallel > 1:
            raise ValueError(
                f"the DeepSpeed configuration has tensor_parallel.autotp_size={tensor_parallel}; "
                "tensor parallelism is not supported: use ZeRO alone"
            )
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM is not supported; use FSDP2, DeepSpeed or data parallelism")
    if kind == DistributedType.FSDP and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP is set up in its first version, which is deprecated and not supported; use the "
            "second: fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's config file"
        )


def check_prepared(accelerator: Any) -> None:
    """Refuse to train a model that DeepSpeed was given for an evaluation, without an optimizer."""
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if is_deepspeed and accelerator.deepspeed_engine_wrapped is None:
        raise ValueError(
            "evaluate() has prepared the model without an optimizer, and under ZeRO-3 Trainer does "
            "not prepare it again; train first, set eval_on_start=True, or make another trainer"
        )


def check_optimizer(args: KTOConfig, num_passes: int) -> None:
    """Refuse several passes with gradient for an optimizer that steps in each backward."""
    if num_passes > 1 and args.steps_in_backward:
        raise ValueError(
            f"optim={args.optimizer_name!r} updates the weights inside backward, and this batch "
            f"takes {num_passes} passes with gradient; raise max_tokens_per_pass, lower "
            "per_device_train_batch_size, or choose another optimizer"
        )
