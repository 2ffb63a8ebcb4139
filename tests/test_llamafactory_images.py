"""Rows with images: the same run in LLaMA-Factory's trainer and in ours, by its own collator."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from datasets import Dataset
from llamafactory.train.kto.trainer import CustomKTOTrainer as Theirs
from transformers import MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.llamafactory_runs import build, collator, kto_rows
from tests.models import tiny_tokenizer
from tests.test_llamafactory import assert_equal_runs
from tests.test_llamafactory_media import InPasses, cross_attention, two
from tests.vision_models import picture, tiny_processor


def with_images(folder: Path, tokens: list[int], *, without: tuple[int, ...] = ()) -> Dataset:
    """Rows with one or two images, each of these tokens, in front of what `kto_rows` has."""
    folder.mkdir()
    generator = random.Random(3)
    rows = []
    for index, row in enumerate(kto_rows(16)):
        number = 0 if index % 4 in without else 1 + index % 2
        for prefix in ("", "kl_"):
            for key, filler in (("input_ids", None), ("attention_mask", 1), ("labels", -100)):
                more = tokens if filler is None else [filler] * len(tokens)
                row[f"{prefix}{key}"] = more * number + row[f"{prefix}{key}"]
        paths = [folder / f"{index}-{image}.png" for image in range(number)]
        for path in paths:
            picture(generator, 32, 32).save(path)  # which LLaMA-Factory leaves as they are
        rows.append(row | {"images": [str(path) for path in paths]})
    return Dataset.from_list(rows)


def mllama_processor() -> Any:
    tokenizer = tiny_tokenizer()
    images = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=4)
    tokenizer.image_token, tokenizer.image_token_id = "<|image|>", 126
    tokenizer.chat_template = None
    return MllamaProcessor(images, tokenizer)


def run(family: str, folder: Path, **rows: Any) -> dict[str, Any]:
    if family == "mllama":
        policy, reference = cross_attention().models
        processor, tokens = mllama_processor(), [126, 51]
    else:
        (policy, reference), processor = two(family), tiny_processor(family)
        tokens = [50, *[policy.config.image_token_id] * 16, 51]
    data = with_images(folder / "images", tokens, **rows)
    batches = collator(family, processor, policy)
    return {"policy": policy, "reference": reference, "train_rows": data, "data_collator": batches}


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llava", {}),
        ("llava", {"without": (1,)}),
        ("llava", {"without": (0, 1, 2, 3)}),
        ("mllama", {}),
        ("mllama", {"without": (2,)}),
    ],
    ids=["images", "some", "none", "mllama", "mllama some"],
)
def test_equal_runs(tmp_path: Path, family: str, rows: dict[str, Any]) -> None:
    own = run(family, tmp_path, **rows)
    policy, reference = own.pop("policy"), own.pop("reference")
    logs = []
    for kind in (Theirs, InPasses):
        trainer = build(
            kind, tmp_path, policy, copy.deepcopy(reference), **own, eval_rows=own["train_rows"]
        )
        trainer.train()
        logs.append(trainer)
    assert_equal_runs(*logs)


def test_llamafactory_itself_fails_on_multimodal_positions(tmp_path: Path) -> None:
    """Its trainer leaves out `mm_token_type_ids`; ours works them out."""
    own = run("qwen2_vl", tmp_path)
    policy, reference = own.pop("policy"), own.pop("reference")
    with pytest.raises(ValueError, match="`mm_token_type_ids` is missing"):
        build(Theirs, tmp_path, policy, reference, **own).train()
    trainer = build(InPasses, tmp_path, policy, reference, **own)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and all(0 < loss < 1 for loss in losses)
