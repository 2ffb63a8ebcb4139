"""Fills the reference cache before the first step, as far as it is known what a run will ask for.

Every row's own sequence is known where a data set has a length. The mismatched sequences depend on
which rows meet in a batch, and so on the order: they are known where that is the data set's own, or
rows are paired before there are batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length
from transformers.utils.logging import tqdm

from fastkto.ranks import Ranks
from fastkto.reference import ReleasedReference
from fastkto.step import BatchLoss
from fastkto.window_scores import pair_losses, score_reference

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer

logger = logging.getLogger(__name__)


class _Window(NamedTuple):
    """Batches that the run will hand to `score_window` at once."""

    batches: list[dict[str, Any]]
    counted: list[int] | None


def precompute(trainer: KTOTrainer) -> None:
    """Score with the reference what the run is known to need and the cache does not have.

    If the run cannot need more than that, a reference that is a second model is released. With
    several ranks all of them have to call this. The random state of the CPU stays what it is.
    """
    args, train_set = trainer.step_settings.args, trainer.train_dataset
    given = trainer.eval_dataset
    eval_sets = given if isinstance(given, dict) else {} if given is None else {None: given}
    with torch.random.fork_rng(devices=[]):
        if has_length(train_set):
            loader = trainer.get_train_dataloader()
            steps, accumulated = trainer.state.max_steps, trainer.args.gradient_accumulation_steps
            sizes = min(len(loader), steps * accumulated), trainer._train_batch_size
            windows = _train_windows(trainer, loader, steps)
            _score(trainer, "train", loader, windows, *sizes, paired=args.pairs_are_known)
        for name, eval_set in eval_sets.items():
            if has_length(eval_set):
                loader = trainer.get_eval_dataloader(name)
                windows = _evaluation_windows(trainer, loader)
                sizes = len(loader), args.eval_batch_size
                _score(trainer, name or "eval", loader, windows, *sizes, paired=True)
    if args.scores_are_known and all(map(has_length, [train_set, *eval_sets.values()])):
        _release(trainer)


def _train_windows(trainer: KTOTrainer, loader: DataLoader, max_steps: int) -> Iterator[_Window]:
    batches = iter(loader)
    for _ in range(max_steps):
        window = list(islice(batches, trainer.args.gradient_accumulation_steps))
        if not window:
            return
        yield _Window(window, None)


def _evaluation_windows(trainer: KTOTrainer, loader: DataLoader) -> Iterator[_Window]:
    repeated = trainer._repeated_rows
    repeated.start()
    for batch in loader:
        yield _Window([batch], [len(batch["rows"]) - repeated.count(batch)])


def _score(
    trainer: KTOTrainer,
    name: str,
    loader: Any,
    windows: Iterator[_Window],
    total: int,
    batch_size: int,
    *,
    paired: bool,
) -> None:
    """Score the matched sequences of windows with `total` batches, `paired` also the mismatched."""
    args, settings = trainer.step_settings.args, trainer.step_settings
    hits = misses = 0
    losses: list[BatchLoss] = []
    bar = tqdm(
        total=total,
        desc=f"reference log-probabilities of the {name} data",
        unit="batch",
        disable=args.disable_tqdm or not trainer.is_local_process_zero(),
    )

    def flush() -> None:
        nonlocal hits, misses
        if losses:
            _check(settings.ranks, losses, score_reference(settings, losses))
            hits += int(losses[0].sums["ref_cache_hits"])
            misses += int(losses[0].sums["ref_cache_misses"])
            bar.update(len(losses))
            losses.clear()

    with bar:
        for window in windows:
            losses += _losses(trainer, window, paired)
            # By what is the same on all ranks, whatever a collator makes of their batches: each
            # call is collective.
            if len(losses) * batch_size >= (args.precompute_ref_batch_size or 1):
                flush()
        flush()
    loader.end()  # in case that not all of its batches were taken
    logger.info(
        "reference log-probabilities of the %s data: %d were in %s, %d have been computed",
        name,
        hits,
        settings.reference_cache and settings.reference_cache.store.path,
        misses,
    )


def _losses(trainer: KTOTrainer, window: _Window, paired: bool) -> list[BatchLoss]:
    batches = [trainer._prepare_inputs(batch) for batch in window.batches]
    trainer._get_ready(batches)
    losses = pair_losses(trainer.step_settings, batches, window.counted)
    if not paired:
        for loss in losses:
            loss.leave_out_mismatched()
    return losses


def _check(ranks: Ranks, losses: list[BatchLoss], logprob: Tensor) -> None:
    """Name rows whose scores are not finite, which are not kept, on all ranks."""
    rows = [row for loss in losses for row in loss.rows]
    rows += [loss.rows[index] for loss in losses for index in loss.paired_rows]
    finite = torch.isfinite(logprob).tolist()
    bad = sorted({row for row, is_finite in zip(rows, finite, strict=True) if not is_finite})
    if not ranks.all(not bad):
        named = sorted({*gather_object(bad)})
        raise FloatingPointError(
            f"the reference's log-probabilities of rows {named} of the data set, or of their "
            "prompts with another row's completion, are not finite. Look at these rows and at the "
            "reference's weights; with fp16, use bf16"
        )


def _release(trainer: KTOTrainer) -> None:
    model = trainer.reference.model
    if model is None or isinstance(model, ReleasedReference):
        return
    model.to("cpu")  # whoever else holds it keeps it, off the device
    trainer.reference.model = ReleasedReference()
    logger.info("the reference model is released: all of its scores are in the cache")
