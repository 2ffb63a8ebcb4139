"""What a results file says about the run, besides pytest-benchmark's own."""

import os

import pytest
import torch

from benchmarks.machine import device_name, installed_versions


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add versions, device, threads and command; leave out the machine's name."""
    machine_info.pop("node", None)
    machine_info |= {
        "versions": installed_versions(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "device_name": device_name(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m pytest", *map(_name, config.invocation_params.args)]),
    }


def _name(argument: str) -> str:
    """Without folders above the repository, which say nothing to others."""
    option, equals, value = argument.rpartition("=")
    value = os.path.basename(value) if os.path.isabs(value) else value
    return f"{option}{equals}'{value}'" if " " in value else f"{option}{equals}{value}"
