"""truncation_mode="keep_end" cuts the beginning of a sequence, and drops no row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fastkto.data.batch import (
    KTOCollator,
    check_batch,
    matched_sequences,
    mismatched_sequences,
    split_rows,
)
from fastkto.data.rows import prepare_rows
from tests.models import tiny_model, tiny_tokenizer
from tests.row_data import stream_of
from tests.test_trainer import trainer

LIMIT = 12
ROWS = [
    {"prompt": "p" * prompt, "completion": "abcdefghijklmnopq"[:completion], "label": True}
    for prompt, completion in [(3, 4), (9, 4), (20, 3), (20, 5), (2, 17), (20, 17)]
]


def whole(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return [(prompt.tolist(), done.tolist()) for prompt, done in split_rows(batch)]


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_tokens_are_kept(stream: bool) -> None:
    data = stream_of(ROWS) if stream else Dataset.from_list(ROWS)
    tokenizer = tiny_tokenizer()
    rows, report = prepare_rows(data, tokenizer, max_length=LIMIT, truncation_mode="keep_end")
    rows = list(rows)
    assert len(rows) == len(ROWS) and [row["row"] for row in rows] == list(range(len(ROWS)))
    assert report is None or (report.dropped, report.cut, report.longest) == (0, 5, LIMIT)
    batch = KTOCollator(LIMIT, "keep_end")(rows)
    check_batch(batch, LIMIT)
    uncut = KTOCollator(None)(rows)
    sequences = matched_sequences(batch, LIMIT)
    for sequence, (prompt, completion) in zip(sequences, whole(uncut), strict=True):
        tokens = torch.cat([sequence.prompt, sequence.completion]).tolist()
        assert tokens == (prompt + completion)[-LIMIT:]
        assert sequence.completion.tolist() == completion[-LIMIT:]
    # Rows 2 and 3 have one prompt, which is cut to different lengths.
    assert sequences[2].prompt_key != sequences[3].prompt_key
    partners = [split_rows(batch)[index - 1][1] for index in range(len(rows))]
    for index, sequence in enumerate(mismatched_sequences(batch, partners, LIMIT)):
        assert sequence is not None
        expected = whole(uncut)[index][0] + whole(uncut)[index - 1][1]
        assert torch.cat([sequence.prompt, sequence.completion]).tolist() == expected[-LIMIT:]


def test_prompts_cut_alike_are_one_prompt() -> None:
    rows = [
        {"prompt_ids": [*range(5, 25)], "completion_ids": [7, last], "label": True, "row": last}
        for last in (8, 9)
    ]
    one, other = matched_sequences(KTOCollator(LIMIT, "keep_end")(rows), LIMIT)
    assert one.prompt_key == other.prompt_key and one.prompt.equal(other.prompt)


def test_a_run_scores_what_is_kept(tmp_path: Path) -> None:
    """As a run whose rows were cut by hand; pairs are another matter, so without KL estimate."""
    prepared, _ = prepare_rows(Dataset.from_list(ROWS), tiny_tokenizer(), max_length=None)
    cut = []
    for row in prepared:
        sequence = matched_sequences(KTOCollator(LIMIT, "keep_end")([row]), LIMIT)[0]
        columns = {"prompt_ids": sequence.prompt, "completion_ids": sequence.completion}
        cut.append({key: ids.tolist() for key, ids in columns.items()} | {"label": row["label"]})
    logs = []
    for name, data in (("ours", ROWS), ("by hand", cut)):
        run = trainer(
            tmp_path / name,
            train_dataset=Dataset.from_list(data),
            ref_model=tiny_model("llama", seed=2),
            loss_type="apo_zero_unpaired",
            max_length=LIMIT,
            truncation_mode="keep_end",
            per_device_train_batch_size=6,
            max_steps=2,
        )
        run.train()
        logs.append(run.state.log_history)
    for one, other in zip(*(log[:2] for log in logs), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-6), name


def test_only_the_two_modes_are_known() -> None:
    with pytest.raises(ValueError, match="truncation_mode is 'keep_middle'; choose from"):
        KTOCollator(8, "keep_middle")
