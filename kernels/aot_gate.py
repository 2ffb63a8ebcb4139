"""Ahead-of-time gate: compiles every kernel for every GPU that is supported, on a machine without.

    python kernels/aot_gate.py [--targets sm_90,gfx942] [--package fastkto_kernels] [--markdown]

Kernels are found in the source: each function under @triton.jit is either called by another one or
must occur in its module's `compile_cases()`. Each form is compiled with and without the alignment
that Triton learns from the arguments, and must fit the chip's shared memory, spill no register and
multiply 16-bit matrices, if it does, with a matrix instruction. A table lists what each takes.
Exit status 1 if anything fails. Needs Triton, no GPU, and its own process without TRITON_INTERPRET,
since the interpreter replaces the compiler for the whole process.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from aot_compile import TARGETS, Resources, Target, compile_case

# (kernel, target) -> why its spills are accepted.
ACCEPTED_SPILLS: dict[tuple[str, str], str] = {}
COLUMNS = ("kernel", "target", "forms", "registers", "shared memory", "spills", "matrix unit")


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--package", default="fastkto_kernels")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    unknown = set(options.targets.split(",")) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {min(unknown)}; known: {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in options.targets.split(",")]

    failures: list[str] = []
    _write_row(COLUMNS, options.markdown)
    if options.markdown:
        _write("|" + "---|" * len(COLUMNS))
    for module in kernel_modules(options.package):
        kernels = find_kernels(Path(str(module.__file__)))
        cases = module.compile_cases() if hasattr(module, "compile_cases") else []
        stated = {case.kernel.__name__ for case in cases}
        failures += [
            f"{module.__name__}.{name}: no form in compile_cases()" for name in kernels - stated
        ]
        failures += [
            f"{case.label}: unknown target {name}"
            for case in cases
            for name in case.targets or ()
            if name not in TARGETS
        ]
        for target, name in product(targets, sorted(stated)):
            found, resources = check_kernel([c for c in cases if c.kernel.__name__ == name], target)
            failures += found
            if resources:
                _write_row(_table_row(name, target, resources), options.markdown)
    for failure in failures:
        _write(f"FAILED {failure}")
    return 1 if failures else 0


def kernel_modules(package: str) -> list[ModuleType]:
    """The package's modules that contain kernels, imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} was not found; run from a checkout or install it")
    (folder,) = spec.submodule_search_locations
    paths = sorted(Path(folder).rglob("*.py"))
    found = [path for path in paths if _jit_functions(path)]
    if not found:
        raise SystemExit(f"package {package} has no kernels: the gate has nothing to check")
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in found]
    return [importlib.import_module(f"{package}.{name}") for name in names]


def find_kernels(path: Path) -> set[str]:
    """Names of the @triton.jit functions of a file that no other one of them calls."""
    functions = _jit_functions(path)
    called = {
        call.func.id
        for function in functions
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return {function.name for function in functions} - called


def _jit_functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def check_kernel(cases: list[Any], target: Target) -> tuple[list[str], list[Resources]]:
    """Compile the forms of one kernel meant for one target: what failed, and what each takes."""
    name = cases[0].kernel.__name__
    failures: list[str] = []
    results: list[Resources] = []
    meant = [case for case in cases if case.targets is None or target.name in case.targets]
    for case, aligned in product(meant, (True, False)):
        where = f"{case.label}, {'aligned' if aligned else 'unaligned'}, {target.name}"
        try:
            resources = compile_case(case, target, aligned=aligned)
        # Whatever the compiler raises is a finding, and other kernels are still of interest.
        except Exception as error:
            failures.append(f"{where}: {type(error).__name__}: {str(error)[:300]}")
            continue
        results.append(resources)
        if resources.shared > target.shared_limit:
            failures.append(
                f"{where}: {resources.shared} bytes of shared memory, limit {target.shared_limit}"
            )
        if resources.spills and (name, target.name) not in ACCEPTED_SPILLS:
            failures.append(f"{where}: spills {resources.spills}")
        if resources.multiplies_16_bit and not resources.tensor_core:
            failures.append(f"{where}: a 16-bit tl.dot without a matrix instruction")
    return failures, results


def _table_row(name: str, target: Target, results: list[Resources]) -> list[str]:
    """The most that any form of a kernel takes, in the order of COLUMNS."""
    registers, spills, shared = (max(column) for column in list(zip(*results, strict=True))[:3])
    accepted = " (accepted)" if (name, target.name) in ACCEPTED_SPILLS else ""
    instructions = ", ".join(sorted({found.tensor_core for found in results} - {""})) or "-"
    counts = [str(len(results)), str(registers), str(shared), f"{spills}{accepted}"]
    return [name, target.name, *counts, instructions]


def _write_row(cells: Sequence[str], markdown: bool) -> None:
    if markdown:
        name, *others = cells
        _write(f"| {f'`{name}`' if name.startswith('_') else name} | {' | '.join(others)} |")
    else:
        _write(f"{cells[0]:20}" + "".join(f"{cell:>15}" for cell in cells[1:]))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
