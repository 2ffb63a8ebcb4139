"""The README.md beside a trained model, in the Hugging Face hub's format."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

import fastkto

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer

_TEXT = """---
{data}
---

# {name}

{origin} It was trained with KTO, introduced in \
[KTO: Model Alignment as Prospect Theoretic Optimization]\
(https://huggingface.co/papers/2402.01306), by fastkto {fastkto}.

## Quick start

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{id}")
print(generator("The best thing about long contexts is", max_new_tokens=64)[0]["generated_text"])
```

## Training

| setting | value |
|---|---|
{settings}

Versions: transformers {transformers}, torch {torch}, peft {peft}, datasets {datasets}.

## Citation

```bibtex
@article{{ethayarajh2024kto,
    title  = {{{{KTO: Model Alignment as Prospect Theoretic Optimization}}}},
    author = {{Kawin Ethayarajh and Winnie Xu and Niklas Muennighoff and Dan Jurafsky and \
Douwe Kiela}},
    year   = 2024,
    eprint = {{arXiv:2402.01306}},
}}
```
"""


def model_card(
    trainer: KTOTrainer, name: str, dataset_name: str | None, tags: list[str]
) -> ModelCard:
    """What a run is known by: its base model, data, loss, reference and versions."""
    # A folder of this machine means nothing to whoever reads it.
    path = trainer.model.config._name_or_path
    base_model = None if not path or os.path.isdir(path) else path
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        model_name=name,
        tags=sorted({"generated_from_trainer", "fastkto", "kto", *tags}),
    )
    model_type = trainer.model.config.model_type
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else model_type
    on = f" on [{dataset_name}](https://huggingface.co/datasets/{dataset_name})"
    on = on if dataset_name else ""
    packages = ("transformers", "torch", "peft", "datasets")
    return ModelCard(
        _TEXT.format(
            data=data.to_yaml(),
            name=name,
            id=trainer.hub_model_id or name,
            origin=f"A fine-tuned version of {of}{on}.",
            settings="\n".join(f"| {key} | {value} |" for key, value in _settings(trainer)),
            fastkto=fastkto.__version__,  # also where it is on the path and not installed
            **{package: version(package) for package in packages},
        ),
        ignore_metadata_errors=True,
    )


def write_model_card(
    trainer: KTOTrainer, name: str | None, dataset_name: str | None, tags: list[str]
) -> None:
    """Write it to README.md in the run's output folder."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    card = model_card(trainer, name or folder.name, dataset_name, tags)
    card.save(folder / "README.md")


def _settings(trainer: KTOTrainer) -> list[tuple[str, object]]:
    args = trainer.args
    batch = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = [
        (f"rows, {name}", f"{report.desirable} desirable, {report.undesirable} undesirable")
        for name, report in trainer.row_reports.items()
    ]
    names = (
        "loss_type", "beta", "desirable_weight", "undesirable_weight", "learning_rate",
        "max_length", "kl_scope", "kl_pairing",
    )  # fmt: skip
    return [
        ("reference", trainer.reference.description),
        *rows,
        *((name, getattr(args, name)) for name in names),
        ("rows in a step", batch),
        ("steps", trainer.state.global_step),
    ]
