"""Time and peak memory of a function, for the benchmarks beside this file."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(function: Callable[[], Any], repeats: int, device: torch.device, limit: float = float("inf")) -> float:
    """Best wall time of `repeats` calls after one to warm up: the least disturbed one.

    No further call is made once they took `limit` seconds together; the first one counts if it alone did.
    """
    warm, times = _seconds_once(function, device), []
    while warm + sum(times) < limit and len(times) < repeats:
        times.append(_seconds_once(function, device))
    return min(times, default=warm)


def _seconds_once(function: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that tensors made by the call held at once, by the allocator's own records."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
