"""Ahead-of-time gate: compiles every kernel for every GPU that is supported, on a machine without.

    python kernels/aot_gate.py [--targets sm_90,gfx942] [--package fastkto_kernels]

Kernels are found in the source: each function under @triton.jit is either called by another one or
must occur in its module's `compile_cases()`. Each form is compiled with and without the alignment
that Triton learns from the arguments, and must fit the chip's shared memory and spill no register.
Exit status 1 if anything fails. Needs Triton, no GPU, and its own process without TRITON_INTERPRET,
since the interpreter replaces the compiler for the whole process.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

KIB = 1024
# (kernel, target) -> why its spills are accepted.
ACCEPTED_SPILLS: dict[tuple[str, str], str] = {}


class Target(NamedTuple):
    """A GPU to compile for, and the most shared memory that one program may have there."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the LDS of gfx9.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB),
        Target("sm_90", "cuda", 90, 32, 227 * KIB),
        Target("sm_100", "cuda", 100, 32, 227 * KIB),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB),
    )
}


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    spills: int  # NVIDIA: bytes of stack and local memory; AMD: spilled registers
    shared: int  # bytes


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--package", default="fastkto_kernels")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    unknown = set(options.targets.split(",")) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {min(unknown)}; known: {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in options.targets.split(",")]

    failures: list[str] = []
    for module in kernel_modules(options.package):
        kernels = find_kernels(Path(str(module.__file__)))
        cases = module.compile_cases() if hasattr(module, "compile_cases") else []
        stated = {case.kernel.__name__ for case in cases}
        failures += [
            f"{module.__name__}.{name}: no form in compile_cases()" for name in kernels - stated
        ]
        for target in targets:
            for name in sorted(stated):
                failures += _check_kernel([c for c in cases if c.kernel.__name__ == name], target)
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


def _check_kernel(cases: list[Any], target: Target) -> list[str]:
    """Compile all forms of one kernel for one target; prints a line, returns what failed."""
    name = cases[0].kernel.__name__
    failures: list[str] = []
    results: list[Resources] = []
    for case in cases:
        for aligned in (True, False):
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
                    f"{where}: {resources.shared} bytes of shared memory, limit "
                    f"{target.shared_limit}"
                )
            if resources.spills and (name, target.name) not in ACCEPTED_SPILLS:
                failures.append(f"{where}: spills {resources.spills}")
    if results:
        worst = Resources(*(max(column) for column in zip(*results, strict=True)))
        _write(
            f"{name:20} {target.name:7} {len(results):3} compiled   registers {worst.registers:3}"
            f"   spills {worst.spills}   shared {worst.shared:6}"
            f"{ACCEPTED_SPILLS.get((name, target.name), '') and '   (spills accepted)'}"
        )
    return failures


def compile_case(case: Any, target: Target, *, aligned: bool) -> Resources:
    """Compile one form of a kernel; aligned: pointers and integers are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = case.signature | dict.fromkeys(case.constexprs, "constexpr")
    missing = set(names) ^ set(types)
    if missing:
        raise ValueError(f"parameters and compile_cases() differ in {', '.join(sorted(missing))}")
    multiples = [name for name, kind in case.signature.items() if kind[0] in "*i" and aligned]
    source = ASTSource(
        fn=case.kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": case.num_warps, "enable_fp_fusion": True},
    )
    read = _nvidia_resources if target.backend == "cuda" else _amd_resources
    registers, spills = read(compiled)
    return Resources(registers, spills, compiled.metadata.shared)


def _nvidia_resources(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of stack and local memory), read from the binary by Triton's cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    if match is None:
        raise ValueError(f"cuobjdump lists no resources: {listing[:200]!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def _amd_resources(compiled: Any) -> tuple[int, int]:
    """(vector registers, spilled registers), from the metadata in the assembly."""

    def count(field: str) -> int:
        match = re.search(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"])
        if match is None:
            raise ValueError(f"the assembly states no {field}")
        return int(match[1])

    return count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
