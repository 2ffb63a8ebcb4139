"""What a results file says about the run, besides pytest-benchmark's own."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "liger-kernel",
    "cut-cross-entropy",
)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add versions, device, threads and command; leave out the machine's name."""
    machine_info.pop("node", None)
    on_cuda = torch.cuda.is_available()
    processor: dict[str, Any] = machine_info.get("cpu", {})
    machine_info |= {
        "versions": installed_versions(),
        "device": "cuda" if on_cuda else "cpu",
        "device_name": torch.cuda.get_device_name()
        if on_cuda
        else processor.get("brand_raw", "CPU"),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m pytest", *map(_name, config.invocation_params.args)]),
    }


def installed_versions() -> dict[str, str]:
    """Of Python and of those `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {"Python": platform.python_version()}


def _name(argument: str) -> str:
    """Without folders above the repository, which say nothing to others."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{os.path.basename(value) if os.path.isabs(value) else value}"
