"""Peaks of real runs on a CPU, from the allocator's own record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from fastkto import KTOConfig, KTOTrainer
from tests.models import tiny_model, tiny_tokenizer

LENGTH = 256
HEAD_MIB = 8


def measured_peak(work: Callable[[], Any]) -> int:
    """The most bytes that `work` had allocated at any time, without what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = []

    def collect(nodes: Any) -> None:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                fields = node.extra_fields
                events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
            collect(node.children)

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    collect(profiler.profiler.kineto_results.experimental_event_tree())
    alive: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            alive[address] = size
            now += size
        else:  # memory from before, which garbage collection may free at any time, is not known
            now -= alive.pop(address, 0)
        peak = max(peak, now)
    return peak


def trainer_of(
    folder: Path,
    *,
    lora: bool | list[str] = False,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> KTOTrainer:
    """A trainer of 6 million parameters whose rows have LENGTH tokens, a pass to each row.

    lora: an adapter, on all linear layers but the head or on those that are named.
    """
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "p" * 32, "completion": "c" * LENGTH, "label": index % 2 == 0}
        for index in range(4)
    ]
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "head_dim": 64}
    values = {"gradient_checkpointing": False, "bf16": False, "report_to": "none"} | fields
    args = KTOConfig(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_length=LENGTH,
        max_tokens_per_pass=LENGTH,
        head_memory_mib=HEAD_MIB,
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **values,
    )
    dataset = Dataset.from_list(rows)
    return KTOTrainer(
        model=tiny_model("llama", vocab_size=8000, **(sizes | {"tied": False} | (model or {}))),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear" if lora is True else lora, r=8
        )
        if lora
        else None,
    )
