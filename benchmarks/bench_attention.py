"""What a gate costs attention: our backends against cuDNN's attention alone and with a gate behind it.

All contenders take turns in one process, each with its backend pinned, on the same random inputs laid out as a model
lays them out. The device waits before every turn until the host has launched all of it; a turn in which it did not wait
long enough is not counted. Writes one CSV row a contender, direction and shape, with median and quartiles in
microseconds, and a figure.

    python benchmarks/bench_attention.py --output reports/bench_attention                   # GPU, a few minutes
    python benchmarks/bench_attention.py --lengths 64 --batch-tokens 64 --rounds 1 --device cpu   # does it run
"""

import argparse
import csv
import itertools
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gated_attention import ops
from gated_attention.device import device_name

PLAIN = "cudnn, no gate"
TURN = 5
"""Runs timed one after the other in a turn; the first of them is dropped."""
WAITS = (8_000_000, 32_000_000, 128_000_000)
"""Clock cycles, from about 4 ms on, for which the device waits while the host launches a turn."""


class Shape(NamedTuple):
    """One point of the grid; `group` query heads read one key/value head."""

    length: int
    head_dim: int
    group: int
    gate: str


class Inputs(NamedTuple):
    """Heads as (B, H, T, D) views of (B, T, H, D), gate logits, the gradient of the output as (B, T, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate_logits: Tensor
    grad: Tensor


def grid(args: argparse.Namespace) -> list[Shape]:
    """At every length the first head width, group and gate, and each of the others in place of one of them."""
    axes = (args.head_dims, args.groups, args.gates)
    if args.full:
        return [Shape(*values) for values in itertools.product(args.lengths, *axes)]
    first = tuple(axis[0] for axis in axes)
    points = [first, *((*first[:i], v, *first[i + 1 :]) for i, axis in enumerate(axes) for v in axis[1:])]
    return [Shape(length, *point) for length in args.lengths for point in points]


def make_inputs(shape: Shape, batch_tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random inputs of `batch_tokens` tokens and `width` channels in all heads together."""
    torch.manual_seed(0)
    B, T, D = max(1, batch_tokens // shape.length), shape.length, shape.head_dim
    H = max(shape.group, width // D)

    def heads(count: int) -> Tensor:
        return torch.randn(B, T, count, D, device=device, dtype=dtype)

    channels = 1 if shape.gate == "headwise" else D
    q, k, v = (heads(count).transpose(1, 2).requires_grad_() for count in (H, H // shape.group, H // shape.group))
    logits = torch.randn(B, T, H, channels, device=device, dtype=dtype).requires_grad_()
    return Inputs(q, k, v, logits, heads(H))


Contender = Callable[[Inputs], Tensor]
"""Forward pass, (B, T, H, D)."""


def _sdpa(backend: SDPBackend | None, x: Inputs) -> Tensor:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        grouped = x.k.shape[1] != x.q.shape[1]
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _gate(y: Tensor, gate_logits: Tensor) -> Tensor:
    return y * torch.sigmoid(gate_logits.float()).to(y.dtype)


torch._dynamo.config.recompile_limit = 10_000  # one graph a shape; beyond the limit PyTorch would run eagerly
torch._functorch.config.donated_buffer = False  # backward passes are run again and again
_compiled_gate = torch.compile(_gate, dynamic=False)
_compiled_flex = torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def _flex(x: Inputs) -> Tensor:
    mask = _causal_blocks(x.q.shape[2], x.q.device)
    run = partial(_compiled_flex, block_mask=mask, enable_gqa=x.k.shape[1] != x.q.shape[1])
    return run(x.q, x.k, x.v).transpose(1, 2)


def _ours(backend: ops.GatedBackend, x: Inputs) -> Tensor:
    return ops.gated_attention(x.q, x.k, x.v, x.gate_logits, backend=backend)


def contenders(device: torch.device, with_flex: bool) -> dict[str, Contender]:
    """By name; without a GPU PyTorch chooses the kernel."""
    cudnn, flash = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else (None, None)
    found: dict[str, Contender] = {
        PLAIN: partial(_sdpa, cudnn),
        "cudnn + eager gate": lambda x: _gate(_sdpa(cudnn, x), x.gate_logits),
        "cudnn + compiled gate": lambda x: _compiled_gate(_sdpa(cudnn, x), x.gate_logits),
        "flash, no gate": partial(_sdpa, flash),
        "ours, shifted": partial(_ours, "shifted"),
    }
    if device.type == "cuda":
        found["ours, triton"] = partial(_ours, "triton")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        found["ours, hopper"] = partial(_ours, "hopper")
    if with_flex:
        found["flex, no gate"] = _flex
    return found


def _turn(run: Callable[[], object], device: torch.device) -> list[float]:
    if device.type != "cuda":
        times = []
        for _ in range(TURN):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        return times[1:]
    for cycles in WAITS:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(TURN + 1)]
        torch.cuda._sleep(cycles)
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        host_led = not events[0].query()
        torch.cuda.synchronize()
        if host_led:
            return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]
    raise RuntimeError("the host does not launch a turn ahead of the device, so its times would be the host's")


def _directions(contender: Contender, x: Inputs) -> dict[str, Callable[[], object]]:
    leaves = [x.q, x.k, x.v, x.gate_logits]
    plain = torch.autograd.grad(contender(x), leaves, x.grad, allow_unused=True)[3] is None
    leaves = leaves[:3] if plain else leaves
    out = contender(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return contender(x)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, x.grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(contender(x), leaves, x.grad),
    }


def measure(shape: Shape, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Rows of all contenders and directions at one shape; what cannot run says so and is left out."""
    x = make_inputs(shape, args.batch_tokens, args.width, device, getattr(torch, args.dtype))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, contender in contenders(device, shape.length in args.flex).items():
        try:
            runs |= {(name, direction): run for direction, run in _directions(contender, x).items()}
        except (RuntimeError, ValueError) as error:
            print(f"{name} at {shape}: {str(error).splitlines()[0]}", flush=True)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for round_index in range(args.rounds + 1):
        for key in order:
            found = _turn(runs[key], device)
            if round_index:  # the first is for compilation, plans and clocks
                times[key] += found
        shuffle(order)  # a long kernel lowers the clock for whoever follows it
    rows = []
    for (name, direction), found in times.items():
        low, _, high = quantiles(found, n=4)
        rows.append(
            {
                "device": device_name(device), "torch": torch.__version__, "dtype": args.dtype,
                "batch": x.q.shape[0], "length": shape.length, "heads": x.q.shape[1], "kv_heads": x.k.shape[1],
                "head_dim": shape.head_dim, "gate": shape.gate, "contender": name, "direction": direction,
                "median_us": round(median(found), 1), "quartile_1_us": round(low, 1), "quartile_3_us": round(high, 1),
                "n": len(found),
                "plain_over_this": round(median(times[PLAIN, direction]) / median(found), 4),
            }
        )  # fmt: skip
    return rows


def _panel(row: dict[str, object]) -> str:
    group = int(row["heads"]) // int(row["kv_heads"])  # type: ignore[call-overload]
    return f"{row['gate']}, head width {row['head_dim']}" + (f", {group} queries a key" if group > 1 else "")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Speed relative to cuDNN without a gate, by length: a panel for each direction, gate, head width and group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(map(_panel, rows)))  # in the order of the grid
    directions = ("forward", "backward", "both")
    figure = Figure(figsize=(11, 2.6 * len(panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(directions), squeeze=False, sharey=True)
    names = [name for name in dict.fromkeys(str(r["contender"]) for r in rows) if name != PLAIN]
    for panel, line in zip(panels, axes, strict=True):
        for direction, axis in zip(directions, line, strict=True):
            axis.axhline(1.0, color="0.6", linewidth=0.8)
            for index, name in enumerate(names):
                points = [
                    (r["length"], r["plain_over_this"])
                    for r in rows
                    if (r["contender"], r["direction"], _panel(r)) == (name, direction, panel)
                ]
                if points:
                    axis.plot(
                        *zip(*sorted(points), strict=True), marker="o", markersize=3, color=f"C{index}", label=name
                    )
            axis.set_xscale("log", base=2)
            axis.set_xticks(
                *zip(*((n, f"{n:,}") for n in sorted({r["length"] for r in rows})), strict=True), minor=False
            )
            axis.set_title(f"{direction}, {panel}", fontsize=8)
            axis.set_xlabel("tokens a sequence", fontsize=8)
            axis.tick_params(labelsize=7)
        line[0].set_ylabel("speed; 1 = cuDNN without a gate", fontsize=8)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(path)


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 256])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--gates", nargs="+", default=["headwise", "elementwise"])
    parser.add_argument("--full", action="store_true", help="all combinations, not one axis at a time")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=2048, help="channels of all query heads together")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--flex", type=int, nargs="*", default=[], metavar="LENGTH", help="FlexAttention, slow to compile"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_attention"), help="name of .csv and .svg")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[dict[str, object]] = []
    for shape in grid(args):
        found = measure(shape, args, device)
        rows += found
        for row in found:
            if row["direction"] == "both":
                others = {r["direction"]: r["plain_over_this"] for r in found if r["contender"] == row["contender"]}
                ratios = ", ".join(f"{direction} {ratio:.3f}" for direction, ratio in others.items())
                print(
                    f"{tuple(shape)} {row['contender']:>22}: both {row['median_us']:,} us; speed {ratios}", flush=True
                )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.with_suffix(".csv").open("w", newline="") as file:  # after every shape: nothing is lost
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
