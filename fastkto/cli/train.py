"""The command `fastkto train`: from arguments to a trained model, metrics and a plot."""

import warnings
from pathlib import Path
from typing import Any

import datasets
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    ProgressCallback,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from fastkto.cli.arguments import Arguments, ModelArguments
from fastkto.cli.console import CommandError, mistakes, rank, say, table, warn
from fastkto.cli.preflight import check, resume_from
from fastkto.cli.progress import (
    TrainingProgress,
    closing_the_bar,
    describe_end,
    describe_interruption,
)
from fastkto.cli.summary import describe_run
from fastkto.config import KTOConfig
from fastkto.data.load import load_rows
from fastkto.full_disk import explaining_full_disk
from fastkto.policy import load_policy, model_init_kwargs
from fastkto.start_line import StartLine
from fastkto.trainer import KTOTrainer

SETTING_UP = (ValueError, OSError, ImportError)


def train(arguments: Arguments) -> None:
    """Load, say what will happen, train, evaluate and save. Raises CommandError for mistakes."""
    quieten_libraries()
    with mistakes():
        check(arguments)
    with mistakes(*SETTING_UP):
        trainer = build_trainer(arguments)
    with mistakes():
        summary = describe_run(trainer)
    checkpoint = resume_from(arguments.training)
    resumed = [] if checkpoint is None else [("resumed", f"from {checkpoint}")]
    say(table([*summary.facts, *resumed]))
    for warning in summary.warnings:
        warn(warning)
    args, folder = trainer.step_settings.args, str(trainer.args.output_dir)
    about = f"rank {args.process_index}" if args.world_size > 1 else ""
    with mistakes(about=about, everywhere=True):
        result = run(trainer, checkpoint)
        if trainer.is_fsdp_enabled:  # else save_model writes nothing for sharded checkpoints
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
        with explaining_full_disk(folder, folder):
            trainer.save_metrics("train", result.metrics)
        evaluation = evaluate(trainer)
    with mistakes(about=about, everywhere=True), explaining_full_disk(folder, folder):
        if evaluation is not None:
            trainer.save_metrics("eval", evaluation)
        trainer.save_state()
        if trainer.is_world_process_zero():
            say()
            say(table(describe_end(trainer, result.metrics, evaluation)))
    trainer.accelerator.end_training()  # ends trackers and the process group


def run(trainer: KTOTrainer, checkpoint: str | None) -> TrainOutput:
    """Train; Ctrl-C says how to go on."""
    try:
        with closing_the_bar(trainer):
            return trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(describe_interruption(trainer)) from error


def quieten_libraries() -> None:
    """Leave the terminal to the main process, and unsaid what libraries owe to each other."""
    for owed in ("`is_gradient_checkpointing`", "`broadcast_buffers`"):  # by peft, by accelerate
        warnings.filterwarnings("ignore", f"{owed} is deprecated", FutureWarning)
    if rank() == 0:
        return
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def evaluate(trainer: KTOTrainer) -> dict[str, float] | None:
    """Metrics of the final model, unless training has just measured them; None without data."""
    if trainer.eval_dataset is None:
        return None
    evaluations = (log for log in reversed(trainer.state.log_history) if "eval_loss" in log)
    last: dict[str, float] = next(evaluations, {})
    is_of_now = last.get("step") == trainer.state.global_step
    return last if is_of_now and not trainer.args.load_best_model_at_end else trainer.evaluate()


def build_trainer(arguments: Arguments) -> KTOTrainer:
    """The trainer, with everything loaded: first what is small, so that mistakes show early."""
    model, data, args = arguments
    name = str(model.model_name_or_path)
    given = args.model_init_kwargs or {}
    if isinstance(given, str):
        raise CommandError(f"model_init_kwargs is {given!r}; write it as JSON: {{...}}")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
    tokenizer = load_tokenizer(name, model.model_revision, args)
    with mistakes(*SETTING_UP, about="--data"):
        train_rows = load_rows(
            str(data.dataset_name), split=data.dataset_train_split, config=data.dataset_config
        )
    eval_rows = None
    if data.eval_data is not None:
        with mistakes(*SETTING_UP, about="--eval_data"):
            eval_rows = load_rows(data.eval_data, split=data.dataset_train_split)
    elif args.eval_strategy != "no":
        if Path(str(data.dataset_name)).is_file():
            raise CommandError(
                f"eval_strategy is {args.eval_strategy.value!r} and a data file has no second "
                "split; give the rows to evaluate on with --eval_data"
            )
        eval_rows = load_rows(
            str(data.dataset_name), split=data.dataset_test_split, config=data.dataset_config
        )
    quantization = quantization_config(model)
    reference = None
    if model.ref_model is not None:
        init_kwargs = model_init_kwargs(args, quantization, model.ref_model)
        init_kwargs["revision"] = "main"
        with mistakes(*SETTING_UP, about=f"cannot load the ref_model {model.ref_model}"):
            reference = load_policy(model.ref_model, init_kwargs, None)
    trainer = KTOTrainer(
        model=name,
        ref_model=reference,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        quantization_config=quantization,
        peft_config=peft_config(model),
    )
    trainer.pop_callback(StartLine)  # its summary says more
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(TrainingProgress)
    return trainer


def load_tokenizer(name: str, revision: str, args: KTOConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; its config is read too, so that both are known to exist."""
    kwargs = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    with mistakes(*SETTING_UP, about=f"cannot load a model from {name}"):
        AutoConfig.from_pretrained(name, **kwargs)
    with mistakes(*SETTING_UP, about=f"cannot load a tokenizer from {name}"):
        return AutoTokenizer.from_pretrained(name, **kwargs)


def peft_config(model: ModelArguments) -> PeftConfig | None:
    """A LoRA adapter as TRL's `get_peft_config` makes it."""
    if not model.use_peft:
        return None
    targets: Any = model.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        target_parameters=model.lora_target_parameters,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        bias="none",
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        modules_to_save=model.lora_modules_to_save,
    )


def quantization_config(model: ModelArguments) -> BitsAndBytesConfig | None:
    """Quantisation of the base model as TRL's `get_quantization_config` asks for it."""
    if model.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=model.dtype,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model.load_in_8bit else None
