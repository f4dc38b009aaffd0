"""The timer on a GPU: CUDA events around one call, the last cache flushed before it, inputs rotated.

As in :mod:`benchmarks.timer`, every round samples each function once, in a new order, and what is reported
is the median of the paired ratios to the baseline. Before each sample the device is kept busy (memory beyond
the L2 cache is read, then come idle cycles), so that the host has put the whole call on the stream before its
first kernel starts: host overhead is not what these times hold. A function that waits for the device shows
that wait in full. Read, not written: lines that must go back to memory first (50 MB, 15 us on an H100) would
be charged to whoever reads, and what a decode step finds in the cache is other layers' weights.

On a CPU the same code runs with a wall clock; its tests do so.
"""

from __future__ import annotations

import gc
import random
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timer import Spread, Timing

FLUSH_BYTES = 256 << 20  # beyond the L2 of every card we ship for
IDLE_CYCLES = 2_000_000  # about 1 ms in which the host may run ahead, a whole training step

Function = Callable[[int], Any]  # takes the number of the call: which of the rotated inputs to use


class Clock:
    """Start and stop marks on a device, and the seconds between them once it is done."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.buffer = torch.zeros((FLUSH_BYTES if self.cuda else 1 << 20) // 4, device=device)

    def prepare(self) -> None:
        """Flushes the cache and lets the host run ahead."""
        self.buffer.sum()
        if self.cuda:
            torch.cuda._sleep(IDLE_CYCLES)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        return 1e-3 * start.elapsed_time(stop) if self.cuda else stop - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure(
    functions: dict[str, Function],
    baseline: str,
    device: torch.device,
    *,
    budget: float,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Times ``functions`` for about ``budget`` seconds in all, against the one named ``baseline``."""
    clock = Clock(device)
    for function in functions.values():
        for number in range(3):
            function(number)
    clock.wait()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names, shuffle = list(functions), random.Random(0)
    started, number = time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while number < max_rounds and (number < min_rounds or time.perf_counter() - started < budget):
            shuffle.shuffle(names)
            marks = {}
            for name in names:
                clock.prepare()
                start = clock.mark()
                functions[name](number)
                marks[name] = start, clock.mark()
            clock.wait()
            for name, (start, stop) in marks.items():
                samples[name].append(clock.seconds(start, stop))
            number += 1
    finally:
        gc.enable()
    base = samples[baseline]
    return {
        name: Timing(
            Spread.of(times),
            Spread.of([mine / other for mine, other in zip(times, base, strict=True)]),
            number,
            1,
        )
        for name, times in samples.items()
    }


def graphed(function: Callable[[torch.Tensor], torch.Tensor], inputs: list[torch.Tensor]) -> Function:
    """The function as a CUDA graph per input, replayed by number; on a CPU, the plain call."""
    if inputs[0].device.type != "cuda":
        return lambda number: function(inputs[number % len(inputs)])
    graphs = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(x)
        graphs.append(graph)
    return lambda number: graphs[number % len(graphs)].replay()


def kernels(function: Function, device: torch.device, calls: int = 4) -> list[dict[str, Any]]:
    """What one call has the device do, by torch's profiler: every kernel's name, launches and seconds, the
    longest first; the cache is flushed before each call. On a CPU: our operators.
    """
    clock = Clock(device)

    def seen(call: Function | None) -> list[tuple[str, float]]:
        with profile(activities=[ProfilerActivity.CUDA if clock.cuda else ProfilerActivity.CPU]) as profiler:
            for number in range(calls):
                clock.prepare()
                if call is not None:
                    call(number)
            clock.wait()
        events = profiler.events() or ()
        if clock.cuda:
            return [(e.name, 1e-6 * e.device_time) for e in events if e.device_type == DeviceType.CUDA]
        return [(e.name, 1e-6 * e.cpu_time) for e in events if e.name.startswith("moa_ops::")]

    flushes = {signature for signature, _ in seen(None)}
    return summed([launch for launch in seen(function) if launch[0] not in flushes], calls)


def summed(launches: list[tuple[str, float]], calls: int) -> list[dict[str, Any]]:
    """Launches, signature and seconds, of so many calls, by the kernel's name; the longest first."""
    times: dict[str, list[float]] = {}
    for signature, seconds in launches:
        name = signature if signature.startswith("moa_ops::") else kernel_name(signature)
        times.setdefault(name, []).append(seconds)
    found = [{"name": n, "launches": len(t) / calls, "seconds": sum(t) / calls} for n, t in times.items()]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def kernel_name(signature: str) -> str:
    """The name alone of a kernel that the profiler names in full, with its types and arguments."""
    plain = signature.replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void )?(?:\w+::)*(\w+)", plain)
    return found[1] if found else signature
