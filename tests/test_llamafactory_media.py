"""Images, videos and audios in LLaMA-Factory's batches."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.images import ImageCollator
from fastkto.data.media import TOKEN_INPUTS
from fastkto.integrations.llamafactory import CustomKTOTrainer
from fastkto.integrations.llamafactory.media import MediaReader
from tests.test_llamafactory_trainer import BETA, FIELDS, build, padded
from tests.vision_models import PLACEHOLDERS, image_rows, tiny_processor, tiny_vision_model


class InPasses(CustomKTOTrainer):
    options = {"max_tokens_per_pass": 60}


class ByLogits(CustomKTOTrainer):
    options = {"head": "logits"}


def with_images(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """LLaMA-Factory's batch of rows with images, with a hidden one if none of them has any."""
    encode = ImageCollator(processor, None).encode
    encoded = [encode({"row": index, **row}) for index, row in enumerate(rows)]
    media = [row["media"] for row in encoded]
    batch = padded(encoded)
    if not any(media):
        hidden = encode({"row": 0, **image_rows(1)[0]})
        media[0] = hidden["media"]
        batch = hide(batch, hidden["prompt_ids"])
    present = [one for one in media if one is not None]
    for name in present[0].inputs:
        batch[name] = torch.cat([one.inputs[name] for one in present])
    if "token_type_ids" in present[0].token_inputs:
        for prefix in ("", "kl_"):
            types = torch.zeros_like(batch[f"{prefix}input_ids"])
            for row, one in enumerate(media):
                if one is not None and encoded[row]["media"] is not None:
                    values = one.token_inputs["token_type_ids"]
                    types[row, : len(values)] = values
            batch[f"{prefix}token_type_ids"] = types
    batch["position_ids"] = torch.zeros(4, *batch["input_ids"].shape, dtype=torch.int64)
    batch["rope_deltas"] = torch.zeros(len(rows), 1)
    return batch


def hide(batch: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Tokens behind the padding of each row, those of the first being `ids`; masked everywhere."""
    batch = dict(batch)
    for prefix in ("", "kl_"):
        for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            value = batch[f"{prefix}{key}"]
            more = torch.full((len(value), len(ids)), filler)
            if key == "input_ids":
                more[0] = torch.tensor(ids)
            batch[f"{prefix}{key}"] = torch.cat([value, more], 1)
    return batch


def two(family: str) -> tuple[nn.Module, nn.Module]:
    return tiny_vision_model(family, seed=1), tiny_vision_model(family, seed=2)


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_it_trains_as_our_own_trainer(tmp_path: Path, family: str) -> None:
    # LLaVA-NeXT's processor pads images of different sizes to one, batch by batch
    rows = image_rows(8, sizes=family != "llava_next", without=(1,))
    assert_trains_alike(tmp_path, family, rows)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_an_image_that_stands_for_none_is_left_out(tmp_path: Path, family: str) -> None:
    assert_trains_alike(tmp_path, family, image_rows(8, without=(0, 1, 2, 3)))


def assert_trains_alike(folder: Path, family: str, rows: Any) -> None:
    processor, (model, reference) = tiny_processor(family), two(family)
    config = {"beta": BETA, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    ours = KTOTrainer(
        copy.deepcopy(model),
        copy.deepcopy(reference),
        KTOConfig(str(folder), gradient_checkpointing=False, max_length=None, **config, **FIELDS),
        train_dataset=rows,
        processing_class=processor,
    )
    collator = partial(with_images, processor)
    theirs = build(
        folder, InPasses, model=model, reference=reference, collator=collator, train_rows=rows
    )
    for trainer in (ours, theirs):
        trainer.train()
    for one, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "kl", "rewards/chosen", "logps/rejected"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


class Case(NamedTuple):
    """A batch, and what the model reads beside each of its rows alone."""

    models: tuple[nn.Module, nn.Module]
    batch: dict[str, Any]
    alone: list[dict[str, Tensor]]
    passes: int  # that its rows take if each is a pass


def texts(prompts: list[list[int]]) -> list[dict[str, Any]]:
    answers = [[20, 31, 42], [53, 64], [75, 86, 97, 9], [30]]
    rows = zip(prompts, answers, strict=False)
    return [{"prompt_ids": p, "completion_ids": a, "label": len(a) > 2} for p, a in rows]


def videos() -> Case:
    """None, one or two videos a row, and an image beside a video."""
    models = two("qwen2_5_vl")
    image, video = models[0].config.image_token_id, models[0].config.video_token_id
    grids = [[[2, 4, 4]], [], [[1, 2, 4], [1, 4, 4]], [[2, 2, 2]]]
    tokens = [[video] * 8, [], [video] * 2 + [50] + [video] * 4, [video] * 2 + [image]]
    prompts = [[7, *ids, 11] for ids in tokens]
    generator = torch.Generator().manual_seed(0)
    alone = []
    for prompt, grid in zip(prompts, grids, strict=True):
        media: dict[str, Tensor] = {}
        if grid:
            grid_thw = torch.tensor(grid)
            number = int(grid_thw.prod(-1).sum())
            pixels = torch.randn(number, 96, generator=generator)
            media = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw}
            media["second_per_grid_ts"] = torch.ones(len(grid))
        if image in prompt:
            media["pixel_values"] = torch.randn(4, 96, generator=generator)
            media["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        alone.append(media)
    names = dict.fromkeys(name for media in alone for name in media)
    batch = padded(texts(prompts))
    for name in names:
        batch[name] = torch.cat([media[name] for media in alone if name in media])
    batch["second_per_grid_ts"] = batch["second_per_grid_ts"].tolist()  # as LLaMA-Factory does
    for media, prompt in zip(alone, prompts, strict=True):
        ids = torch.tensor([prompt])
        media["mm_token_type_ids"] = (ids == image) + 2 * (ids == video)
    return Case(models, batch, alone, 4)


def audios() -> Case:
    """Clips of different lengths, which one forward has to tell apart."""
    audio_token, text = 120, {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tower = {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2}
    tower |= {"encoder_ffn_dim": 24, "d_model": 16, "max_source_positions": 12}
    config = AutoConfig.for_model(
        "qwen2_audio", text_config=text, audio_config=tower, audio_token_index=audio_token
    )
    models = tuple(random_model(config, seed) for seed in (1, 2))
    if models[0].base_model is models[0]:
        pytest.skip("this transformers' Qwen2Audio has its head inside another model")
    clips = [[24], [], [12, 20], [16]]
    generator = torch.Generator().manual_seed(0)
    features, masks, prompts, alone = [], [], [], []
    for frames in clips:
        own = torch.randn(len(frames), 8, 24, generator=generator)
        mask = (torch.arange(24) < torch.tensor(frames)[:, None]).long()
        tokens = [((number - 1) // 2 + 1 - 2) // 2 + 1 for number in frames]
        prompts.append([7, *(i for count in tokens for i in [*[audio_token] * count, 9]), 11])
        media = {"input_features": own, "feature_attention_mask": mask} if frames else {}
        features.append(own)
        masks.append(mask)
        alone.append(media)
    batch = padded(texts(prompts))
    batch |= {"input_features": torch.cat(features), "feature_attention_mask": torch.cat(masks)}
    return Case(models, batch, alone, 1)  # type: ignore[arg-type]


def cross_attention() -> Case:
    """Mllama: images that layers of their own attend to, with rows' padding of its own."""
    image_token = 126
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"cross_attention_layers": [1], "bos_token_id": 2, "eos_token_id": 1}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32}
    tower |= {"image_size": 8, "patch_size": 4, "intermediate_layers_indices": [0]}
    config = AutoConfig.for_model(
        "mllama", text_config=text, vision_config=tower, image_token_index=image_token
    )
    models = tuple(random_model(config, seed) for seed in (1, 2))
    prompts = [[image_token, 7, 11], [5, image_token, 9, image_token, 6], [8, 9], [image_token, 4]]
    batch = padded(texts(prompts))
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(4, 2, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        images[row, : prompt.count(image_token)] = 1
    shape = (4, 2, 4, 3, 8, 8)
    batch["pixel_values"] = torch.randn(shape, generator=generator) * images.view(4, 2, 1, 1, 1, 1)
    batch["aspect_ratio_ids"] = images
    tiles = torch.zeros(4, 2, 4, dtype=torch.int64)
    tiles[:, :, 0] = 1
    batch["aspect_ratio_mask"] = tiles
    alone = []
    for prefix in ("", "kl_"):
        length = batch[f"{prefix}input_ids"].shape[1]
        mask = torch.zeros(4, length, 2, 4, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            places = [i for i, token in enumerate(prompt) if token == image_token]
            for number, start in enumerate(places):
                end = places[number + 1] if number + 1 < len(places) else length
                mask[row, start:end, number, 0] = 1
        batch[f"{prefix}cross_attention_mask"] = mask
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    for row in range(4):
        media = {name: batch[name][row : row + 1] for name in names}
        media["cross_attention_mask"] = media["cross_attention_mask"][:, : len(prompts[row])]
        alone.append(media)
    return Case(models, batch, alone, 4)  # type: ignore[arg-type]


def random_model(config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        is_audio = config.model_type == "qwen2_audio"
        if is_audio:
            from transformers import Qwen2AudioForConditionalGeneration as Model
        else:
            Model = AutoModelForImageTextToText
        model = Model._from_config(config) if is_audio else Model.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def logprob_alone(model: nn.Module, case: Case, row: int, prefix: str) -> float:
    """By the model's own logits of that row, without padding."""
    batch = case.batch
    real = batch[f"{prefix}attention_mask"][row].bool()
    ids, labels = (batch[f"{prefix}{name}"][row][real] for name in ("input_ids", "labels"))
    media = dict(case.alone[row])
    for name in TOKEN_INPUTS:
        if name in media:
            values = media[name]
            missing = len(ids) - values.shape[1]
            behind = values[:, -1:] if name == "cross_attention_mask" else 0 * values[:, -1:]
            media[name] = torch.cat([values, *[behind] * missing], 1)
    with torch.no_grad():
        logits = model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)).long(), **media)
    logprob = logits.logits[0, :-1].double().log_softmax(-1)
    scored = labels[1:] != -100
    return float(logprob.gather(1, ids[1:, None])[:, 0][scored].sum())


@pytest.mark.parametrize("make", [videos, audios, cross_attention])
def test_scores_are_those_of_each_row_alone(tmp_path: Path, make: Any, caplog: Any) -> None:
    case = make()
    policy, reference = (copy.deepcopy(model) for model in case.models)
    expected = {
        prefix: [
            [logprob_alone(model, case, row, prefix) for row in range(4)] for model in case.models
        ]
        for prefix in ("", "kl_")
    }
    by_passes: list[list[float]] = []
    for kind in (InPasses, ByLogits):
        options = {**kind.options, "max_tokens_per_pass": 1}
        trainer = build(
            tmp_path,
            type("Own", (kind,), {"options": options}),
            model=copy.deepcopy(policy),
            reference=copy.deepcopy(reference),
            collator=lambda _: case.batch,
            max_steps=1,
        )
        for prefix in ("", "kl_"):
            logprob = trainer.forward(trainer.model, case.batch, prefix)[1]
            assert logprob.tolist() == pytest.approx(expected[prefix][0], abs=1e-4)
        (loss,) = trainer._score([trainer._prepare_inputs(case.batch)])
        by_passes.append(loss.reference_logprob.tolist())
        assert by_passes[-1] == pytest.approx(expected[""][1], abs=1e-4)
        assert len(loss.plan) == case.passes
        first, _ = trainer.get_batch_loss_metrics(trainer.model, case.batch)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(first.item(), rel=1e-4)
    cut = [len(set(values)) for values in expected[""]]
    assert min(cut) == 4
    assert ("each batch is one pass" in caplog.text) == (case.passes == 1)


def test_a_model_without_types_gets_none() -> None:
    llava, qwen = (MediaReader.of(tiny_vision_model(family)) for family in ("llava", "qwen2_vl"))
    assert "mm_token_type_ids" not in llava.parameters
    batch = with_images(tiny_processor("qwen2_vl"), list(image_rows(2)))
    read = qwen.read(batch, "kl_")
    assert set(read) == {"pixel_values", "image_grid_thw", "mm_token_type_ids"}
    assert read["mm_token_type_ids"].equal((batch["kl_input_ids"] == qwen.tokens["image"]).long())
    experts = MediaReader(qwen.tokens, qwen.parameters | {"moe_mm_token_type_ids"})
    with pytest.raises(ValueError, match="chooses experts by moe_mm_token_type_ids"):
        experts.read(batch)
    with pytest.raises(ValueError, match="the batch has pixel_values, a list that is no tensor"):
        llava.read({**batch, "pixel_values": [torch.ones(2), torch.ones(3)]})


def test_auto_settings_are_refused_with_images(tmp_path: Path) -> None:
    kind = type("Own", (CustomKTOTrainer,), {"options": {"max_tokens_per_pass": "auto"}})
    model, reference = two("llava")
    with pytest.raises(ValueError, match="'auto', which measures passes of text, and the train"):
        build(tmp_path, kind, model=model, reference=reference, train_rows=image_rows(4))
