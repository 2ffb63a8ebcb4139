"""Data sets as a trainer is given them, prepared for it."""

import logging
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastkto.config import KTOConfig
from fastkto.data.batch import KTOCollator
from fastkto.data.image_rows import has_images, prepare_image_rows
from fastkto.data.images import ImageCollator
from fastkto.data.pairing import DATASET_PAIRING, MISMATCHED_COLUMN
from fastkto.data.rows import RowReport, prepare_rows
from fastkto.full_disk import explaining_full_cache
from fastkto.processing import tokenizer_of

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
COLUMNS = ["prompt_ids", "completion_ids", "label", "length", "row"]


def needs_pairs(args: KTOConfig, data_collator: Any) -> bool:
    """Whether rows are paired before there are batches.

    So they are for collators of others, as in TRL: one that cuts completions cuts them to fit
    behind their own prompts.
    """
    is_ours = data_collator is None or isinstance(data_collator, KTOCollator | ImageCollator)
    as_in_trl = not is_ours and args.kl_scope == "batch" and args.kl_pairing == "rotate"
    return args.needs_kl and (args.kl_pairing == DATASET_PAIRING or as_in_trl)


def prepare_data(
    dataset: AnyDataset | dict[str, AnyDataset] | None,
    name: str,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    args: KTOConfig,
    *,
    pairs_rows: bool = False,
    reads_images: bool = True,
) -> tuple[Any, dict[str, RowReport]]:
    """(a data set, or each of a dict's, tokenised; reports by name of those whose rows are known).

    With `pairs_rows` each row gets the completion of another, as `kl_pairing="dataset"` asks for.
    One that is prepared already stays as it is but for that, without a report. One with images is
    checked and numbered, and tokenised batch by batch (see `fastkto.data.images`); without
    `reads_images`, by a collator that sees to `max_length` itself.
    """
    if dataset is None:
        return None, {}
    if isinstance(dataset, dict) and name == "train":
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__} of {', '.join(map(str, dataset))}; pass "
            "one of these"
        )
    if isinstance(dataset, dict):
        how = {"pairs_rows": pairs_rows, "reads_images": reads_images}
        parts = {
            key: prepare_data(part, f"{name}_{key}", processing, args, **how)
            for key, part in dataset.items()
        }
        reports = {key: report for _, one in parts.values() for key, report in one.items()}
        return {key: prepared for key, (prepared, _) in parts.items()}, reports
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"the {name} data is a {type(dataset).__name__}; pass a datasets.Dataset or "
            "IterableDataset, for example Dataset.from_list(rows)"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} data has a transform (set_transform or with_transform), which rows that "
            "are prepared once would not get; apply it with dataset.map(...), or call "
            "dataset.reset_format() and apply it in a data_collator"
        )
    with explaining_full_cache(f"the {name} data", dataset):
        prepared, report = _prepare(dataset, name, processing, args, reads_images)
        if set(COLUMNS) <= set(prepared.column_names or ()):  # not rows with images
            prepared = _pair(prepared, name, args) if pairs_rows else _unpair(prepared)
    if report is None:
        return prepared, {}
    _say_classes(report, args)
    return prepared, {name: report}


def _prepare(
    dataset: AnyDataset,
    name: str,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    args: KTOConfig,
    reads_images: bool,
) -> tuple[AnyDataset, RowReport | None]:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if set(COLUMNS) <= set(dataset.column_names or ()) or "media" in columns:  # as from here
        return dataset, None
    if has_images(columns):
        _check_image_run(processing, name, args)
        with args.main_process_first(desc=f"checking the {name} data set"):
            return prepare_image_rows(
                dataset,
                processing,
                max_length=args.max_length if reads_images else None,
                num_proc=args.dataset_num_proc,
                name=name,
            )
    is_processor = isinstance(processing, ProcessorMixin)
    with args.main_process_first(desc=f"preparing the {name} data set"):
        return prepare_rows(
            dataset,
            tokenizer_of(processing),
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=name,
            in_blocks=is_processor,
            keep_columns=not args.remove_unused_columns,
        )


def _say_classes(report: RowReport, args: KTOConfig) -> None:
    logger.info(
        "the %s data has %d desirable and %d undesirable rows",
        report.name,
        report.desirable,
        report.undesirable,
    )
    advice = report.weight_advice(args.desirable_weight, args.undesirable_weight)
    if report.name == "train" and advice:
        logger.warning(advice)


def _unpair(dataset: AnyDataset) -> AnyDataset:
    """Without what another run has added."""
    has_partners = MISMATCHED_COLUMN in (dataset.column_names or ())
    return dataset.remove_columns(MISMATCHED_COLUMN) if has_partners else dataset


def _pair(dataset: AnyDataset, name: str, args: KTOConfig) -> AnyDataset:
    """With each row's mismatched completion, before there are batches.

    As TRL 1.16 maps its data set in one process: `rotate` in blocks of consecutive rows, of which
    the last may have one row that is its own partner.
    """
    if "ref_KL_logps" in (dataset.column_names or ()):
        raise ValueError(
            f"the {name} data has ref_KL_logps, which are of other pairs than those formed here; "
            "leave that column out"
        )
    with args.main_process_first(desc=f"pairing the {name} data set"):
        block = args.per_device_train_batch_size
        desc = {"desc": f"Pairing the {name} data"} if isinstance(dataset, Dataset) else {}
        dataset = dataset.with_format(None)
        return dataset.map(_add_mismatched, batched=True, batch_size=block, **desc)


def _add_mismatched(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    completions = rows["completion_ids"]
    return {MISMATCHED_COLUMN: completions[-1:] + completions[:-1]}


def _check_image_run(processing: Any, name: str, args: KTOConfig) -> None:
    """Refuse what images leave no way for."""
    if not isinstance(processing, ProcessorMixin):
        raise ValueError(
            f"the {name} data has images, and processing_class is a {type(processing).__name__}; "
            "pass the processor of a vision-language model, AutoProcessor.from_pretrained(model), "
            "or leave the images out"
        )
    if args.truncation_mode == "keep_end":
        raise ValueError(
            f"truncation_mode is 'keep_end', which would cut the prompts that the images of the "
            f"{name} data stand in; use 'keep_start'"
        )
    if args.kl_pairing == DATASET_PAIRING:
        raise ValueError(
            f"kl_pairing is {DATASET_PAIRING!r}, and the rows of the {name} data with images are "
            "read batch by batch, in TRL too; use 'rotate'"
        )
    for field, value in (
        ("train_sampling_strategy", "group_by_length"),
        ("max_tokens_per_pass", "auto"),
        ("checkpoint_passes", "auto"),
    ):
        if getattr(args, field) == value:
            raise ValueError(
                f"{field} is {value!r}, which needs the rows' lengths before the first step, and "
                f"those of the {name} data's images are known once a batch is formed; choose "
                "another value"
            )
