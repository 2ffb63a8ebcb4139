"""The peak of what is allocated on a CPU, from the allocator's own record."""

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


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
