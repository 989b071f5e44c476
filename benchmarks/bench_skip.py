r"""What skipping closed gates gains: `skip` against dense gated attention and against attention without a gate.

A hard sigmoid per head, random pattern, causal, inputs laid out as in a model. `skip` includes its lists. Contenders
take turns in one process: `skip` at every share of open (token, head) pairs, the dense hard gate (`composed`), the
dense kernels under a sigmoid (they know no other gate), and PyTorch's attention alone, cuDNN's on a GPU. At each shape
`skip` is first compared with the dense hard gate. Writes one CSV row per contender, direction and shape: the median in
microseconds, and the speed over the fastest dense one and over attention alone. Times the share that is 1 if all that
is left out is gained.

    python benchmarks/bench_skip.py --output reports/bench_skip      # GPU, a few minutes
    python benchmarks/bench_skip.py --device cpu --threads 1 --dtype float32 --lengths 1024 2048 4096 --heads 8 \
        --batch-tokens 1 --groups 4 --head-dims 64  # a CPU
    python benchmarks/bench_skip.py --device cpu --dtype float32 --lengths 64 --batch-tokens 1 --rounds 1  # does it run
"""

import argparse
import csv
import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_attention import Inputs, _sdpa, _turn
from torch import Tensor
from torch.nn.attention import SDPBackend

from gated_attention import ops
from gated_attention.device import device_name
from gated_attention.ops.skip.rows import GateActivation

PLAIN = "no gate"


def make_inputs(length: int, head_dim: int, group: int, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Random q, k, v as (B, H, T, D) views of (B, T, H, D), and the gradient of the output, (B, T, H, D)."""
    torch.manual_seed(0)
    B, H = max(1, args.batch_tokens // length), args.heads

    def heads(count: int) -> Tensor:
        return torch.randn(B, length, count, head_dim, device=args.device, dtype=getattr(torch, args.dtype))

    q, k, v = (heads(count).transpose(1, 2).requires_grad_() for count in (H, H // group, H // group))
    return q, k, v, heads(H)


def make_logits(q: Tensor, share: float) -> Tensor:
    """Gate logits, (B, T, H, 1), of which a share is above -3."""
    B, H, T, _ = q.shape
    uniform = torch.rand(2, B, T, H, 1, device=q.device)
    logits = torch.where(uniform[0] < share, uniform[1] * 7 - 2.9, -3.0)
    return logits.to(q.dtype).requires_grad_()


def check(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, grad: Tensor) -> None:
    """Refuse to time an op that computes something else."""
    results = []
    for backend in ("skip", "composed"):
        out = ops.gated_attention(q, k, v, logits, activation="hard_sigmoid", backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v, logits), grad)))
    for name, ours, theirs in zip(("output", "dq", "dk", "dv", "dlogits"), *results, strict=True):
        error = ((ours - theirs).float().norm() / theirs.float().norm()).item()
        if not error <= 0.02:
            raise RuntimeError(f"skip is wrong: {name} is off by {error:.1e} of its norm")
    if results[0][0][logits[..., 0] <= -3].any():
        raise RuntimeError("skip is wrong: rows of closed gates are not 0")


def contenders(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shares: list[float]
) -> dict[str, tuple[Callable[[], Tensor], Any]]:
    """By name: the forward pass, (B, T, H, D), and what gets gradients."""
    device, open_logits = q.device, make_logits(q, 1.0)
    cudnn = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else None

    plain = partial(_sdpa, cudnn, Inputs(q, k, v, open_logits, grad))
    found: dict[str, tuple[Callable[[], Tensor], Any]] = {PLAIN: (plain, (q, k, v))}
    dense: dict[ops.GatedBackend, GateActivation] = {"composed": "hard_sigmoid", "shifted": "sigmoid"}
    if device.type == "cuda":
        dense["triton"] = "sigmoid"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        dense["hopper"] = "sigmoid"
    for name, activation in dense.items():
        run = partial(ops.gated_attention, q, k, v, open_logits, activation=activation, backend=name)
        found[f"dense, {name}"] = (run, (q, k, v, open_logits))
    for share in shares:
        logits = make_logits(q, share)
        check(q, k, v, logits, grad)
        run = partial(ops.gated_attention, q, k, v, logits, activation="hard_sigmoid", backend="skip")
        found[f"skip, {share:g} open"] = (run, (q, k, v, logits))
    return found


def _directions(run: Callable[[], Tensor], leaves: Any, grad: Tensor) -> dict[str, Callable[[], object]]:
    out = run()

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(run(), leaves, grad),
    }


def measure(length: int, head_dim: int, group: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of all contenders and directions at one shape."""
    *inputs, grad = make_inputs(length, head_dim, group, args)
    runs = {
        (name, direction): run
        for name, (forward, leaves) in contenders(*inputs, grad, args.shares).items()
        for direction, run in _directions(forward, leaves, grad).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for round_index in range(args.rounds + 1):
        for key in order:
            found = _turn(runs[key], grad.device)
            if round_index:  # the first is for compilation, plans and clocks
                times[key] += found
        shuffle(order)  # a long kernel lowers the clock for whoever follows it
    medians = {key: median(found) for key, found in times.items()}
    rows = []
    for (name, direction), time in medians.items():
        share = float(name.split()[1]) if name.startswith("skip") else 1.0
        plain = medians[PLAIN, direction]
        dense = min(x for (other, way), x in medians.items() if other.startswith("dense") and way == direction)
        rows.append(
            {
                "device": device_name(grad.device), "torch": torch.__version__, "dtype": args.dtype,
                "batch": grad.shape[0], "length": length, "heads": args.heads, "kv_heads": args.heads // group,
                "head_dim": head_dim, "contender": name, "direction": direction, "median_us": round(time, 1),
                "n": len(times[name, direction]), "share": share,
                "dense_over_this": round(dense / time, 4), "plain_over_this": round(plain / time, 4),
                "of_ideal_over_dense": round(dense / time * share, 4),
                "of_ideal_over_plain": round(plain / time * share, 4),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 1], help="query heads per key/value head")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--output", type=Path, default=Path("bench_skip"), help="name of .csv")
    parser.add_argument("--threads", type=int, help="of a CPU; PyTorch's choice unless given")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for shape in itertools.product(args.lengths, args.head_dims, args.groups):
        found = measure(*shape, args)
        rows += found
        for row in found:
            ratios = f"{row['dense_over_this']:.2f} x dense, {row['plain_over_this']:.2f} x no gate"
            ideal = f"{row['of_ideal_over_dense']:.2f} and {row['of_ideal_over_plain']:.2f} of the ideal"
            print(
                f"{shape} {row['contender']:>16} {row['direction']:>8}: {row['median_us']:>11,} us; {ratios}; {ideal}",
                flush=True,
            )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.with_suffix(".csv").open("w", newline="") as file:  # after every shape: nothing is lost
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
