"""Training throughput: `gated_attention.train` against a bare compiled PyTorch loop over the same model and batches.

Rounds of both alternate in one process, so that a slow moment of the machine hits both. Prints the
median tokens/s of each, their spread and the ratio, and appends a JSON line to `--output`.

    python benchmarks/bench_train.py --size tiny --steps 40           # CPU
    python benchmarks/bench_train.py --size s --steps 60 --rounds 3   # GPU
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import Dataset

from gated_attention.device import device_name, pick_device
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import get_variant
from gated_attention.sizes import get_size
from gated_attention.train.callbacks import MetricsCallback
from gated_attention.train.metrics import read_metrics
from gated_attention.train.text.data import collate
from gated_attention.train.trainer import TrainConfig, parameter_groups, train
from gated_attention.versions import library_versions

WARMUP = 10
"""Steps at the start of every round that are not timed: compilation, allocation, clocks."""


class RandomBlocks(Dataset[dict[str, torch.Tensor]]):
    """Token ids drawn once, in memory."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocab_size, (num_blocks, block_size), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


def bare_loop(model: torch.nn.Module, config: TrainConfig, data: RandomBlocks, device: torch.device) -> float:
    """Tokens/s of the least code that trains: compiled forward with the loss inside, fused AdamW, clipping."""
    model.to(device).train()
    step_model = torch.compile(model) if config.compile else model
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    bf16 = config.precision == "bfloat16"
    start = 0.0
    for step in range(config.steps):
        if step == WARMUP:
            synchronize(device)
            start = time.perf_counter()
        rows = [(step * config.batch_size + i) % len(data) for i in range(config.batch_size)]
        ids = data.ids[rows].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = step_model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    return (config.steps - WARMUP) * config.batch_size * data.ids.shape[1] / (time.perf_counter() - start)


def our_train(model: torch.nn.Module, config: TrainConfig, data: RandomBlocks, device: torch.device) -> float:
    """Tokens/s of `gated_attention.train`, read from the metrics that it writes itself."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        metrics = MetricsCallback(output / "metrics.jsonl")
        train(
            model,
            config,
            train_data=data,
            validation_data=data,
            collate=collate,
            tokenizer=None,
            output=output,
            seed=0,
            device=device,
            callbacks=[metrics],
        )
        lines = read_metrics(output / "metrics.jsonl")
    speeds = [line["tokens_per_s"] for line in lines if line["step"] > WARMUP and line.get("tokens_per_s")]
    return median(speeds)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(args: argparse.Namespace, config: TrainConfig, device: torch.device) -> Iterator[tuple[float, float]]:
    """(bare, ours) tokens/s, round by round."""
    size, block = get_size(args.size), get_variant(args.variant).block
    data = RandomBlocks(config.batch_size * 50, size.context, size.vocab_size)
    for _ in range(args.rounds):
        speeds = []
        for run in (bare_loop, our_train):
            torch.compiler.reset()
            model = build_model(make_config(size, block), seed=0)
            speeds.append(run(model, config, data, device))
        yield speeds[0], speeds[1]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--variant", default="sdpa-headwise")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device, settings = pick_device(args.device), SETTINGS[args.size]
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size or settings.batch_size,
        learning_rate=settings.learning_rate,
        precision="bfloat16" if device.type == "cuda" else "float32",
        compile=not args.no_compile,
        evaluate_every=args.steps + 1,
        checkpoint_every=args.steps + 1,
    )
    pairs = list(rounds(args, config, device))
    bare, ours = ([pair[i] for pair in pairs] for i in (0, 1))
    ratio = median(b / a for a, b in pairs)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    record = {
        "benchmark": "train",
        "size": args.size,
        "variant": args.variant,
        "device": device_name(device),
        "precision": config.precision,
        "batch_size": config.batch_size,
        "steps": args.steps,
        "rounds": args.rounds,
        "bare_tokens_per_s": bare,
        "train_tokens_per_s": ours,
        "median_ratio": ratio,
        "peak_memory_gib": memory,
        "versions": library_versions(),
    }
    print(
        f"{record['device']}, size {args.size}, {args.variant}, {config.precision}, batch {config.batch_size}, "
        f"{args.steps} steps, {args.rounds} rounds"
    )
    for name, speeds in (("bare compiled loop", bare), ("gated_attention.train", ours)):
        print(f"  {name:24s} {median(speeds):12,.0f} tokens/s   ({min(speeds):,.0f} to {max(speeds):,.0f})")
    print(f"  median ratio {ratio:.3f}")
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
