"""What of a run is kept: checkpoints, the saved model, its card, and what a resumed run loads."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastkto.checkpoints import make_way
from fastkto.full_disk import explaining_full_disk
from fastkto.model_card import write_model_card
from fastkto.reference import Reference
from fastkto.reference_sync import load_reference, save_reference
from fastkto.stored_weights import load_renamed


class SavingTrainer(Trainer):
    """Trainer's methods for files, for a run with a reference: whole checkpoints, or an error."""

    reference: Reference

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write README.md to `output_dir`; also called by `push_to_hub` with its own arguments.

        Arguments are TRL's; with any of those that only `Trainer`'s method has, it is its card.
        """
        if kwargs:
            super().create_model_card(model_name=model_name, tags=tags, **kwargs)
            return
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(self, model_name, dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; on a full disk the error says what is whole."""
        folder = self.args.output_dir
        with explaining_full_disk(output_dir or folder, folder):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._get_output_dir(trial=trial)
        checkpoint = Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explaining_full_disk(checkpoint, folder):
            if self.args.should_save:
                start = str(getattr(self.model.config, "_name_or_path", ""))
                make_way(checkpoint, self.args.save_total_limit, start)
            self.create_model_card()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state, which comes next, says that all ranks have written theirs.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_reference(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_reference(self, checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        policy: Any = self.model if model is None else model
        if not self.is_fsdp_enabled and load_renamed(policy, resume_from_checkpoint):
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reference.adapter is None or self.accelerator.is_fsdp2:
            return  # under FSDP2 the trained one is in the model's file, and may be in no other
        # Some transformers load the adapters in subfolders and forget "default" beside them.
        if "default" in policy.peft_config:
            policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _load_best_model(self) -> None:
        is_divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_divided or not load_renamed(self.model, self.state.best_model_checkpoint or ""):
            super()._load_best_model()
