"""Device and versions, as pages and results files state them."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import cpuinfo
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


def installed_versions() -> dict[str, str]:
    """Of those `PACKAGES` that are installed, and of Python."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | {"Python": platform.python_version()}


def device_name() -> str:
    """Of the GPU, or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpuinfo.get_cpu_info().get("brand_raw", "CPU")
