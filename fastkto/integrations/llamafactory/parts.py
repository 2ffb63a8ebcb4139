"""Where LLaMA-Factory's runs differ a little: in the model, the data, the reference, and rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import List, Value
from torch import nn

from fastkto.config import KTOConfig
from fastkto.reference import Reference
from fastkto.repeats import RepeatedRows
from fastkto.vision import media_tokens


def remove_upcast(policy: nn.Module) -> None:
    """Take off the hook of upcast_lmhead_output, which every call of the head would have to suit.

    Scores are formed in fp32 without it.
    """
    for module in policy.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "_fp32_forward_post_hook":
                del module._forward_hooks[key]


def trains_tower(policy: Any, finetuning_args: Any) -> bool:
    """Whether parts are trained that only rows with media use.

    Those of Mllama stand in its language model.
    """
    is_frozen = all(
        getattr(finetuning_args, f"freeze_{part}", True)
        for part in ("vision_tower", "multi_modal_projector")
    )
    return bool(media_tokens(policy)) and (not is_frozen or policy.config.model_type == "mllama")


def has_media(dataset: Any) -> bool:
    """Whether LLaMA-Factory's rows, or those of one of several sets, may have more than text."""
    if isinstance(dataset, dict):
        return any(has_media(part) for part in dataset.values())
    features = getattr(dataset, "features", None) or {}
    columns = (features.get(name) for name in ("images", "videos", "audios"))
    nothing = (None, Value("null"), List(Value("null")))
    return any(column not in nothing for column in columns)


def check_lengths_suffice(args: KTOConfig, name: str) -> None:
    """Refuse settings that are chosen from the rows' numbers of tokens alone."""
    for field in ("max_tokens_per_pass", "checkpoint_passes"):
        if getattr(args, field) == "auto":
            raise ValueError(
                f"{field} is 'auto', which measures passes of text, and the {name} data has "
                "images, videos or audios; choose another value"
            )


class PolicyItself(Reference):
    """The policy as its own reference, in evaluation."""

    @contextmanager
    def scoring(self, policy: Any) -> Iterator[nn.Module]:
        """Yield the policy as it is."""
        yield policy


class RowsWithoutNumbers(RepeatedRows):
    """Rows of a stream cannot be told from those that repeat them, so all of them count."""

    def _count_in_stream(self, batch: dict[str, Any]) -> int:
        return 0
