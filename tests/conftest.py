"""Settings of the test process; they have to be made before Triton and the HF libraries load."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# The interpreter runs kernels on CPU tensors; Triton reads this once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Caches keyed by fingerprint would carry results from one run of the tests to the next.
_CACHE = tempfile.TemporaryDirectory(prefix="fastkto-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
# PyTorch's cache of compiled graphs does not see that an operator's backward formula has changed.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_CACHE.name}/inductor"
# Nor is the user's table of the fused scan to decide what runs here.
os.environ["XDG_CACHE_HOME"] = _CACHE.name
torch.set_num_threads(1)

CUDA = ["cuda"] if torch.cuda.is_available() else []
HAS_TRITON = find_spec("triton") is not None
# (device, backend): the interpreter stands in for a GPU where there is none.
PLACES = [("cpu", "torch"), *((device, "torch") for device in CUDA)]
if HAS_TRITON:
    PLACES += [(device, "triton") for device in CUDA or ["cpu"]]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[1]}-{place[0]}")
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend), every pair that this machine can run."""
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like give NaN, so that a result that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """accelerate keeps one state a process, and refuses another precision than the first."""
    if find_spec("accelerate") is None:  # the operations do without
        return
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
