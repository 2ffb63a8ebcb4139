"""The page of `benchmarks.accuracy`, from a tiny run."""

from pathlib import Path

from benchmarks.accuracy import EMULATED, write_accuracy
from benchmarks.accuracy_cases import REGIMES, Size
from benchmarks.head_cases import DEVICE


def test_accuracy_writes_a_row_for_each_regime_and_a_column_for_each_contender(
    tmp_path: Path,
) -> None:
    write_accuracy(
        tmp_path, Size(tokens=64, with_gradient=32, hidden=32, vocabulary=515), "a command"
    )

    page = (tmp_path / "accuracy.md").read_text()
    names = ["fastkto", *([EMULATED] if DEVICE.type == "cpu" else []), "TRL", "full logits"]
    assert f"| regime | {' | '.join(names)} | torch linear_cross_entropy |" in page
    for name in REGIMES:
        assert page.count(f"\n| {name} | ") == 7  # one of them says how sure it is
    assert "`a command`" in page
    fastkto = [line.split("|")[2] for line in page.splitlines() if line.startswith("| mixed |")]
    largest_error, median_gradient_error = float(fastkto[1]), float(fastkto[4])
    assert largest_error < 1e-4 and median_gradient_error < 1.6
