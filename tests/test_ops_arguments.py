"""Bad arguments of `linear_logprob`, the choice of backend, and what the backends launch."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastkto import backend, linear_logprob
from fastkto.loss import sum_completions
from tests.conftest import HAS_TRITON

INPUTS = {
    "hidden": torch.ones(4, 6),
    "weight": torch.ones(9, 6),
    "target": torch.tensor([0, 8, -100, 3]),
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.ones(4)}, ValueError, r"hidden has shape \(4,\); expected two"),
        ({"weight": torch.ones(9, 6, 1)}, ValueError, r"weight has shape \(9, 6, 1\)"),
        ({"weight": torch.ones(9, 5)}, ValueError, "hidden has D=6, weight has D=5; pass lm_head"),
        ({"weight": torch.ones(0, 6)}, ValueError, "weight has V=0"),
        ({"hidden": torch.ones(4, 0), "weight": torch.ones(9, 0)}, ValueError, "hidden has D=0"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target has shape \(5,\); .*\(4,\)"),
        ({"target": torch.zeros(4).int()}, TypeError, "target has dtype torch.int32; .*int64"),
        ({"target": torch.tensor([0, 9, 1, 1])}, ValueError, r"target\[1\] is 9; .*\[0, 9\)"),
        ({"target": torch.tensor([0, 1, 1, -1])}, ValueError, r"target\[3\] is -1"),
        ({"bias": torch.ones(6)}, ValueError, r"bias has shape \(6,\); expected \(9,\)"),
        ({"hidden": torch.ones(4, 6).double()}, TypeError, "hidden has dtype torch.float64"),
        ({"weight": torch.ones(9, 6).long()}, TypeError, "weight has dtype torch.int64"),
        ({"bias": torch.ones(9).double()}, TypeError, "bias has dtype torch.float64"),
        ({"bias": torch.ones(9, 1)}, ValueError, r"bias has shape \(9, 1\); expected one dim"),
        ({"extra_hidden": torch.ones(4, 2)}, ValueError, "belong together; got one of them"),
        (
            {"extra_hidden": torch.ones(3, 2), "extra_weight": torch.ones(9, 2)},
            ValueError,
            r"extra_hidden has shape \(3, 2\); expected \(4, 2\)",
        ),
        (
            {"extra_hidden": torch.ones(4, 2), "extra_weight": torch.ones(9, 3)},
            ValueError,
            r"extra_weight has shape \(9, 3\); expected \(9, 2\)",
        ),
        ({"factor": torch.ones(6)}, ValueError, r"factor has shape \(6,\); expected \(9,\)"),
        ({"factor": torch.ones(9, 1)}, ValueError, r"factor has shape \(9, 1\); expected one dim"),
        ({"factor": torch.ones(9).double()}, TypeError, "factor has dtype torch.float64"),
        ({"weight": torch.ones(9, 6).to("meta")}, ValueError, "hidden is on cpu, weight on meta"),
        ({"target": torch.ones(4).long().to("meta")}, ValueError, "target on meta"),
        ({"bias": torch.ones(9).to("meta")}, ValueError, "bias on meta"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; expected a finite"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; expected a positive number, or None"),
        ({"softcap": -30.0}, ValueError, "softcap is -30.0"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive number"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"head_memory_mib": 0}, ValueError, "head_memory_mib is 0; expected a positive number"),
        ({"head_memory_mib": -1}, ValueError, "head_memory_mib is -1"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; expected one of auto, triton, torch"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_logprob(**(INPUTS | changed))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="tensors are on device 'cpu'; move them to a GPU"):
        linear_logprob(**INPUTS, backend="triton")
    with pytest.raises(ValueError, match="tensors are on device 'cpu'"):
        sum_completions(torch.zeros(3), torch.tensor([0, 3]), backend="triton")


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='Triton is not installed; .*backend="torch"'):
        linear_logprob(**INPUTS, backend="triton")


@pytest.mark.parametrize(
    ("capability", "installed", "name", "reason"),
    [
        ((9, 0), True, "triton", "compute capability 9.0"),
        ((8, 0), True, "triton", "compute capability 8.0"),
        ((7, 5), True, "torch", "compute capability 7.5 is below 8.0"),
        ((9, 0), False, "torch", "Triton is not installed"),
    ],
)
def test_auto_chooses_by_compute_capability(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: bool,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if installed else None)
    assert backend.choose_backend("auto", torch.device("cuda")) == (name, reason)


def test_auto_says_once_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger="fastkto"):
        for _ in range(2):
            linear_logprob(**INPUTS)
            sum_completions(torch.zeros(3), torch.tensor([0, 3]))
    expected = "backend torch: there is no Triton backend for device 'cpu'"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_operations_work_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch, fastkto
hidden = torch.ones(3, 4, requires_grad=True)
logprob = fastkto.linear_logprob(hidden, torch.ones(5, 4), torch.tensor([0, 4, -100])).logprob
fastkto.kto_loss(
    logprob, torch.tensor([0, 3]), torch.zeros(1), torch.tensor([True]), kl=torch.zeros(())
).loss.backward()
"""
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {path!r}\n{script}"
    subprocess.run([sys.executable, "-c", code], check=True)
