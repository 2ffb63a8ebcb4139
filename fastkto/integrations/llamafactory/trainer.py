"""LLaMA-Factory's `CustomKTOTrainer`, with fastkto's step."""

from typing import Any, ClassVar

from accelerate.utils import gather_object
from datasets import Dataset
from pyarrow.compute import list_value_length
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fastkto.config import KTOConfig
from fastkto.data.padded import is_padded
from fastkto.integrations.llamafactory.arguments import kto_arguments
from fastkto.integrations.llamafactory.batches import Collator, check_keys, to_ragged
from fastkto.integrations.llamafactory.logs import log_values, sums_of_micro_batches
from fastkto.integrations.llamafactory.media import MediaReader
from fastkto.integrations.llamafactory.methods import BatchMethods
from fastkto.integrations.llamafactory.parts import (
    PolicyItself,
    RowsWithoutNumbers,
    check_lengths_suffice,
    has_media,
    remove_upcast,
    trains_tower,
)
from fastkto.integrations.llamafactory.surroundings import Surroundings
from fastkto.limits import check_trainable
from fastkto.metrics import Metrics
from fastkto.reference import Reference
from fastkto.step import BatchLoss
from fastkto.trainer import KTOTrainer
from fastkto.vision import check_vision_model

# A subclass that overrides one of these has it called.
_METHODS = (
    "forward",
    "concatenated_forward",
    "compute_reference_log_probs",
    "kto_loss",
    "get_batch_loss_metrics",
    "compute_loss",
)
# What these do not see to.
_IN_PASSES = (
    "kl_scope",
    "precompute_ref_log_probs",
    "activation_offloading",
    "router_aux_loss_coef",
    "nonfinite",
    "checkpoint_passes",
)


class CustomKTOTrainer(BatchMethods, Surroundings, KTOTrainer):
    """Trains as `llamafactory.train.kto.trainer.CustomKTOTrainer` of LLaMA-Factory 0.9.5 does.

    A device batch is scored in passes, and the methods of `BatchMethods` are not called. If a
    subclass overrides one of them or `compute_loss`, each batch is one pass in them.

    Args:
        model: the policy, a `PreTrainedModel` or `PeftModel` as LLaMA-Factory loads it.
        ref_model: the reference. None: the policy without its adapter. It may be `model` itself in
            evaluation; rewards and the KL estimate are then 0.
        finetuning_args: LLaMA-Factory's `FinetuningArguments`.
        processor: saved with every checkpoint and at the end, unless None.
        disable_dropout: set every dropout probability of both models to 0.
        kwargs: `tokenizer`, and `Trainer`'s `args` (any `TrainingArguments`), `data_collator`,
            `train_dataset`, `eval_dataset`, `callbacks`, `optimizers`.
    """

    # Fields of `arguments.OPTIONS`; `patch` and subclasses set them.
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        finetuning_args: Any,
        processor: Any,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        given = kwargs.pop("args", None) or TrainingArguments("trainer_output")
        collator = kwargs.pop("data_collator", None)
        if collator is None:
            raise ValueError(
                "data_collator is None; pass LLaMA-Factory's KTODataCollatorWithPadding"
            )
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        self.finetuning_args = finetuning_args
        self.ftx_gamma = finetuning_args.pref_ftx
        self.media = MediaReader.of(model)
        self._ref_is_model = ref_model is model
        self._scores_whole_batches = bool(self._overridden_methods())
        self._stored: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        args = kto_arguments(
            given, finetuning_args, disable_dropout=disable_dropout, options=self.options
        )
        if self._scores_whole_batches:
            self._check_whole_batches(args)
        super().__init__(
            model=model,
            ref_model=None if self._ref_is_model else ref_model,
            args=args,
            data_collator=Collator(collator, self.media),
            **kwargs,
        )
        if self._scores_whole_batches:
            self.data_collator = collator
        self._repeated_rows = RowsWithoutNumbers(self.accelerator, self.args.dataloader_num_workers)
        self._add_surroundings(finetuning_args, processor)

    @property
    def ref_model(self) -> Any:
        """The reference if it is a model: None stands for the policy without its adapter."""
        return self.model if self._ref_is_model else self.reference.model

    # ---- What KTOTrainer asks for while it is built ----

    def _check_whole_batches(self, args: KTOConfig) -> None:
        """Refuse what methods that score one padded batch in one pass have no place for."""
        for name in _IN_PASSES:
            value, default = getattr(args, name), KTOConfig.__dataclass_fields__[name].default
            if value not in (default, 0.0):
                raise ValueError(
                    f"{name} is {value!r}, and {type(self).__name__} overrides "
                    f"{', '.join(self._overridden_methods())}, which score a batch by themselves; "
                    f"leave {name} out"
                )

    def _overridden_methods(self) -> list[str]:
        own = type(self)
        return [
            name for name in _METHODS if getattr(own, name) is not getattr(CustomKTOTrainer, name)
        ]

    def _prepare_policy(self, policy: Any, args: KTOConfig, *, will_train: bool) -> None:
        # LLaMA-Factory has prepared it, and gives a data set to train on in any case.
        remove_upcast(policy)
        check_vision_model(policy)
        if trains_tower(policy, self.finetuning_args):  # which batches of text alone leave out
            args.ddp_find_unused_parameters = True

    def _choose_reference(self, policy: Any, ref_model: Any, **how: Any) -> Reference:
        if self._ref_is_model:
            return PolicyItself("the policy itself")
        return super()._choose_reference(policy, ref_model, **{**how, "new_adapter": True})

    def _prepare(self, dataset: Any, name: str, processing: Any, args: KTOConfig) -> Any:
        if dataset is not None and has_media(dataset):
            check_lengths_suffice(args, name)
        return dataset  # LLaMA-Factory has tokenised it

    def _row_lengths(self, dataset: Dataset) -> list[int]:
        table = dataset.select_columns("input_ids").with_format("arrow")[:]
        return list_value_length(table["input_ids"]).to_pylist()

    # ---- The step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        if self._ref_is_model:
            raise ValueError(
                "ref_model is model, so the reference would be trained too; that is for "
                "evaluation. To train, load ref_model a second time, or pass None to take the "
                "model without its adapter"
            )
        check_trainable(self.model)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in `Trainer`; the scores without gradient are there for all of a step's batches."""
        if self._scores_whole_batches:
            return Trainer.get_batch_samples(self, *args, **kwargs)
        return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not is_padded(inputs):
            return super()._prepare_inputs(inputs)
        check_keys(inputs)
        return Trainer._prepare_inputs(
            self, inputs if self._scores_whole_batches else to_ragged(inputs, self.media)
        )

    def _score(
        self, batches: list[dict[str, Any]], counted: list[int] | None = None
    ) -> list[BatchLoss]:
        losses = super()._score(batches, counted)
        for batch, loss in zip(batches, losses, strict=True):
            num_desirable = batch["num_desirable"]
            if self.ftx_gamma > 1e-6 and num_desirable > 0:
                # Its share of the loss is the mean over desirable rows, once more over their part.
                scale = loss.num_rows * len(loss.rows) / num_desirable**2
                loss.sft_weight = self.ftx_gamma * scale
        return losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The device batch's loss, as in `KTOTrainer` or by `get_batch_loss_metrics`."""
        if not self._scores_whole_batches:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if not self._models_are_checked:
            self._get_ready([to_ragged(inputs, self.media)])
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        self._check_loss(loss)
        self._stored[self.model.training].append(metrics)
        return (loss, metrics) if return_outputs else loss

    def _check_loss(self, loss: Tensor) -> None:
        """Raise FloatingPointError on all ranks if a subclass's loss is not finite on one."""
        if self.ranks.sum((~loss.detach().isfinite()).double()[None]).item():
            raise FloatingPointError(
                f"the loss of a batch of step {self.state.global_step} is not finite, by the "
                f"methods that {type(self).__name__} overrides; nothing was updated from it"
            )

    def _check_step(self) -> None:
        try:
            super()._check_step()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. Rows have no numbers here: these are positions in their batch, from 0"
            ) from None

    # ---- Metrics ----

    def _collect(self, metrics: Metrics) -> tuple[dict[str, float], float | None]:
        if self._scores_whole_batches:
            stored = self._stored[metrics is self._train_metrics]
            values = log_values(gather_object(stored))
            stored.clear()
            return values, None
        micro_batches = metrics.take(self.ranks.sum)
        rows = sum(sums["rows"] for sums in micro_batches)
        loss = sum(sums["loss_sum"] for sums in micro_batches) / rows if rows else None
        return log_values(sums_of_micro_batches(micro_batches)), loss
