"""Check that the wheel and the sdist in a folder hold what they should.

    python tests/check_distribution.py FOLDER

Raises an error that names what is missing or too much.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {"fastkto": ROOT / "fastkto", "fastkto_kernels": ROOT / "kernels" / "fastkto_kernels"}


def package_files() -> set[str]:
    """Every module and type marker of the clone, by its path in an installation."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


def check(what: str, wanted: set[str], found: set[str]) -> None:
    if missing := sorted(wanted - found):
        raise FileNotFoundError(f"the {what} lacks {missing}; is a package missing in pyproject?")


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    check("wheel", package_files(), in_wheel)
    top_level = {name.split("/")[0] for name in in_wheel}
    extra = {name for name in top_level - set(SOURCES) if not name.endswith(".dist-info")}
    if extra:
        raise ValueError(f"the wheel installs {sorted(extra)} beside {sorted(SOURCES)}")
    if not any(name.endswith("licenses/LICENSE") for name in in_wheel):
        raise FileNotFoundError("the wheel has no LICENSE")
    in_sdist = {name.split("/", 1)[-1] for name in tarfile.open(sdist).getnames()}
    sources = {
        name.replace("fastkto_kernels/", "kernels/fastkto_kernels/") for name in package_files()
    }
    check("sdist", sources | {"README.md", "LICENSE", "pyproject.toml"}, in_sdist)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
