"""Compiles a kernel for a GPU that is not there, and reads what it takes from the result."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

KIB = 1024


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
        Target("sm_120", "cuda", 120, 32, 99 * KIB),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB),
    )
}


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    spills: int  # NVIDIA: bytes of stack and local memory; AMD: spilled registers
    shared: int  # bytes
    tensor_core: str = ""  # the instruction, empty if there is none
    multiplies_16_bit: bool = False  # whether the kernel has a tl.dot of fp16 or bf16


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
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    read = _nvidia_resources if target.backend == "cuda" else _amd_resources
    registers, spills = read(compiled)
    return Resources(
        registers,
        spills,
        compiled.metadata.shared,
        find_tensor_core(compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]),
        multiplies_16_bit(compiled.asm["ttir"]),
    )


def find_tensor_core(assembly: str) -> str:
    """The matrix instruction in PTX or AMD assembly, or an empty string."""
    match = re.search(r"\b(wgmma|tcgen05\.mma|mma\.sync|v_mfma)", assembly)
    return match[1] if match else ""


def multiplies_16_bit(ttir: str) -> bool:
    """Whether a kernel has a tl.dot of fp16 or bf16.

    Asked of Triton's first representation: in the next one a dot that finds no matrix instruction
    may have been cast to fp32 already.
    """
    return re.search(r"\btt\.dot\b[^\n]*: tensor<[\dx]+x(bf16|f16)\b", ttir) is not None


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
