"""The ahead-of-time gate passes for our kernels, and fails for what it is there to catch."""

import importlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkto import kto_loss, linear_logprob
from fastkto.loss import sum_completions
from fastkto_kernels.operands import Operands
from fastkto_kernels.scan_table import CANDIDATES
from fastkto_kernels.tiles import LogitTransform
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

ROOT = Path(__file__).parent.parent
Form = tuple[str, frozenset[tuple[str, Any]]]

SOURCE = """
import triton
import triton.language as tl
from fastkto_kernels.compile_case import CompileCase

@triton.jit
def _square(x):
    return x * x

@triton.jit
def _kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, {expression})
"""
STATED = """
def compile_cases():
    return [CompileCase(_kernel, {"x_ptr": "*fp32"}, {"BLOCK": BLOCK}, 1)]
"""
MATRIX_SOURCE = """
import triton
import triton.language as tl
from fastkto_kernels.compile_case import CompileCase

@triton.jit
def _kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    product = tl.dot(x, x, input_precision="ieee").to(x.dtype)
    tl.store(x_ptr + offs[:, None] * BLOCK + offs[None, :], product)

def compile_cases():
    return [CompileCase(_kernel, {"x_ptr": "{pointer}"}, {"BLOCK": {block}}, 4)]
"""
LOOP = """product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(1, 16):
        y = tl.load(x_ptr + (offs[:, None] + step * BLOCK) * BLOCK + offs[None, :])
        product = tl.dot(y, y, product)
    product = tl.dot(x, x, product, """
NO_MATRIX_UNIT = "a 16-bit tl.dot without a matrix instruction"


def run_gate(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The gate in a process of its own, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT / "kernels"), *([str(path)] if path else [])]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, str(ROOT / "kernels" / "aot_gate.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def write_package(folder: Path, source: str) -> None:
    package = folder / "probe_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "probe.py").write_text(source)


@pytest.mark.slow  # the gate itself does more
def test_our_kernels_pass() -> None:
    result = run_gate("--targets", "sm_90")
    assert result.returncode == 0, result.stdout + result.stderr
    listed = {line.split()[0] for line in result.stdout.splitlines()}
    assert {
        "_fold_kernel",
        "_gradient_kernel",
        "_scan_kernel",
        "_sum_kernel",
        "_expand_kernel",
    } <= listed
    assert (
        not {"_load_logits", "transform_logits"} & listed
    )  # called by kernels, launched by nobody


@pytest.mark.parametrize(
    ("expression", "stated", "finding"),
    [
        ("_square(x)", STATED.replace("BLOCK}", "32}"), None),
        ("_square(x)", "", "probe._kernel: no form in compile_cases()"),
        ("_square(x)", STATED.replace("BLOCK}", "33}"), "power of 2"),
        ("x / tl.sum(x, 0)", STATED.replace("BLOCK}", "8192}"), "spills"),
        ("_square(x)", STATED.replace('{"BLOCK": BLOCK}', "{}"), "differ in BLOCK"),
        ("_square(x)", STATED.replace("BLOCK}, 1", '33}, 1, targets=("sm_90",)'), None),
        ("_square(x)", STATED.replace("BLOCK}, 1", '32}, 1, targets=("sm_9",)'), "target sm_9"),
    ],
    ids=["good", "unstated", "not compiled", "spills", "signature", "elsewhere", "unknown target"],
)
def test_the_gate_finds(tmp_path: Path, expression: str, stated: str, finding: str | None) -> None:
    write_package(tmp_path, SOURCE.replace("{expression}", expression) + stated)
    result = run_gate("--package", "probe_kernels", "--targets", "sm_80", path=tmp_path)
    assert result.returncode == (0 if finding is None else 1), result.stdout + result.stderr
    assert finding is None or finding in result.stdout
    assert finding is not None or "FAILED" not in result.stdout


@pytest.mark.parametrize(
    ("target", "pointer", "block", "instruction"),
    [
        ("sm_80", "*bf16", 16, "mma.sync"),
        ("sm_90", "*fp16", 64, "wgmma"),
        ("sm_100", "*bf16", 128, "tcgen05.mma"),
        ("sm_120", "*bf16", 16, "mma.sync"),
        ("gfx942", "*bf16", 16, "v_mfma"),
        ("gfx942", "*fp16", 8, None),  # too small for the matrix unit: multiplied without
        ("gfx942", "*bf16", 8, None),
        ("sm_80", "*fp32", 16, "-"),  # asked for full precision, which no matrix unit has
    ],
)
def test_the_gate_finds_dots_without_matrix_unit(
    tmp_path: Path, target: str, pointer: str, block: int, instruction: str | None
) -> None:
    source = MATRIX_SOURCE.replace("{pointer}", pointer).replace("{block}", str(block))
    write_package(tmp_path, source)
    arguments = ("--package", "probe_kernels", "--targets", target, "--markdown")
    result = run_gate(*arguments, path=tmp_path)
    assert result.returncode == (1 if instruction is None else 0), result.stdout + result.stderr
    assert (NO_MATRIX_UNIT in result.stdout) == (instruction is None)
    header, rule, row = result.stdout.splitlines()[:3]
    assert header.count("|") == rule.count("|") == row.count("|") == 8
    assert row.startswith(f"| `_kernel` | {target} | 2 |")
    assert row.endswith(f"| {instruction or '-'} |")


def test_the_gate_compiles_with_the_stages_of_the_case(tmp_path: Path) -> None:
    """Each stage of a pipelined loop takes shared memory: too many do not fit."""
    loop = MATRIX_SOURCE.replace("product = tl.dot(x, x, ", LOOP)
    for stages, code in ((2, 0), (8, 1)):
        folder = tmp_path / str(stages)
        folder.mkdir()
        source = loop.replace("{pointer}", "*bf16").replace("{block}}, 4", f"128}}, 8, {stages}")
        write_package(folder, source)
        result = run_gate("--package", "probe_kernels", "--targets", "sm_80", path=folder)
        assert result.returncode == code, result.stdout + result.stderr
        assert ("bytes of shared memory, limit" in result.stdout) == (code == 1)


def test_the_gate_refuses_a_package_without_kernels(tmp_path: Path) -> None:
    (tmp_path / "probe_kernels").mkdir()
    (tmp_path / "probe_kernels" / "__init__.py").touch()
    result = run_gate("--package", "probe_kernels", path=tmp_path)
    assert result.returncode != 0 and "has no kernels" in result.stderr


def test_the_gate_finds_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    gate = importlib.import_module("aot_gate")
    case = importlib.import_module("fastkto_kernels.row_steps_triton").compile_cases()[0]
    for shared, num_findings in ((64 * 1024, 0), (64 * 1024 + 1, 2)):
        resources = gate.Resources(registers=40, spills=0, shared=shared)
        monkeypatch.setattr(gate, "compile_case", lambda *_, found=resources, **__: found)
        findings, _ = gate.check_kernel([case], gate.TARGETS["gfx942"])
        assert len(findings) == num_findings
        assert all("65537 bytes of shared memory, limit 65536" in finding for finding in findings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads launches from the interpreter")
def test_the_stated_forms_are_those_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile-time values and absent pointers of every launch, over all options."""
    modules = [
        importlib.import_module(f"fastkto_kernels.{name}")
        for name in ("tile_steps_triton", "row_steps_triton", "fused_scan")
    ]
    cases = [case for module in modules for case in module.compile_cases()]
    stated = {_form(case.kernel, case.constexprs) for case in cases}
    launched: set[Form] = set()

    def record(kernel: Any) -> None:
        run = kernel.run

        def run_and_record(*args: Any, **kwargs: Any) -> Any:
            launched.add(_form(kernel, kwargs))
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run_and_record)

    for kernel in {case.kernel.__name__: case.kernel for case in cases}.values():
        record(kernel)
    _launch_everything()
    assert launched == stated


def _form(kernel: Any, arguments: dict[str, Any]) -> Form:
    """Kernel, its compile-time values and its absent pointers."""
    values = {
        name: value
        for name, value in arguments.items()
        if name in kernel.arg_names and (value is None or name.isupper())
    }
    return kernel.__name__, frozenset(values.items())


def _launch_everything() -> None:
    """Every combination of options that decides how a kernel is launched."""
    hidden, weight, bias = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)
    target = torch.tensor([0, 2])
    for has_bias, softcap, stats, (asks_hidden, asks_weight) in product(
        (False, True), (None, 2.0), (False, True), ((True, False), (False, True), (True, True))
    ):
        logprob = linear_logprob(
            hidden.clone().requires_grad_(asks_hidden),
            weight.clone().requires_grad_(asks_weight),
            target,
            bias=bias if has_bias else None,
            softcap=softcap,
            stats=stats,
            backend="triton",
            head_memory_mib=1e-5,  # several tiles
        ).logprob
        kto_loss(
            logprob,
            torch.tensor([0, 2]),
            torch.zeros(1),
            torch.tensor([True]),
            kl=torch.zeros(()),
            backend="triton",
        ).loss.backward()
    sum_completions(torch.zeros(2), torch.tensor([0, 2]), backend="triton")
    _launch_fused_scans()


def _launch_fused_scans() -> None:
    from fastkto_kernels.fused_scan import scan_fused

    hidden, weight, target = torch.ones(1, 16), torch.ones(1, 16), torch.tensor([0])
    for blocks, softcap, stats in product(CANDIDATES, (None, 2.0), (False, True)):
        transform = LogitTransform(scale=1.0, softcap=softcap, temperature=1.0)
        operands = Operands(hidden, weight, None, None, None, target, torch.bfloat16, transform)
        scan_fused(operands, blocks, stats=stats, memory_bytes=1)
