"""The tables that say where the fused scan runs, and the search that fills the user's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkto_kernels import scan_table, search_scan
from fastkto_kernels.scan_table import CANDIDATES, Blocks, Key, find_blocks, load_table, save_entry

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FIRST = next(iter(CANDIDATES))


@pytest.fixture(autouse=True)
def users_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's table of this test is; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastkto" / "scan_table.json"


def find() -> Blocks | None:
    return find_blocks(CPU, 896, 151_936, torch.bfloat16)


def test_sizes_are_rounded_up_to_powers_of_two() -> None:
    assert scan_table.make_key(CPU, 896, 151_936, torch.bfloat16) == Key(
        "cpu", 1024, 262_144, "bfloat16"
    )
    assert scan_table.make_key(CPU, 4096, 1, torch.float16) == Key("cpu", 4096, 1, "float16")


def test_the_users_table_comes_before_the_shipped_one(
    users_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = scan_table.make_key(CPU, 1000, 200_000, torch.bfloat16)
    assert find() is None
    shipped = tmp_path / "shipped.json"
    save_entry(shipped, key, FIRST)
    monkeypatch.setattr(scan_table, "SHIPPED_TABLE", shipped)
    assert find() == FIRST
    save_entry(users_table, key, None)
    assert find() is None
    other = list(CANDIDATES)[1]
    save_entry(users_table, key, other)
    assert find() == other
    save_entry(users_table, key._replace(dtype="float16"), None)
    assert load_table(users_table) == {key: other, key._replace(dtype="float16"): None}
    assert os.listdir(users_table.parent) == ["scan_table.json"]


def test_without_xdg_the_table_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    expected = Path.home() / ".cache" / "fastkto" / "scan_table.json"
    assert scan_table.users_table() == expected


GOOD: dict[str, Any] = {
    "device": "cpu",
    "hidden_size": 1024,
    "vocab_size": 262144,
    "dtype": "bfloat16",
    "blocks": FIRST._asdict(),
}


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[{", "JSONDecodeError"),
        ("7", "TypeError"),
        ('["device"]', "ValueError"),
        (json.dumps([{"device": "cpu"}]), "KeyError: 'blocks'"),
        (json.dumps([GOOD | {"hidden_size": "1024"}]), "'1024' is no int"),
        (json.dumps([GOOD | {"speed": 1}]), "speed"),
        (json.dumps([GOOD | {"blocks": {"rows": 3}}]), "columns"),
        (json.dumps([GOOD | {"blocks": FIRST._asdict() | {"rows": 3}}]), "rows=3"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_it(
    users_table: Path, text: str, finding: str
) -> None:
    users_table.parent.mkdir()
    users_table.write_text(text)
    with pytest.raises(ValueError, match="search_scan") as error:
        find()
    assert str(users_table) in str(error.value) and finding in str(error.value)


def test_the_shipped_table_can_be_read() -> None:
    assert isinstance(load_table(scan_table.SHIPPED_TABLE), dict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_search_needs_a_gpu(users_table: Path) -> None:
    command = [sys.executable, "-m", "fastkto_kernels.search_scan"]
    command += ["--hidden-size", "896", "--vocab-size", "151936"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "CUDA" in result.stderr and "Traceback" not in result.stderr
    assert not users_table.exists()


@pytest.mark.parametrize(
    ("capability", "number"), [((8, 0), 2), ((8, 9), 2), ((9, 0), 2), ((10, 0), 0), ((12, 0), 1)]
)
def test_the_search_tries_what_compiles_well_for_the_gpu(
    capability: tuple[int, int], number: int
) -> None:
    assert len(search_scan.candidates_for(capability)) == number
