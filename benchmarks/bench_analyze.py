"""Cost of an inspection: `inspect_model` against a plain forward pass of the same model over the same tokens.

Rounds of both alternate in one process. A round reads `--batches` batches; its time ends when the device is idle.
Peak memory is that of the allocator over a round. Prints the medians and the ratio, and appends a JSON line to
`--output`. `--profile` prints, instead, the kernels that take most of a round's time.

    python benchmarks/bench_analyze.py                                                    # the 1.7B shape on a GPU
    python benchmarks/bench_analyze.py --gate headwise --batch-size 1 --levels summary
    python benchmarks/bench_analyze.py --layers 4 --hidden-size 256 --heads 4 --context 1024 --batches 8   # CPU
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from profiled import print_kernels
from transformers import PreTrainedModel

from gated_attention.analysis import inspect_model
from gated_attention.analysis.inspect import Level
from gated_attention.device import device_name, pick_device
from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.spec import GateSpec
from gated_attention.versions import library_versions

GATES = {"none": (), "headwise": (GateSpec(granularity="headwise"),), "elementwise": (GateSpec(),)}


def build(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A model with random weights; Table 7's 1.7B-28L by default."""
    config = GatedQwen3Config(
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 2),
        head_dim=args.hidden_size // args.heads,
        vocab_size=32_768,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        gates=GATES[args.gate],
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return GatedQwen3ForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def plain_forward(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    """What an inspection cannot do without: the decoder over every batch, without logits."""
    device = next(model.parameters()).device
    for batch in batches:
        model.base_model(input_ids=batch.to(device, non_blocking=True), use_cache=False)


def measure(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds, and the allocator's peak in GiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    run()
    if device.type != "cuda":
        return time.perf_counter() - start, None
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--gate", choices=sorted(GATES), default="elementwise")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=4, help="4 x 4096 tokens are what `analyze` reads at once")
    parser.add_argument("--levels", nargs="+", choices=get_args(Level), default=list(get_args(Level)))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", action="store_true", help="print where time goes instead")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device = pick_device(args.device)
    model = build(args, device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batches, args.batch_size, args.context)
    batches = list(torch.randint(0, model.config.vocab_size, shape, generator=generator))
    runs: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain_forward(model, batches),
        **{level: partial(inspect_model, model, batches, level=level) for level in args.levels},
    }
    for run in runs.values():
        run()  # kernels are chosen, memory is taken
    if args.profile:
        for name, run in runs.items():
            print_kernels(name, run, device)
        return
    rounds = [{name: measure(run, device) for name, run in runs.items()} for _ in range(args.rounds)]
    tokens = args.batches * args.batch_size * args.context
    print(
        f"{device_name(device)}, {args.layers} layers, hidden {args.hidden_size}, {args.heads} heads, "
        f"gate {args.gate}, "
        f"{next(model.parameters()).dtype}, {args.batches} batches of {args.batch_size} x {args.context}, "
        f"{args.rounds} rounds"
    )
    record = {
        "benchmark": "analyze",
        "device": device_name(device),
        "dtype": str(next(model.parameters()).dtype),
        **{name: value for name, value in vars(args).items() if name not in ("output", "device", "profile", "levels")},
        "versions": library_versions(),
    }
    for name in runs:
        seconds = [taken[name][0] for taken in rounds]
        ratio = median(taken[name][0] / taken["plain forward"][0] for taken in rounds)
        peaks = [peak for taken in rounds if (peak := taken[name][1]) is not None]
        memory = f"{max(peaks):8.2f} GiB" if peaks else ""
        print(f"  {name:14s} {tokens / median(seconds):12,.0f} tokens/s   {ratio:6.3f} x plain   {memory}")
        key = name.replace(" ", "_")
        record |= {f"{key}_s": seconds, f"{key}_ratio": ratio, f"{key}_peak_memory_gib": max(peaks, default=None)}
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
