"""Tiny vision-language models with their processors, and rows of small images, without a download.

Weights are large enough that an image changes log-probabilities visibly.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models import tiny_tokenizer
from tests.trl_runs import words

VOCAB_SIZE = 128
PLACEHOLDERS = {"qwen2_vl": "<|image_pad|>", "llava": "<image>", "gemma3": "<boi>"}
PLACEHOLDERS |= {"qwen2_5_vl": "<|image_pad|>", "llava_next": "<image>"}
# LLaVA-NeXT's images take numbers of tokens that a batch does not tell.
CUT_FAMILIES = tuple(family for family in PLACEHOLDERS if family != "llava_next")

_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<image>", "<boi>", "<eoi>", "<|vs|>", "<|ve|>"]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}PLACEHOLDER{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


class ImageOnlyQwenProcessor(Qwen2VLProcessor):
    """Qwen2-VL's without its video processor, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_processor(family: str) -> ProcessorMixin:
    """The real processor of a family, for images of about 16 x 16 pixels."""
    tokenizer = tiny_tokenizer()
    template = _TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[family])
    tokenizer.chat_template = None
    tokenizer.add_tokens(_TOKENS, special_tokens=True)
    if family.startswith("qwen2"):
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024
        )
        return ImageOnlyQwenProcessor(images, tokenizer, chat_template=template)
    if family.startswith("llava"):
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        is_next = family == "llava_next"
        images = (
            LlavaNextImageProcessorPil(image_grid_pinpoints=_PINPOINTS, **size)
            if is_next
            else CLIPImageProcessorPil(**size)
        )
        return (LlavaNextProcessor if is_next else LlavaProcessor)(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    for name, token in (("image", "<image>"), ("boi", "<boi>"), ("eoi", "<eoi>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def tiny_vision_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of `family` in train mode, the same for the same `seed`, on the CPU."""
    token = tiny_processor(family).tokenizer.convert_tokens_to_ids
    text, tower = dict(_TEXT), dict(_TOWER)
    fields: dict[str, Any] = {"text_config": text, "vision_config": tower}
    if family.startswith("qwen2"):
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        }
        fields |= {"image_token_id": token("<|image_pad|>")}
        fields |= {"video_token_id": token("<|video_pad|>")}
        fields |= {"vision_start_token_id": token("<|vs|>")}
        fields |= {"vision_end_token_id": token("<|ve|>")}
        if family == "qwen2_vl":
            tower |= {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2}
            tower |= {"mlp_ratio": 2}
        else:
            tower |= {"out_hidden_size": 32, "depth": 2, "num_heads": 2, "window_size": 16}
            tower |= {"fullatt_block_indexes": [1]}
        tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    elif family.startswith("llava"):
        text["model_type"], tower["model_type"] = "llama", "clip_vision_model"
        fields |= {"image_token_id": token("<image>"), "vision_feature_layer": -1}
        fields |= {"image_token_index": token("<image>")}
        if family == "llava_next":
            fields["image_grid_pinpoints"] = _PINPOINTS
    else:
        text |= {"query_pre_attn_scalar": 8, "sliding_window": 8}
        text |= {"layer_types": ["sliding_attention", "full_attention"]}
        fields |= {"mm_tokens_per_image": 4, "image_token_id": token("<image>")}
        fields |= {"image_token_index": token("<image>")}
        fields |= {"boi_token_index": token("<boi>"), "eoi_token_index": token("<eoi>")}
    config = AutoConfig.for_model(family, **fields, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():  # neutral values hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def picture(generator: random.Random, height: int = 16, width: int = 16) -> PILImage.Image:
    pixels = np.random.default_rng(generator.randrange(2**31)).integers(0, 256, (height, width, 3))
    return PILImage.fromarray(pixels.astype(np.uint8))


def image_rows(
    count: int = 16, seed: int = 0, *, sizes: bool = False, without: tuple[int, ...] = ()
) -> Dataset:
    """Conversations with an image or two each; `sizes`: of different sizes; `without`: no image."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        number = 0 if index % 4 in without else 1 + (index % 3 == 1)
        shape = (8 * generator.randint(1, 3), 8 * generator.randint(1, 4)) if sizes else (16, 16)
        blocks = [{"type": "image", "text": None}, {"type": "text", "text": " and "}]
        blocks = [block for _ in range(number) for block in blocks]
        text = {"type": "text", "text": words(generator, 1, 8)}
        rows.append(
            {
                "images": [picture(generator, *shape) for _ in range(number)],
                "prompt": [{"role": "user", "content": [*blocks, text]}],
                "completion": [
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": words(generator, 1, 10)}],
                    }
                ],
                "label": generator.random() < 0.5,
            }
        )
    blocks_type = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": blocks_type})
    features = {"images": List(Image()), "prompt": messages, "completion": messages}
    return Dataset.from_list(rows, features=Features({**features, "label": Value("bool")}))
