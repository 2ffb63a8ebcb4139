"""KTOTrainer: transformers' Trainer with the KTO step, under TRL 1.16's names."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, SaveStrategy

from fastkto.checkpoint_passes import needs_checkpointing, turn_off_checkpointing
from fastkto.checkpoints import check_whole, last_whole_checkpoint
from fastkto.config import KTOConfig
from fastkto.data.batch import check_batch
from fastkto.data.collators import choose_collator, row_lengths
from fastkto.data.dropped import DROPPED_COLUMN
from fastkto.data.images import RAW_COLUMNS
from fastkto.data.padded import from_padded, is_padded
from fastkto.data.pairing import MISMATCHED_COLUMN
from fastkto.data.prepare import COLUMNS, AnyDataset, needs_pairs, prepare_data
from fastkto.data.rows import RowReport
from fastkto.embeddings import smallest_vocabulary
from fastkto.evaluation_logits import logits_and_tokens
from fastkto.head import attach_scoring
from fastkto.limits import (
    check_arguments,
    check_batch_size,
    check_devices,
    check_evaluation,
    check_optimizer,
    check_overrides,
    check_prepared,
    check_run,
    check_trainable,
    set_distributed_defaults,
)
from fastkto.metrics import Metrics, TokenCount
from fastkto.model_check import check_data, check_models
from fastkto.modes import evaluating
from fastkto.pass_budget import DeviceMemory, check_auto, device_memory, set_budget
from fastkto.plan_passes import Layout
from fastkto.policy import (
    disable_dropout,
    load_policy,
    model_init_kwargs,
    prepare_adapter,
)
from fastkto.positions import fewest_positions
from fastkto.precompute import precompute
from fastkto.processing import load_processing, tokenizer_of
from fastkto.ranks import Ranks
from fastkto.reference import Reference, choose_reference
from fastkto.reference_sync import SyncReference, check_sync
from fastkto.repeats import RepeatedRows
from fastkto.router import router_settings
from fastkto.saving import SavingTrainer
from fastkto.score_store import ScoreStore, default_folder
from fastkto.sharding import (
    before_the_last_pass,
    keep_outputs_in_fp32,
    prepare_reference,
    release_gathered,
    shard_untrained,
)
from fastkto.start_line import StartLine
from fastkto.step import BatchLoss, StepSettings
from fastkto.step_check import StepCheck
from fastkto.vision import check_vision_model, media_tokens, set_vision_defaults
from fastkto.window_scores import score_window

logger = logging.getLogger(__name__)


class KTOTrainer(SavingTrainer):
    """Trains a causal or vision-language model with KTO (Ethayarajh et al. 2024, arXiv:2402.01306).

    Args:
        model: a path or hub id, a `PreTrainedModel`, or a `PeftModel`. A path is loaded in fp32
            unless `args.model_init_kwargs` says otherwise, as TRL does.
        ref_model: the reference policy. Default: the initial policy (see `choose_reference`).
        args: a `KTOConfig`, TRL's, or any `TrainingArguments` (see `KTOConfig.from_arguments`).
        data_collator: default `KTOCollator`; another one gives the same kind of batch, or a padded
            one as TRL's and LLaMA-Factory's collators do (see `from_padded`).
        train_dataset, eval_dataset: rows in any of the formats of `prepare_rows`; for evaluation
            also a dict of data sets.
        processing_class: the tokenizer, or the processor of a vision-language model. Default: the
            one beside the model.
        compute_metrics: as in `Trainer`, from the policy's logits and the tokens, which takes an
            extra forward and all `[B, T, V]` logits of an evaluation batch.
        callbacks, optimizers: as in `Trainer`.
        quantization_config: used when `model` is a path or id.
        peft_config: wraps the model in a new adapter.

    Raises:
        ValueError, TypeError: for arguments or rows that do not fit, before anything is trained.
        HeadMismatchError: at the first batch, if the log-probabilities are not the model's own.
        FloatingPointError: before the optimizer steps, naming the rows that are not finite.
    """

    # A device batch's loss is its mean over rows, so Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = KTOConfig(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-KTO")
        if isinstance(args, TrainingArguments):
            args = KTOConfig.from_arguments(args)
        check_arguments(model, ref_model, args)
        check_evaluation(eval_dataset, args)
        set_distributed_defaults(args)
        self.score_store: ScoreStore | None = None
        if args.precompute_ref_log_probs:
            self.score_store = ScoreStore(args.reference_cache or default_folder())
        # The rows first: a mistake in them should not wait for a model to load.
        init_kwargs = model_init_kwargs(args, quantization_config, model)
        processing = load_processing(processing_class, model, init_kwargs)
        self.row_reports: dict[str, RowReport] = {}
        self._data_settings = {
            "pairs_rows": needs_pairs(args, data_collator),
            "reads_images": data_collator is None,
        }
        train_dataset = self._prepare(train_dataset, "train", processing, args)
        eval_dataset = self._prepare(eval_dataset, "eval", processing, args)
        set_seed(args.seed)  # before the model: the weights of a new adapter are random
        policy = load_policy(model, init_kwargs, peft_config)
        lengths_are_known = data_collator is None
        check_data(self.row_reports, policy, ref_model, lengths_are_known=lengths_are_known)
        self._prepare_policy(policy, args, will_train=train_dataset is not None)
        check_sync(args, policy, ref_model)
        self.reference = self._choose_reference(
            policy,
            ref_model,
            # With a moving reference a new adapter needs a second one, equal to none at first.
            new_adapter=peft_config is not None and not args.sync_ref_model,
            init_kwargs=init_kwargs,
        )
        for scored in (policy, self.reference.model):
            if scored is None:
                continue
            if args.disable_dropout:
                disable_dropout(scored)
            attach_scoring(
                scored, head=args.head, backend=args.backend, head_memory_mib=args.head_memory_mib
            )
        vocab_size = smallest_vocabulary(policy, self.reference.model)
        super().__init__(
            model=policy,
            args=args,
            data_collator=choose_collator(
                data_collator, processing, args, vocab_size, media_tokens(policy)
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_up_step(args)

    @property
    def ref_model(self) -> Any:
        """The reference if it is a model of its own, else None."""
        return self.reference.model

    def _set_up_step(self, args: KTOConfig) -> None:
        check_overrides(self)
        check_devices(self)
        # Under TRL's names, for scripts that look.
        self.beta, self.loss_type = args.beta, args.loss_type
        self.desirable_weight = args.desirable_weight
        self.undesirable_weight = args.undesirable_weight
        self.calculate_KL = args.needs_kl
        check_auto(args, self.accelerator.distributed_type)
        self._turns_off_checkpointing = (
            args.checkpoint_passes == "auto" and not needs_checkpointing(self)
        )
        # Some transformers read this in place of loss_is_scaled_for_ga, and have accelerate divide
        # by the accumulation steps a second time.
        self.model_accepts_loss_kwargs = False
        self.accelerator.gradient_accumulation_steps = 1
        self._signature_columns = [
            *(*COLUMNS, MISMATCHED_COLUMN, DROPPED_COLUMN),
            *(*RAW_COLUMNS, "media"),
        ]
        # A subclass may do anything with the loss, so it gets one graph over the whole batch.
        overridden = self._overridden_methods()
        self._single_pass = bool(overridden)
        if overridden:
            logger.warning(
                "%s overrides %s, so each batch is one pass over all its rows, whatever "
                "max_tokens_per_pass is",
                type(self).__name__,
                ", ".join(overridden),
            )
        self.model.add_model_tags(["fastkto", "kto"])
        # Numbers that are not finite stop the run here, so Trainer need not read every loss.
        args.logging_nan_inf_filter = False
        self.ranks = Ranks(self.accelerator)
        keep_outputs_in_fp32(self.accelerator)
        positions = fewest_positions(self.model, self.reference.model)
        if self.reference.model is not None:
            self.reference.model = prepare_reference(self.reference.model, self.accelerator)
        self.step_settings = StepSettings(
            args=args,
            policy=self.model,
            reference=self.reference,
            policy_layout=Layout.PADDED,  # until the first batch shows more
            reference_layout=Layout.PADDED,
            ranks=self.ranks,
            positions=positions,
            router=router_settings(self.model.config.get_text_config(), args),
        )
        self._train_metrics, self._eval_metrics = Metrics(args.metrics), Metrics(args.metrics)
        # How the names of the last of several evaluation sets begin, and its metrics.
        self._evaluated: tuple[str, dict[str, float]] = "eval_", {}
        self._step_check = StepCheck(self.ranks, args.output_dir)
        self._repeated_rows = RepeatedRows(self.accelerator, args.dataloader_num_workers)
        self._models_are_checked = self._budget_is_found = self._had_a_batch = False
        self.add_callback(StartLine(self))
        self.add_callback(TokenCount())
        if args.sync_ref_model:
            self.add_callback(SyncReference(self))
        self.add_callback(_StartOfTraining(self))

    def _overridden_methods(self) -> list[str]:
        """The methods of the loss that a subclass has replaced."""
        return [] if type(self).compute_loss is KTOTrainer.compute_loss else ["compute_loss"]

    def _prepare_policy(self, policy: Any, args: KTOConfig, *, will_train: bool) -> None:
        check_vision_model(policy)
        prepare_adapter(policy, args)
        set_vision_defaults(policy, args)
        if will_train:
            check_trainable(policy)

    def _choose_reference(self, policy: Any, ref_model: Any, **how: Any) -> Reference:
        return choose_reference(policy, ref_model, **how)

    def _prepare(
        self,
        dataset: Any,
        name: str,
        processing: PreTrainedTokenizerBase | ProcessorMixin,
        args: KTOConfig,
    ) -> Any:
        prepared, reports = prepare_data(dataset, name, processing, args, **self._data_settings)
        self.row_reports |= reports
        return prepared

    @property
    def _token_count(self) -> TokenCount:
        # Looked up, since Trainer may replace callbacks by those of a checkpoint.
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, TokenCount))

    # ---- The step ----

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; the batch size may have been lowered since the start."""
        args = self.step_settings.args
        steps = args.gradient_accumulation_steps
        check_batch_size(args, "the batch size", self._train_batch_size, steps)
        return super().get_train_dataloader()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in `Trainer`; the backward of the last pass, which runs here, is named in errors."""
        self._had_a_batch = True
        # DeepSpeed's optimizer steps within that backward, and is no pass.
        batch_loss = None if self.is_deepspeed_enabled else inputs.get("batch_loss")
        with nullcontext() if batch_loss is None else batch_loss.naming_pass():
            return super().training_step(model, inputs, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in `Trainer`; the scores without gradient are there for all of a step's batches."""
        if self.state.global_step >= self.state.max_steps:  # of a finished run that is resumed
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if hasattr(self.optimizer, "train"):  # some have other weights since an evaluation
            self.optimizer.train()
        batches = [self._prepare_inputs(batch) for batch in batches]
        if batches:
            if not self._budget_is_found:
                self._get_ready(batches)  # the layouts, which the trial passes have too
                set_budget(self, batches)
                self._budget_is_found = True
            for batch, batch_loss in zip(batches, self._score(batches), strict=True):
                batch["batch_loss"] = batch_loss
        return batches, num_items

    def _device_memory(self) -> DeviceMemory | None:
        return device_memory(self)

    def _row_lengths(self, dataset: Dataset) -> list[int]:
        return row_lengths(dataset, self.data_collator)

    def _score(
        self, batches: list[dict[str, Any]], counted: list[int] | None = None
    ) -> list[BatchLoss]:
        self._get_ready(batches)
        return score_window(
            self.step_settings,
            batches,
            counted=counted,
            single_pass=self._single_pass,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in `Trainer`; padded batches become ragged ones."""
        if is_padded(inputs):
            inputs = from_padded(inputs, media_tokens=media_tokens(self.model))
        return super()._prepare_inputs(inputs)

    def _get_ready(self, batches: list[dict[str, Any]]) -> None:
        """Before any of these batches is scored."""
        # Trainer has put another one in place by now if the model is sharded.
        self.step_settings.policy = self.model_wrapped if self.is_deepspeed_enabled else self.model
        for batch in batches:
            check_batch(batch, self.step_settings.args.max_length)
        if not self._models_are_checked:
            self._models_are_checked = check_models(self, batches)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The device batch's loss: its whole value, with the graph of its last pass.

        In training, backward has run for the passes before the last when this returns.
        """
        training = self.model.training
        batch_loss = inputs.get("batch_loss")
        if batch_loss is None:  # not handed out by get_batch_samples: a step of its own
            inputs = self._prepare_inputs(inputs)
            counted = len(inputs["rows"]) - (0 if training else self._repeated_rows.count(inputs))
            (batch_loss,) = self._score([inputs], [counted])
        batch_loss.take_labels(inputs)
        if training:
            check_optimizer(self.step_settings.args, len(batch_loss.plan))
        done: Tensor | float = 0.0
        with batch_loss.naming_pass(), nullcontext() if training else evaluating(model):
            for groups in batch_loss.plan[:-1]:
                with before_the_last_pass(model, self.accelerator):
                    loss = batch_loss.pass_loss(model, groups)
                    if training:
                        self._backward(loss)
                done = done + loss.detach()
            loss = batch_loss.pass_loss(model, batch_loss.plan[-1]) + done
        self._record(batch_loss, training)
        if training and self.accelerator.sync_gradients:
            self._check_step()  # now, since DeepSpeed's optimizer steps within the backward
        return (loss, {}) if return_outputs else loss

    def _backward(self, loss: Tensor) -> None:
        kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # as Trainer does
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch; with `compute_metrics` also its logits and tokens."""
        inputs = self._prepare_inputs(inputs)
        logits = tokens = None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            if not prediction_loss_only:
                logits, tokens = logits_and_tokens(
                    model,
                    inputs,
                    max_length=self.step_settings.args.max_length,
                    pad_token_id=tokenizer_of(self.processing_class).pad_token_id,
                )
        self._check_step()
        return loss, logits, tokens

    # ---- Metrics ----

    def _record(self, batch_loss: BatchLoss, training: bool) -> None:
        sums: dict[str, Tensor | float] = dict(batch_loss.sums)
        if "aux_loss_sum" in sums:
            sums["aux_losses"] = 1.0
        metrics = self._train_metrics if training else self._eval_metrics
        metrics.add(sums, self.args.device)
        tokens = batch_loss.num_tokens if training else 0
        self._step_check.add(batch_loss, tokens)

    def _check_step(self) -> None:
        self._token_count.num_tokens += self._step_check.read(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics since the last log; those of an evaluation are in already.

        TRL's own names do not say which evaluation set they are of; with `metrics="trl"` the log of
        each set has them beside those that do.
        """
        if "loss" in logs or "train_runtime" in logs:
            logs |= self._collect(self._train_metrics)[0]
        prefix, values = self._evaluated
        if self.step_settings.args.metrics == "trl" and any(key.startswith(prefix) for key in logs):
            logs |= {f"eval_{key}": value for key, value in values.items()}
            self._evaluated = "eval_", {}
        super().log(logs, start_time)

    def _collect(self, metrics: Metrics) -> tuple[dict[str, float], float | None]:
        """What a log shows of the micro-batches since the last one, and their mean loss."""
        values, loss = metrics.collect(self.ranks.sum)
        if values:
            values["num_tokens"] = float(self._token_count.num_tokens)
        return values, loss

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in `Trainer`, also for a data set in any of the formats of `prepare_rows`."""
        args = self.step_settings.args
        check_batch_size(args, "per_device_eval_batch_size", args.eval_batch_size)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, "eval", self.processing_class, args)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`, for `predict`."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with the mean loss over rows and the metrics of training."""
        self._eval_metrics.clear()
        self._repeated_rows.start()
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            shard_untrained(self)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        release_gathered(self.model_wrapped)
        values, loss = self._collect(self._eval_metrics)
        if metric_key_prefix.startswith("eval_"):
            self._evaluated = f"{metric_key_prefix}_", dict(values)
        if loss is not None:
            values["loss"] = loss
        output.metrics.update({f"{metric_key_prefix}_{key}": v for key, v in values.items()})
        return output

    # ---- The run ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; True resumes from the last checkpoint that was written to its end."""
        check_run(self.args, saves=self.args.save_strategy != SaveStrategy.NO)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, and {self.args.output_dir} has no whole "
                    "checkpoint; leave it out to start from the beginning"
                )
        if resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._had_a_batch:
            return output
        if self.state.global_step == 0 < self.state.max_steps:
            size = self.args.per_device_train_batch_size * self.args.world_size
            why = (
                f"dataloader_drop_last=True leaves out batches of fewer than {size} rows"
                if self.args.dataloader_drop_last
                else "Is the stream empty, or does every prompt fill "
                f"max_length={self.args.max_length}? A warning names such rows"
            )
            raise ValueError(f"nothing was trained: the train data gave no batch. {why}")
        if self.is_world_process_zero():
            logger.warning(
                "nothing was left to train: step %d is the end of the run; raise num_train_epochs "
                "or max_steps to go on",
                self.state.global_step,
            )
        return output


class _StartOfTraining(TrainerCallback):
    """Forgets what a run before recorded, applies checkpoint_passes, fills the reference cache."""

    def __init__(self, trainer: KTOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_prepared(self.trainer.accelerator)
        self.trainer._train_metrics.clear()
        self.trainer._step_check.clear()
        self.trainer._budget_is_found = self.trainer._had_a_batch = False
        if self.trainer._turns_off_checkpointing:
            turn_off_checkpointing(self.trainer.model)
        if self.trainer.step_settings.args.precompute_ref_log_probs:
            precompute(self.trainer)
