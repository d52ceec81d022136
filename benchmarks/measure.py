"""Time and peak memory of a function, for the benchmarks beside this file."""

import gc
import time
from collections.abc import Callable
from itertools import accumulate
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


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one call on an accelerator; CPU seconds on the CPU, which other processes disturb less."""
    if device.type != "cpu":
        return _seconds_once(function, device)
    start = time.process_time()
    function()
    return time.process_time() - start


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
    events = record.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    del record, events
    gc.collect()  # the record is full of cycles, and takes gigabytes where a call makes a million operations
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
