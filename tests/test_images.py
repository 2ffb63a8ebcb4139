"""Rows with images as tokens and model inputs, and how they are grouped into passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Image, List
from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference

from fastkto import KTOConfig
from fastkto.data.batch import (
    TokenSequence,
    check_batch,
    given_mismatched,
    matched_sequences,
    mismatched_sequences,
    prompt_key,
)
from fastkto.data.cut_media import cut_media
from fastkto.data.images import ImageCollator
from fastkto.data.media import Media, join_media
from fastkto.data.padded import from_padded
from fastkto.data.prepare import prepare_data
from fastkto.data.rows import RowReport
from fastkto.passes import build_pass
from fastkto.plan_passes import Layout, plan_passes
from fastkto.vision import media_tokens
from tests.models import tiny_tokenizer
from tests.vision_models import CUT_FAMILIES, image_rows, tiny_processor, tiny_vision_model


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return [{"row": index, **dataset[index]} for index in range(len(dataset))]


def assert_same(one: TokenSequence, other: TokenSequence) -> None:
    assert one.prompt.equal(other.prompt) and one.completion.equal(other.completion)
    assert (one.media is None) == (other.media is None)
    if one.media is None or other.media is None:
        return
    for part in ("inputs", "token_inputs"):
        values, others = getattr(one.media, part), getattr(other.media, part)
        assert values.keys() == others.keys()
        assert all(value.equal(others[name]) for name, value in values.items())


@pytest.mark.parametrize("family", CUT_FAMILIES)
def test_sequences_are_trls(family: str) -> None:
    """Tokens and images, also of the mismatched sequences, row by row."""
    processor = tiny_processor(family)
    rows = rows_of(image_rows(4, sizes=True, without=(2,)))
    ours = ImageCollator(processor, 70)(rows)
    check_batch(ours, 70)
    partners = [matched_sequences(ours, None)[index - 1].completion for index in range(4)]
    mismatched = mismatched_sequences(ours, partners, 70)
    padded = DataCollatorForVisionUnpairedPreference(processor, max_length=70)(rows)
    theirs = from_padded(padded, media_tokens=media_tokens(tiny_vision_model(family)))
    check_batch(theirs, 70)
    given = given_mismatched(theirs, 70)
    assert given is not None
    pairs = [*zip(matched_sequences(ours, 70), matched_sequences(theirs, 70), strict=True)]
    pairs += [*zip(mismatched, given, strict=True)]
    for one, other in pairs:
        assert one is not None
        assert_same(one, other)
        assert one.prompt_key == other.prompt_key
    assert sum(one.media is not None for one, _ in pairs) == 6


def test_numbers_of_a_completions_tokens_are_refused() -> None:
    """PaliGemma's say where its prompt ends, and passes would lose them."""
    processor = tiny_processor("gemma3")
    padded = DataCollatorForVisionUnpairedPreference(processor)(rows_of(image_rows(2)))
    padded["token_type_ids"][:, -1] = 1
    with pytest.raises(ValueError, match=r"row \d has token_type_ids other than 0 behind its prom"):
        from_padded(padded, media_tokens={"image": 1})


def test_images_stay_on_the_cpu_when_their_batch_moves() -> None:
    batch = ImageCollator(tiny_processor("llava"), None)(rows_of(image_rows(2)))
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["input_ids"].device.type == "meta"
    assert moved["media"][0].inputs["pixel_values"].equal(batch["media"][0].inputs["pixel_values"])


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ([None], "media is 1 entries for 2 rows"),
        ([None, {}], "entry 1 of media is a dict"),
        ([None, Media({}, {"token_type_ids": torch.ones(1)})], r"has the shape \(1,\)"),
    ],
)
def test_another_collators_media_is_checked(media: Any, message: str) -> None:
    batch = ImageCollator(tiny_processor("llava"), None)(rows_of(image_rows(2)))
    with pytest.raises(ValueError, match=message):
        check_batch({**batch, "media": media}, None)


def test_equal_prompts_with_different_images_have_different_keys() -> None:
    (row,) = rows_of(image_rows(1))
    other = {**row, "images": [row["images"][0].rotate(90)]}
    batch = ImageCollator(tiny_processor("llava"), None)([row, other, row])
    first, second, third = batch["prompt_keys"]
    assert first == third != second
    ids = matched_sequences(batch, None)[0].prompt.tolist()
    assert prompt_key(ids) not in (first, second)


def test_text_prompts_and_one_image_a_row() -> None:
    image = image_rows(1)[0]["images"][0]
    rows = [
        {"row": 0, "image": image, "prompt": "<image>the", "completion": " rain", "label": 1},
        {"row": 1, "image": None, "prompt": "the", "completion": " rain", "label": "false"},
    ]
    batch = ImageCollator(tiny_processor("llava"), None)(rows)
    assert batch["label"].tolist() == [True, False]
    with_image, without = matched_sequences(batch, None)
    assert with_image.media is not None and without.media is None
    assert len(with_image.prompt) == 16 + len(without.prompt)
    assert with_image.completion.equal(without.completion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "row 7 with 0 images .* more than 0 image blocks"),
        ({"prompt": "the", "completion": "a"}, "row 7 with 1 images .* LlavaProc"),
        ({"completion": "<image>", "prompt": "<image>"}, "row 7 .* no images were passed"),
        ({"images": [], "prompt": "<image>", "completion": "a"}, "row 7 .* no images were passed"),
        ({"completion": "", "prompt": "<image>"}, "row 7 has a completion without tokens"),
        ({"label": "maybe"}, "row 7 has the label 'maybe'"),
        ({"images": ["no such file"]}, "row 7 with 1 images cannot be processed by LlavaProc"),
    ],
)
def test_rows_that_cannot_be_used_are_named(change: dict[str, Any], message: str) -> None:
    row = {**image_rows(1)[0], "row": 7, **change}
    with pytest.raises(ValueError, match=message):
        ImageCollator(tiny_processor("llava"), None)([row])


def test_a_prompt_that_fills_max_length_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"row 0 has a prompt of \d+ tokens, with those of 1 images"
    ):
        ImageCollator(tiny_processor("llava"), 20)(rows_of(image_rows(1)))


def prepare(dataset: Any, **config: Any) -> Any:
    args = KTOConfig("unused", use_cpu=True, report_to="none", **config)
    return prepare_data(dataset, "train", tiny_processor("llava"), args)


def test_data_sets_are_numbered_and_text_is_checked_at_once() -> None:
    dataset = image_rows(4)
    prepared, reports = prepare(dataset)
    assert prepared["row"] == [0, 1, 2, 3] and reports["train"].rows == 4
    named = dataset.add_column("row", ["a", "b", "c", "d"])
    assert prepare(named)[0]["row"] == [0, 1, 2, 3]
    kept = dataset.add_column("row", [5, 6, 7, 8])
    assert prepare(kept)[0]["row"] == [5, 6, 7, 8]
    stream, _ = prepare(dataset.to_iterable_dataset(), max_length=None)
    assert [row["row"] for row in stream] == [0, 1, 2, 3]
    assert next(iter(stream))["images"][0].size == (16, 16)
    broken = dataset.map(
        lambda row, index: {"completion": [] if index == 2 else None}, with_indices=True
    )
    with pytest.raises(
        ValueError, match=r"an empty completion: row 2.*no completion|no completion"
    ):
        prepare(broken)


def test_an_image_that_cannot_be_read_is_named() -> None:
    """Where every image is looked at before the first step, and where a collator decodes."""
    rows = image_rows(6)
    broken = rows.cast_column("images", List(Image(decode=False))).to_list()
    broken[4]["images"][0]["bytes"] = b"no picture"
    dataset = Dataset.from_list(broken, features=rows.features)
    message = "row 4 has an image that cannot be read .* replace it, or leave the row out"
    with pytest.raises(ValueError, match=message):
        prepare(dataset, max_length=200)
    encoded, _ = prepare(rows_of_bytes := Dataset.from_list(broken), max_length=None)
    assert "bytes" in rows_of_bytes[0]["images"][0]
    with pytest.raises(ValueError, match=message):
        ImageCollator(tiny_processor("llava"), None)([encoded[3], encoded[4]])


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_rows_whose_prompt_fills_max_length_are_dropped(family: str) -> None:
    """With their images, which only a processor can count; a stream's count comes with its rows."""
    processor = tiny_processor(family)
    dataset = image_rows(12, sizes=True)
    encoded = [ImageCollator(processor, None).encode(row) for row in rows_of(dataset)]
    prompts = [len(row["prompt_ids"]) for row in encoded]
    full = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in encoded]
    limit = sorted(prompts)[8]
    kept = [row for row, length in enumerate(prompts) if length < limit]
    assert 4 < len(kept) < 10
    args = KTOConfig("unused", use_cpu=True, report_to="none", max_length=limit)
    rows, reports = prepare_data(dataset, "train", processor, args)
    assert rows["row"] == kept
    labels = [dataset[row]["label"] for row in kept]
    assert reports["train"] == RowReport(
        "train",
        read=12,
        desirable=sum(labels),
        undesirable=len(kept) - sum(labels),
        dropped=12 - len(kept),
        cut=sum(full[row] > limit for row in kept),
        merged=0,
        longest=min(limit, max(full[row] for row in kept)),
        max_length=limit,
    )
    stream, _ = prepare_data(dataset.to_iterable_dataset(), "train", processor, args)
    collator = ImageCollator(processor, limit)
    again, _ = prepare_data(stream, "train", processor, args)
    assert again is stream
    streamed = list(stream)
    behind = 11 - kept[-1]
    assert sum(collator(streamed)["dropped_rows"]) == 12 - len(kept) - behind
    for one, other in zip(rows, streamed, strict=True):
        expected = matched_sequences(collator([one]), limit)[0]
        assert_same(matched_sequences(collator([other]), limit)[0], expected)
    untouched, reports = prepare_data(dataset, "train", processor, args, reads_images=False)
    assert len(untouched) == 12 and not reports
    with pytest.raises(ValueError, match="all 12 rows of the train data are too long"):
        prepare(dataset, max_length=4)


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        (("chosen", "rejected"), {}, "has images and pairs of answers.*unpair_preference_dataset"),
        ((), {"train_sampling_strategy": "group_by_length"}, "is 'group_by_length', which needs"),
        ((), {"truncation_mode": "keep_end"}, "truncation_mode is 'keep_end', which would cut"),
        ((), {"kl_pairing": "dataset"}, "kl_pairing is 'dataset', and the rows of the train data"),
        ((), {"max_tokens_per_pass": "auto"}, "max_tokens_per_pass is 'auto', which needs"),
    ],
)
def test_what_images_leave_no_way_for_is_refused(
    columns: tuple[str, ...], config: dict[str, Any], message: str
) -> None:
    dataset = image_rows(2)
    for column in columns:
        dataset = dataset.add_column(column, dataset["completion"])
    with pytest.raises(ValueError, match=message):
        prepare(dataset, **config)


def test_images_need_a_processor() -> None:
    args = KTOConfig("unused", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="pass the processor of a vision-language model"):
        prepare_data(image_rows(2), "train", tiny_tokenizer(), args)


def sequence(length: int, size: int | None) -> TokenSequence:
    tokens = torch.arange(length)
    numbers = {"token_type_ids": torch.ones(2, dtype=torch.int64)}
    media = None if size is None else Media({"pixel_values": torch.ones(1, size)}, numbers)
    return TokenSequence(tokens[:2], tokens[2:], 0, media)


def test_only_images_of_one_shape_share_a_pass() -> None:
    sequences = [sequence(*one) for one in [(9, 4), (9, None), (9, 5), (9, 4), (9, None)]]
    plan = plan_passes(sequences, 18, Layout.PACKED, share_prompts=True)
    assert sorted(sorted(sum(groups, [])) for groups in plan) == [[0, 3], [1, 4], [2]]
    assert plan_passes(sequences, 17, Layout.PADDED).count([[0]]) == 1
    pass_ = build_pass(sequences, [[0], [3]], Layout.PACKED)
    assert pass_.segments is None and pass_.media is not None
    assert pass_.media["pixel_values"].shape == (2, 4)
    assert pass_.media["token_type_ids"].tolist() == [[1, 1] + [0] * 7] * 2
    moved = join_media([sequences[0].media], 9, torch.device("meta"))
    assert {value.device.type for value in moved.values()} == {"meta"}
    with pytest.raises(ValueError, match=r"pixel_values of the rows of one pass have the shapes"):
        join_media([sequences[0].media, sequences[2].media], 9, torch.device("cpu"))


@pytest.mark.parametrize(
    ("prompts", "images", "grid", "expected"),
    [
        ([[7, 7, 1], [2], [7, 7, 7, 7]], 3, None, [[0], None, [1, 2]]),
        ([[7, 7], [2], [7, 7]], 2, "sizes", None),  # of different sizes with as many tokens
        ([[7, 7, 7], [7, 7]], 2, None, None),  # images of different sizes
        ([[7, 7, 7], [7]], 2, [[1, 2, 6], [1, 2, 2]], [[*range(12)], [*range(12, 16)]]),
        ([[7, 7], [7, 7]], 2, [[1, 2, 6], [1, 2, 2]], None),  # the first one's tokens are cut off
    ],
)
def test_images_are_given_to_the_rows_whose_tokens_they_fill(
    prompts: list[list[int]], images: int, grid: Any, expected: Any
) -> None:
    inputs = {"pixel_values": torch.arange(images)}
    if grid == "sizes":
        inputs["image_sizes"] = torch.tensor([[4, 8], [8, 4]])
    elif grid is not None:
        inputs = {"image_grid_thw": torch.tensor(grid), "pixel_values": torch.arange(16)}
    cut = cut_media(prompts, inputs, {}, {"image": 7})
    if expected is None:
        assert len({row.whole for row in cut if row is not None} - {None}) == 1
        return
    assert [row and row.inputs["pixel_values"].tolist() for row in cut] == expected
