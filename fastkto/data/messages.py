"""Conversations with images: messages in blocks, and the text that a chat template makes of them.

Both as TRL 1.16 does, so that the same rows give the same tokens.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import ProcessorMixin

Messages = list[dict[str, Any]]


def in_blocks(messages: Messages) -> Messages:
    """Messages with contents in lists of blocks, as the chat templates of processors read them."""
    return [
        {**message, "content": [_text(message["content"])]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def with_images(messages: Messages, images: list[Any]) -> Messages:
    """A prompt's messages in blocks, with its images at their places.

    Those are blocks `{"type": "image"}`; if the user's first message is text, its images come
    before that text. Raises ValueError if there are more or fewer places than images.
    """
    first = next((m for m in messages if m["role"] == "user"), None)
    prepared = in_blocks(messages)
    if first is not None and isinstance(first.get("content"), str):
        index = messages.index(first)
        places = [{"type": "image"} for _ in images]
        prepared[index] = {**first, "content": [*places, _text(first["content"])]}
    left = list(images)
    filled = []
    for message in prepared:
        if not isinstance(message.get("content"), list) or message["role"] == "tool":
            filled.append(message)
            continue
        blocks = []
        for block in message["content"]:
            if block.get("type") == "image" and block.get("image") is None:
                if not left:
                    raise ValueError(f"its messages have more than {len(images)} image blocks")
                block = {**block, "image": left.pop(0)}
            blocks.append(block)
        filled.append({**message, "content": blocks})
    if left:
        raise ValueError(f"its messages have {len(images) - len(left)} image blocks")
    return filled


def render(
    processor: ProcessorMixin, prompt: Messages, completion: Messages, arguments: dict[str, Any]
) -> tuple[str, str]:
    """The text of a prompt and that of its completion.

    They part where the text of the prompt alone and that of the whole conversation do.
    """
    last = prompt[-1]["role"]
    if last not in ("user", "tool", "assistant"):
        raise ValueError(f"its prompt ends with a message of the role {last!r}")
    alone = processor.apply_chat_template(
        prompt,
        tokenize=False,
        add_generation_prompt=last != "assistant",
        continue_final_message=last == "assistant",
        **arguments,
    )
    whole = processor.apply_chat_template(
        [*prompt, *in_blocks(completion)], tokenize=False, **arguments
    )
    edge = len(os.path.commonprefix([alone, whole]))
    return whole[:edge], whole[edge:]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
