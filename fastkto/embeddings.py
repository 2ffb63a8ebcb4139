"""How many different tokens a model has embeddings for."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper


def vocabulary(model: Any) -> int | None:
    """How many tokens the model has an embedding for, None if it does not say."""
    size: int | None = getattr(
        without_adapter(model.get_input_embeddings()), "num_embeddings", None
    )
    return size


def smallest_vocabulary(*models: Any) -> int | None:
    """The least `vocabulary` of those models that are not None."""
    sizes = [vocabulary(model) for model in models if model is not None]
    return min((size for size in sizes if size is not None), default=None)


def without_adapter(module: Any) -> Any:
    """A model's own layer, which peft may have put another around."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module
