"""Training throughput of a mixture of experts: the grouped matrix product against a loop over experts.

All contenders train a copy of one model in one process, compiled and not; their rounds alternate, so that a
slow moment of the machine hits all. Prints the median tokens/s of each with its spread, the median of the
round-wise ratios, and which operators ran, and appends a JSON line to `--output`.

    python benchmarks/bench_moe.py --size moe-tiny --batch-size 2 --steps 2 --rounds 2        # CPU
    python benchmarks/bench_moe.py --output reports/bench_moe.jsonl                           # GPU, size moe-s
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from bench_train import RandomBlocks, synchronize

from gated_attention.device import device_name, pick_device
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import get_variant
from gated_attention.sizes import ModelSize, get_size
from gated_attention.train.auxiliary import AuxiliaryLosses
from gated_attention.train.quiet import quiet
from gated_attention.train.trainer import TrainConfig, parameter_groups
from gated_attention.versions import library_versions

IMPLEMENTATIONS = {"grouped_mm": "grouped_mm", "loop": "eager"}
"""Name of a contender to what transformers calls it."""

OPERATORS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "aten::mm")
"""Whose calls are counted: the grouped product, transformers' loop in its place, and every plain product."""


@dataclass
class Contender:
    """One way to run the experts: its model, its optimizer step, and what was measured of it."""

    implementation: str
    compiled: bool
    step: Callable[[torch.Tensor], torch.Tensor]
    speeds: list[float] = field(default_factory=list)
    memory_gib: float | None = None
    operators: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The implementation, and whether it is compiled."""
        return f"{self.implementation}, compiled" if self.compiled else self.implementation


def make_contender(size: ModelSize, args: argparse.Namespace, device: torch.device, name: str, compiled: bool) -> Any:
    """A fresh model, equal for every contender, and the step that trains it as `gated_attention.train` does."""
    config = TrainConfig(steps=1, batch_size=args.batch_size, learning_rate=SETTINGS[args.size].learning_rate)
    model = build_model(make_config(size, get_variant(args.variant).block), seed=0)
    model.set_experts_implementation(IMPLEMENTATIONS[name])
    model.to(device).train()
    losses = AuxiliaryLosses(model, config.auxiliary)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(config.beta1, config.beta2), fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"), losses.gather():
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + losses.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(name, compiled, step)


def time_round(contender: Contender, data: RandomBlocks, args: argparse.Namespace, device: torch.device) -> None:
    """One round of one contender; its first step, in which clocks and caches settle, is not timed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = 0.0
    for number, ids in enumerate(batches(data, args, device)):
        if number == 1:
            synchronize(device)
            start = time.perf_counter()
        contender.step(ids)
    synchronize(device)
    contender.speeds.append(args.steps * args.batch_size * data.ids.shape[1] / (time.perf_counter() - start))
    if device.type == "cuda":
        contender.memory_gib = torch.cuda.max_memory_allocated(device) / 2**30


def batches(data: RandomBlocks, args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """One batch more than is timed, on the device."""
    rows = torch.arange((args.steps + 1) * args.batch_size) % len(data)
    return [data.ids[part].to(device) for part in rows.split(args.batch_size)]


def count_operators(contender: Contender, ids: torch.Tensor) -> dict[str, int]:
    """Calls of each of `OPERATORS` in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        contender.step(ids)
    calls = {event.key: event.count for event in profile.key_averages()}
    return {name: calls.get(name, 0) for name in OPERATORS}


def ratios(contenders: list[Contender], compiled: bool) -> list[float]:
    """Round by round, the speed of the grouped product over that of the loop."""
    grouped, loop = (
        next(c for c in contenders if (c.implementation, c.compiled) == (name, compiled)) for name in IMPLEMENTATIONS
    )
    return [left / right for left, right in zip(grouped.speeds, loop.speeds, strict=True)]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="moe-s")
    parser.add_argument("--variant", default="baseline")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device, size = pick_device(args.device), get_size(args.size)
    args.batch_size = args.batch_size or SETTINGS[args.size].batch_size
    # Around the loop the compiler makes a graph for each layer; by default it would give up after eight.
    torch._dynamo.config.recompile_limit = 8 * size.num_hidden_layers
    torch._inductor.config.quiesce_async_compile_pool = False  # as in `train.trainer.train`
    data = RandomBlocks(args.batch_size * 10, size.context, size.vocab_size)
    modes = (False,) if args.no_compile else (False, True)
    contenders = [make_contender(size, args, device, name, mode) for mode in modes for name in IMPLEMENTATIONS]
    warm = batches(data, args, device)[0]
    for contender in contenders:
        start = time.perf_counter()
        with quiet():
            first = contender.step(warm).item()
        contender.operators = count_operators(contender, warm)
        print(f"{contender.name}: first loss {first:.4f}, ready after {time.perf_counter() - start:.0f} s", flush=True)
    for _ in range(args.rounds):
        for contender in contenders:
            time_round(contender, data, args, device)
    record = {
        "benchmark": "moe",
        "size": args.size,
        "variant": args.variant,
        "device": device_name(device),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "context": size.context,
        "steps": args.steps,
        "rounds": args.rounds,
        "tokens_per_s": {c.name: c.speeds for c in contenders},
        "median_ratio": {"compiled" if mode else "plain": median(ratios(contenders, mode)) for mode in modes},
        "operators": {c.name: c.operators for c in contenders},
        "peak_memory_gib": {c.name: c.memory_gib for c in contenders},
        "versions": library_versions(),
    }
    report(record)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def report(record: dict[str, Any]) -> None:
    """Print a record for people."""
    print(
        f"{record['device']}, size {record['size']}, {record['variant']}, {record['precision']}, "
        f"batch {record['batch_size']} x {record['context']}, {record['rounds']} rounds of {record['steps']} steps"
    )
    for name, speeds in record["tokens_per_s"].items():
        calls = ", ".join(f"{count} {operator}" for operator, count in record["operators"][name].items() if count)
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}, n = {len(speeds)}"
        print(f"  {name:22s} {median(speeds):12,.0f} tokens/s   ({spread})   a step calls {calls or 'none of them'}")
    for mode, ratio in record["median_ratio"].items():
        print(f"  grouped_mm over loop, {mode}: median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
