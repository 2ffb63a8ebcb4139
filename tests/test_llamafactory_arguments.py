"""What the integration with LLaMA-Factory does without LLaMA-Factory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from fastkto import KTOConfig
from fastkto.cli import main
from fastkto.integrations.llamafactory.arguments import OPTIONS, check_options, kto_arguments
from fastkto.integrations.llamafactory.batches import check_keys, to_ragged
from fastkto.integrations.llamafactory.logs import log_values
from fastkto.integrations.llamafactory.media import MediaReader


@dataclass
class OwnArguments(Seq2SeqTrainingArguments):
    """Arguments with a field and a method of the user's own."""

    my_field: int = 3

    def doubled(self) -> int:
        return 2 * self.my_field


def finetuning(**changes: Any) -> SimpleNamespace:
    values = {"pref_beta": 0.3, "kto_chosen_weight": 2.0, "kto_rejected_weight": 0.5}
    return SimpleNamespace(**{**values, "disable_shuffling": False, **changes})


def arguments(folder: Path, kind: Any = OwnArguments, **options: Any) -> Any:
    given = kind(output_dir=str(folder), learning_rate=0.25, use_cpu=True, report_to="none")
    return given, kto_arguments(given, finetuning(), disable_dropout=False, options=options)


def test_given_arguments_stay_and_gain_ours(tmp_path: Path) -> None:
    given, args = arguments(tmp_path, max_tokens_per_pass=77)
    assert isinstance(args, KTOConfig) and isinstance(args, OwnArguments)
    assert args.doubled() == 6 and args.learning_rate == 0.25
    assert (args.beta, args.desirable_weight, args.undesirable_weight) == (0.3, 2.0, 0.5)
    assert args.grad_tokens == 77 and args.max_length is None and not args.disable_dropout
    assert args.router_aux_loss_coef == 0.0 and not args.remove_unused_columns
    changed = {"remove_unused_columns"}
    for name in {one.name for one in fields(given)} - changed:
        assert getattr(args, name) == getattr(given, name), name
    assert given.remove_unused_columns, "the given arguments were changed"
    assert args.to_dict()["my_field"] == 3 and args.to_dict()["max_tokens_per_pass"] == 77


def test_every_option_is_a_field() -> None:
    assert set(OPTIONS) <= {one.name for one in fields(KTOConfig)}
    assert not set(OPTIONS) & {one.name for one in fields(TrainingArguments)}


@pytest.mark.parametrize("kind", [TrainingArguments, OwnArguments, KTOConfig])
def test_arguments_survive_a_checkpoint(tmp_path: Path, kind: Any) -> None:
    """`Trainer` pickles them with each checkpoint."""
    _, args = arguments(tmp_path, kind, head="logits")
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for other in (loaded, copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert type(other) is type(args) and other.to_dict() == args.to_dict()
        assert other.head == "logits" and not other.needs_partners


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.2}, "fastkto has beta, which LLaMA-Factory has itself; use pref_beta"),
        ({"max_lenght": 2}, "fastkto has no field 'max_lenght' here; it has loss_type, kl_scope"),
        ([1], "fastkto is \\[1\\]; give it fields"),
    ],
)
def test_wrong_options_say_what_to_do(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(options)


def test_wrong_values_are_those_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head is 'tail'; choose from"):
        arguments(tmp_path, head="tail")


def batch(**changes: Any) -> dict[str, Any]:
    tokens = torch.tensor([[5, 6, 7], [5, 8, 0]])
    part = {
        "input_ids": tokens,
        "attention_mask": (tokens > 0).long(),
        "labels": torch.tensor([[-100, 6, 7], [-100, 8, -100]]),
    }
    part |= {f"kl_{key}": value for key, value in part.items()}
    return {**part, "kto_tags": torch.tensor([True, False]), **changes}


def test_missing_parts_are_named() -> None:
    with pytest.raises(ValueError, match="the batch has no kl_labels; use LLaMA-Factory's"):
        check_keys(batch(kl_labels=None))


def test_a_ragged_batch_counts_its_desirable_rows() -> None:
    ragged = to_ragged(batch(), MediaReader({}, frozenset()))
    assert ragged["num_desirable"] == 1 and ragged["input_ids"].tolist() == [5, 6, 7, 5, 8]


def test_logs_are_averages_over_rows() -> None:
    """Not over micro-batches, and a class that one of them lacks takes nothing from the others."""
    values = log_values(
        [
            {"kl": 1.0, "rewards/chosen_sum": 6.0, "count/chosen": 3.0, "own": 2.0},
            {"kl": 3.0, "rewards/chosen_sum": 2.0, "count/chosen": 1.0, "rewards/rejected_sum": 5.0,
             "count/rejected": 5.0},
        ]
    )  # fmt: skip
    assert values == {
        "rewards/chosen": 2.0,
        "rewards/rejected": 1.0,
        "rewards/margins": 1.0,
        "kl": 2.0,
        "own": 2.0,
    }


def test_logits_are_averages_over_tokens_where_they_are_counted() -> None:
    sums = {"logits/chosen_sum": 12.0, "count/chosen": 2.0}
    assert log_values([sums]) == {"logits/chosen": 6.0}
    assert log_values([sums | {"count/chosen_tokens": 4.0}]) == {"logits/chosen": 3.0}


def test_the_integration_does_not_import_llama_factory() -> None:
    code = (
        "import sys, fastkto.integrations.llamafactory as one; one.CustomKTOTrainer; "
        "sys.exit('llamafactory' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_says_what_it_takes(capsys: Any) -> None:
    assert main(["llamafactory", "--help"]) == 0
    assert "fastkto llamafactory train FILE" in capsys.readouterr().out
    assert main(["llamafactory", "chat"]) == 2
    assert "use fastkto llamafactory train FILE" in capsys.readouterr().err
    if find_spec("llamafactory"):
        return  # it is installed, so nothing is missing
    assert main(["llamafactory", "train", "run.yaml"]) == 2
    assert "pip install llamafactory==0.9.5" in capsys.readouterr().err
