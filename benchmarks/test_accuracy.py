"""The page of `benchmarks.accuracy`, from a tiny run."""

from pathlib import Path

from benchmarks.accuracy import EMULATED, LEFT_OUT, write_accuracy
from benchmarks.accuracy_cases import REGIMES, Size
from benchmarks.head_cases import DEVICE, Shape
from benchmarks.head_contenders import MAKERS, make_contenders

SIZE = Size(tokens=64, with_gradient=32, hidden=32, vocabulary=515)


def test_accuracy_writes_a_row_for_each_regime_and_a_column_for_each_contender(
    tmp_path: Path,
) -> None:
    makers = {name: make for name, make in MAKERS.items() if name != LEFT_OUT}
    scores, skipped = make_contenders(Shape(SIZE.hidden, SIZE.vocabulary), makers)
    names = ["fastkto", *([EMULATED] if DEVICE.type == "cpu" else []), *list(scores)[1:]]

    write_accuracy(tmp_path, SIZE, "a command")

    page = (tmp_path / "accuracy.md").read_text()
    assert f"| regime | {' | '.join(names)} |\n" in page and "full logits" in names
    for name, reason in skipped.items():
        assert f"{name}: {reason}" in page
    for name in REGIMES:
        assert page.count(f"\n| {name} | ") == 7  # one of them says how sure it is
    assert "`a command`" in page
    fastkto = [line.split("|")[2] for line in page.splitlines() if line.startswith("| mixed |")]
    largest_error, median_gradient_error = float(fastkto[1]), float(fastkto[4])
    assert largest_error < 1e-4 and median_gradient_error < 1.6
