"""What may import what, and where packages lie."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "fastkto_kernels"


def imported_packages(path: Path) -> set[str]:
    """Top-level names of a file's absolute imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_kernels_folder_is_no_package() -> None:
    """A package `kernels` would shadow the one on PyPI that transformers imports."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("**/*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    assert imported_packages(path) <= {"torch", "triton", *sys.stdlib_module_names}


def test_operations_do_not_import_the_trainer() -> None:
    allowed = {"torch", "fastkto", "fastkto_kernels", *sys.stdlib_module_names}
    for name in ("backend", "eager", "logprob", "loss"):
        assert imported_packages(ROOT / "fastkto" / f"{name}.py") <= allowed


def test_contributing_names_the_place_of_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = (KERNELS, ROOT / "fastkto", ROOT / "fastkto" / "data")
    modules = {path.name for folder in folders for path in folder.glob("[!_]*.py")}
    assert sorted(name for name in modules if f"{name}`" not in text) == []


def test_importing_fastkto_loads_no_training_library() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "import fastkto\n"
        "assert callable(fastkto.linear_logprob) and callable(fastkto.kto_loss)\n"
        "heavy = {'transformers', 'datasets', 'peft', 'accelerate', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
