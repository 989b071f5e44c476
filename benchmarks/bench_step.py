"""What a gate costs a whole training step: no gate, the gate after PyTorch's attention, the gate in our attention.

Contenders alternate in one process; a step is forward, backward and AdamW under bfloat16 autocast. As in training,
nobody waits for a step: it lasts from the GPU's end of the step before to its own. Prints medians, quartiles, how long
the host takes to launch a step (what is measured wherever that is longer) and peak memory, and appends a JSON line to
`--output`.

    python benchmarks/bench_step.py --size m                                            # GPU
    python benchmarks/bench_step.py --size tiny --rounds 1 --no-compile --device cpu    # does it run
"""

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from profiled import print_kernels
from torch import Tensor

from gated_attention.device import device_name
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import get_variant
from gated_attention.sizes import get_size
from gated_attention.spec import BlockSpec
from gated_attention.versions import library_versions

CONTENDERS = [
    "baseline:sdpa",
    "sdpa-headwise:sdpa",
    "sdpa-headwise:gated_attention",
    "sdpa-elementwise:sdpa",
    "sdpa-elementwise:gated_attention",
]
"""Variant and attention implementation."""
STEPS = 6
"""Steps a turn; the first is dropped."""


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(earlier: Any, later: Any) -> float:
    return 1e3 * (later - earlier) if isinstance(earlier, float) else earlier.elapsed_time(later)


class Contender:
    """A model with its optimizer, and the times of its steps."""

    def __init__(self, block: BlockSpec, implementation: str, args: argparse.Namespace, device: torch.device) -> None:
        config = make_config(get_size(args.size), block, vocab_size=args.vocab_size)
        self.model = build_model(config, 0).to(device).train()
        self.model.set_attn_implementation(implementation)
        mode = "reduce-overhead" if args.cuda_graphs else None
        self.run = self.model if args.no_compile else torch.compile(self.model, mode=mode)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.times_ms: list[float] = []
        self.host_ms: list[float] = []
        self.peak_gib = 0.0

    def turn(self, ids: Tensor, *, timed: bool) -> None:
        """A few steps; the parts of other contenders stay in memory, so the peak is counted from where it begins."""
        cuda = ids.device.type == "cuda"
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        marks = [_mark(cuda)]
        start = time.perf_counter()
        for _ in range(STEPS):
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = self.run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            marks.append(_mark(cuda))
        host_ms = 1e3 * (time.perf_counter() - start) / STEPS
        if cuda:
            torch.cuda.synchronize()
            self.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        if timed:
            self.times_ms += [_milliseconds(*pair) for pair in itertools.pairwise(marks[1:])]
            self.host_ms.append(host_ms)


def main() -> None:
    """Run the contenders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="the first is the measure"
    )
    parser.add_argument("--size", default="m")
    parser.add_argument("--batch-size", type=int, help="sequences a step; as `compare` takes them by default")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    compilation = parser.add_mutually_exclusive_group()
    compilation.add_argument("--no-compile", action="store_true")
    compilation.add_argument("--cuda-graphs", action="store_true", help="the host launches a step as a few graphs")
    parser.add_argument("--profile", action="store_true", help="print what a step spends its time in instead")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    args.batch_size = args.batch_size or SETTINGS[args.size].batch_size
    contenders = {}
    for name in args.contenders:
        variant, implementation = name.split(":")
        contenders[name] = Contender(get_variant(variant).block, implementation, args, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (args.batch_size, args.context), generator=generator).to(device)
    if args.profile:
        for name, contender in contenders.items():
            contender.turn(ids, timed=False)  # compiles
            print_kernels(name, partial(contender.turn, ids, timed=False), device, STEPS)
        return
    for round_index in range(args.rounds + 1):
        for contender in contenders.values():
            contender.turn(ids, timed=round_index > 0)
    record = {"benchmark": "step", **{k: v for k, v in vars(args).items() if k != "output"}, "contenders": {}}
    record |= {"device": device_name(device), "versions": library_versions()}
    base = next(iter(contenders.values()))
    for name, one in contenders.items():
        low, middle, high = quantiles(one.times_ms, n=4)
        over = middle / median(base.times_ms)
        memory = one.peak_gib / base.peak_gib if base.peak_gib else float("nan")
        print(
            f"{name:>34}: {middle:8.2f} ms ({low:.2f} to {high:.2f}, n = {len(one.times_ms)}), {over:.4f} of first; "
            f"host {median(one.host_ms):.1f} ms; memory above the start {one.peak_gib:.3f} GiB, {memory:.4f} of first"
        )
        record["contenders"][name] = {"step_ms": one.times_ms, "host_ms": one.host_ms, "peak_gib": one.peak_gib}
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


if __name__ == "__main__":
    main()
