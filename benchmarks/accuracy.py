"""How far fastkto and its peers are from fp64 with bf16 inputs.

    python -m benchmarks.accuracy --output docs

writes `accuracy.md`, in a few minutes on a CPU. fastkto's products are fp32 there, so the 16-bit
tiles of a GPU are emulated as well.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.accuracy_cases import (
    FULL_SIZE,
    REGIMES,
    Accuracy,
    Regime,
    Size,
    every,
    make_regime,
    measure_accuracy,
)
from benchmarks.head_cases import DEVICE
from benchmarks.head_contenders import MAKERS, make_contenders
from benchmarks.head_truth import compute_exactly
from benchmarks.machine import device_name, installed_versions
from tests.precision import tiles_of_16_bits

EMULATED = "fastkto, 16-bit tiles emulated"
# Its result is that of full logits, as far as the compiler keeps the order of operations.
LEFT_OUT = "compiled full logits"
_ABOUT = (
    "bf16 hidden states and weight, N = {tokens:,}, D = {hidden:,}, V = {vocabulary:,}; the truth "
    "is fp64 on the same rounded values. Gradients are those of {with_gradient:,} of the tokens, "
    "and the gradient that comes in has both signs. A gradient's error is a norm, over that of "
    "rounding the exact gradient to bf16: 1 is as good as bf16 can be. Tokens whose gradient is "
    "1e-6 of the largest one and less are left out of its median and maximum. Sums are formed in "
    "fp64.\n\n"
    "With a frozen head fastkto rounds the direction of the gradient where it is stored, in fp16 "
    "with a scale for each token, and the gradient itself where it is returned, in bf16: the first "
    "rounding has an eighth of the second one's size. The bound is 1e-4 nats for a log-probability "
    "and 1.5 roundings for a token's gradient. Tiles of 16 bits add to that where a few tokens "
    "have all of the probability (in the tests to at most 1.75), and with fp16 both roundings have "
    "the same size (1.41 in the mean)."
)
_EMULATION = (
    "On a CPU fastkto multiplies in fp32. The column *emulated* rounds what it multiplies as on a "
    "GPU, where tiles of gradients are 16-bit, and still forms the products here: it shows what "
    "that rounding costs, and is no measurement of a GPU. The peers' columns are what their code "
    "does on a CPU: TRL's tiles and full logits are bf16, as on CUDA; linear_cross_entropy takes "
    "its most accurate policy there, which is not its choice on CUDA, and returns bf16."
)
TABLES = {
    "Log-probability: largest error, nats": "largest",
    "Log-probability: RMS error, nats": "rms",
    "Sum over all tokens: error, nats": "sum",
    "Gradient of hidden states, frozen head: error over rounding, median": "hidden_median",
    "Gradient of hidden states, frozen head: error over rounding, largest": "hidden_largest",
    "Gradient of the weight, trainable head: error over rounding": "weight",
}


@dataclass
class Row:
    """One regime."""

    found: dict[str, Accuracy]  # by contender
    skipped: dict[str, str]  # why others are missing
    least: float  # probability of a target
    most: float


def measure_regime(regime: Regime, size: Size) -> Row:
    inputs = make_regime(regime, size)
    some = every(size.tokens // size.with_gradient, inputs)
    truth, some_truth = compute_exactly(inputs), compute_exactly(some)
    makers = {name: make for name, make in MAKERS.items() if name != LEFT_OUT}
    scores, skipped = make_contenders(inputs.shape, makers)
    found = {}
    for name, score in scores.items():
        found[name] = measure_accuracy(score, inputs, truth, some, some_truth)
        if name == "fastkto" and DEVICE.type == "cpu":
            with tiles_of_16_bits():
                found[EMULATED] = measure_accuracy(score, inputs, truth, some, some_truth)
    least, most = truth.logprob.exp().aminmax()
    return Row(found, skipped, least.item(), most.item())


def write_accuracy(output: Path, size: Size, command: str) -> None:
    """Measure every regime and write `accuracy.md` into `output`."""
    rows = {title: measure_regime(regime, size) for title, regime in REGIMES.items()}
    names = ["fastkto", EMULATED, *MAKERS]
    names = [name for name in dict.fromkeys(names) if any(name in r.found for r in rows.values())]
    page = [
        "# Accuracy of the head operation",
        _ABOUT.format(**size._asdict()),
        *([_EMULATION] if DEVICE.type == "cpu" else []),
        _origin(command),
        _regimes(rows),
        *_missing(rows),
    ]
    for title, field in TABLES.items():
        page += [f"## {title}", _table(rows, names, field)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "accuracy.md").write_text("\n\n".join(page) + "\n")


def _origin(command: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    today = datetime.now(UTC).date()
    return f"`{command}`, {device_name()}, {today}; {versions}."


def _regimes(rows: dict[str, Row]) -> str:
    lines = ["| regime | probability of the target, least | most |", "|---|---:|---:|"]
    lines += [f"| {title} | {row.least:.1e} | {row.most:.7f} |" for title, row in rows.items()]
    return "\n".join(lines)


def _missing(rows: dict[str, Row]) -> list[str]:
    """A sentence on contenders without a number."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for title, row in rows.items():
        for skipped in row.skipped.items():
            reasons.setdefault(skipped, []).append(title)
    notes = [
        f"{name}: {reason}" + (f" ({', '.join(titles)})" if len(titles) < len(rows) else "")
        for (name, reason), titles in reasons.items()
    ]
    return [f"Not measured: {'; '.join(notes)}."] if notes else []


def _table(rows: dict[str, Row], names: list[str], field: str) -> str:
    lines = ["| regime | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    digits = ".1e" if field in ("largest", "rms", "sum") else ".2f"
    for title, row in rows.items():
        cells = [
            format(getattr(row.found[name], field), digits) if name in row.found else "-"
            for name in names
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors against fp64 with bf16 inputs.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder, default: docs")
    arguments = parser.parse_args()
    write_accuracy(arguments.output, FULL_SIZE, "python -m benchmarks.accuracy")


if __name__ == "__main__":
    main()
