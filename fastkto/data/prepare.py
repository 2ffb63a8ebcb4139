"""Data sets as a trainer is given them, prepared for it."""

import logging
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from fastkto.config import KTOConfig
from fastkto.data.rows import RowReport, prepare_rows

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
COLUMNS = ["prompt_ids", "completion_ids", "label", "length", "row"]


def prepare_data(
    dataset: AnyDataset | dict[str, AnyDataset] | None,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: KTOConfig,
) -> tuple[Any, dict[str, RowReport]]:
    """(a data set, or each of a dict's, tokenised; reports by name of those whose rows are known).

    One that is prepared already stays as it is, without a report.
    """
    if dataset is None:
        return None, {}
    if isinstance(dataset, dict):
        parts = {
            key: prepare_data(part, f"{name}_{key}", tokenizer, args)
            for key, part in dataset.items()
        }
        reports = {key: report for _, one in parts.values() for key, report in one.items()}
        return {key: prepared for key, (prepared, _) in parts.items()}, reports
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"the {name} data is a {type(dataset).__name__}; pass a datasets.Dataset or "
            "IterableDataset, for example Dataset.from_list(rows)"
        )
    if set(COLUMNS) <= set(dataset.column_names or ()):
        return dataset, {}
    with args.main_process_first(desc=f"preparing the {name} data set"):
        prepared, report = prepare_rows(
            dataset,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=name,
        )
    if report is None:
        return prepared, {}
    logger.info(
        "the %s data has %d desirable and %d undesirable rows",
        name,
        report.desirable,
        report.undesirable,
    )
    advice = report.weight_advice(args.desirable_weight, args.undesirable_weight)
    if name == "train" and advice:
        logger.warning(advice)
    return prepared, {name: report}
