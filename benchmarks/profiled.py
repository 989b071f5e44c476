"""What a benchmark's run spends its time in; `--profile` of the benchmarks prints it."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

PRINTED = 40


def print_kernels(name: str, run: Callable[[], object], device: torch.device, steps: int = 1) -> None:
    """The kernels (operators on a CPU) that `run` spends most time in, by each of the steps that it takes."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    # On a GPU an operator's own device time is that of its kernels, which are listed themselves.
    events = [event for event in profiler.key_averages() if not on_gpu or event.device_type == DeviceType.CUDA]
    events = [event for event in events if not event.is_user_annotation]  # spans of kernels that are listed

    def milliseconds(event: FunctionEventAvg) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / steps

    total, count = sum(map(milliseconds, events)), sum(event.count for event in events)
    print(f"{name}: {total:.2f} ms in {count / steps:g} calls")
    for event in sorted(events, key=milliseconds, reverse=True)[:PRINTED]:
        print(f"  {milliseconds(event):9.3f} ms {event.count / steps:7g} x  {event.key[:110]}")
