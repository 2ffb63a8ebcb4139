"""Training steps of one library in this process: time, loss, tokens and memory of each.

The libraries' own `train()` runs, with their own data loader, collator, `training_step`, gradient
clipping, optimizer and logs. A callback holds the clock: a step lasts from the end of the last log
to the end of its own.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.step_cases import Case
from benchmarks.step_models import DEVICE, build_adapter, build_model, build_rows, build_tokenizer

LIBRARIES = ("trl", "fastkto")
MIB = 2**20
_MANY_STEPS = 1000  # more than any measurement takes


@dataclass(frozen=True)
class Step:
    """What one optimizer step cost and gave."""

    seconds: float
    cpu_seconds: float  # of all threads; on a machine shared with others it varies less
    loss: float
    grad_norm: float
    kl: float
    tokens: int  # that went through a decoder, padding included; not what checkpointing recomputes
    # Peak above models and optimizer state: resident memory on a CPU, allocated on CUDA.
    peak_mib: float
    peak_reserved_mib: float | None  # on CUDA, in all


def run_steps(
    case: Case,
    library: str,
    *,
    go_on: Callable[[], bool],
    report: Callable[[Step], None],
) -> None:
    """Train `case` with `library` ("trl" or "fastkto"), a step as long as `go_on()` is true.

    `report` is called after each step. ValueError from the trainer means that it refuses the case.
    """
    with tempfile.TemporaryDirectory() as directory:
        clock = _Clock(go_on, report)
        trainer = _build_trainer(case, library, Path(directory), clock)
        gc.collect()
        clock.memory = _Memory()
        trainer.train()


def settings(case: Case, library: str, directory: Path) -> dict[str, Any]:
    """Trainer arguments: the same for both, and one line for each of what only one has."""
    common = {
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "max_length": case.longest,
        "gradient_checkpointing": case.checkpointing,
        "max_steps": _MANY_STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "bf16": DEVICE.type == "cuda",
        "use_cpu": DEVICE.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "precompute_ref_log_probs": case.reference == "precomputed",
    }
    if library == "trl":
        return common | {"activation_offloading": case.offloading}
    if case.batch == 1:
        common |= {"kl_scope": "window"}
    if case.reference == "precomputed":
        # Its own: nothing is known before the run.
        return common | {"reference_cache": str(directory / "reference_cache")}
    return common


def _build_trainer(case: Case, library: str, directory: Path, clock: _Clock) -> Any:
    policy, adapter = build_model(case), build_adapter(case)
    reference = build_model(case, reference=True) if adapter is None else None
    for model in filter(None, (policy, reference)):
        model.get_input_embeddings().register_forward_pre_hook(clock.count_tokens)
    module = import_module(library)  # a process imports, and its memory holds, only its own
    return module.KTOTrainer(
        model=policy,
        ref_model=reference,
        args=module.KTOConfig(output_dir=str(directory), **settings(case, library, directory)),
        train_dataset=build_rows(case),
        processing_class=build_tokenizer(case),
        peft_config=adapter,
        callbacks=[clock],
    )


class _Clock(TrainerCallback):
    """Starts and stops at the borders of optimizer steps, and counts tokens in between."""

    memory: _Memory

    def __init__(self, go_on: Callable[[], bool], report: Callable[[Step], None]) -> None:
        self._go_on, self._report = go_on, report
        self._tokens, self._start, self._cpu_start = 0, 0.0, 0.0

    def count_tokens(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of a decoder's embedding."""
        self._tokens += inputs[0].numel()

    def _begin(self, control: TrainerControl) -> None:
        if not self._go_on():
            control.should_training_stop = True
            return
        self._tokens = 0
        self.memory.reset_peak()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:  # the summary at the end of the run
            return
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        cpu_seconds = time.process_time() - self._cpu_start
        peak, peak_reserved = self.memory.peak_mib(optimizer)
        self._report(
            Step(
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                loss=float(logs["loss"]),
                grad_norm=float(logs["grad_norm"]),
                kl=float(logs["kl"]),
                tokens=self._tokens,
                peak_mib=peak,
                peak_reserved_mib=peak_reserved,
            )
        )
        self._begin(control)


class _Memory:
    """Peak memory above what is there when this is made: the models.

    On a CPU it is the kernel's high-water mark of resident memory (Linux; elsewhere NaN), so what
    the allocator keeps of freed memory counts for both libraries.
    """

    def __init__(self) -> None:
        if DEVICE.type == "cuda":
            self._models_mib = torch.cuda.memory_allocated() / MIB
        else:
            if Path("/proc/self/clear_refs").exists():
                ctypes.CDLL(None).malloc_trim(0)  # what loading left behind is no model
            self._models_mib = _resident_mib("VmRSS")

    def reset_peak(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)

    def peak_mib(self, optimizer: Any) -> tuple[float, float | None]:
        """(peak above models and optimizer state, reserved peak on CUDA), in MiB."""
        above = self._models_mib + _state_mib(optimizer)
        if DEVICE.type == "cuda":
            allocated = torch.cuda.max_memory_allocated() / MIB
            return allocated - above, torch.cuda.max_memory_reserved() / MIB
        return _resident_mib("VmHWM") - above, None


def _state_mib(optimizer: Any) -> float:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tensors = [value for value in state if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024  # kB
