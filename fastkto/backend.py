"""The choice between the Triton kernels and PyTorch, for both operations."""

import logging
import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
# Below it, matmuls and kernels find no tensor cores for bf16.
MIN_TRITON_CAPABILITY = (8, 0)


class BackendChoice(NamedTuple):
    """Which backend runs, and why, in words for a log."""

    name: str  # "triton" or "torch"
    reason: str


_announced: set[BackendChoice] = set()


def choose_backend(backend: str, device: torch.device) -> BackendChoice:
    """The backend for tensors on `device`; "auto" is resolved, and logged once for each reason.

    auto: triton on CUDA and ROCm from compute capability 8.0 where Triton is installed, else torch.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    if backend == "triton":
        _check_triton(device)
        return BackendChoice("triton", "asked for")
    choice = _resolve(device)
    _announce(choice)
    return choice


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with its first tensor's device as the current one, where Triton launches."""

    @wraps(operator)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):  # nothing to do for a tensor on the CPU
            return operator(first, *args, **kwargs)

    return guarded


def _resolve(device: torch.device) -> BackendChoice:
    if device.type != "cuda":
        return BackendChoice("torch", f"there is no Triton backend for device {device.type!r}")
    if find_spec("triton") is None:
        return BackendChoice("torch", "Triton is not installed")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_TRITON_CAPABILITY:
        return BackendChoice("torch", f"compute capability {major}.{minor} is below 8.0")
    return BackendChoice("triton", f"compute capability {major}.{minor}")


def _check_triton(device: torch.device) -> None:
    if find_spec("triton") is None:
        raise ValueError(
            'backend="triton" but Triton is not installed; install triton or use backend="torch"'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend="triton" but the tensors are on device {str(device)!r}; move them to a GPU, '
            'use backend="torch", or start with TRITON_INTERPRET=1 to debug the kernels on a CPU'
        )


def _announce(choice: BackendChoice) -> None:
    if choice not in _announced:
        _announced.add(choice)
        logger.info("backend %s: %s", choice.name, choice.reason)
