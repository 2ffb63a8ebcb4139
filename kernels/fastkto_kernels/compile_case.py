"""What the ahead-of-time gate compiles: a kernel in one of the forms in which it is launched.

Each module with kernels has a `compile_cases()` beside its launchers that lists all the forms. A
test compares the list with what the launchers do launch.
"""

from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One form of one kernel."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # run-time parameter -> Triton type, such as "*fp32" or "i32"
    constexprs: dict[str, Any]  # compile-time parameter -> value; None for an absent pointer
    num_warps: int
    num_stages: int = 3  # of a loop with tl.dot
    targets: tuple[str, ...] | None = None  # names of the GPUs it is for; None: all

    @property
    def label(self) -> str:
        """Kernel and compile-time values, for tables and messages."""
        values = ", ".join(f"{name}={value}" for name, value in self.constexprs.items())
        types = sorted({kind for kind in self.signature.values() if kind.startswith("*")})
        return f"{self.kernel.__name__}({values}; {' '.join(types)}; stages={self.num_stages})"
