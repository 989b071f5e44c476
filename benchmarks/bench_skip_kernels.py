r"""The kernels that skip closed gates, side by side: are they right, and how fast is each?

First correctness: output and all gradients against float64 by the rule of the tests (twice the error of plain PyTorch),
with NaN in closed rows and in what kernels are to fill, at lengths that fill no tile, 1, 4 and 8 query heads per key
head, head widths 64 and 128; then 20 runs at full size, which must agree in every bit, and `hopper` with `triton` to
rounding. A failure is a line of the table, and exit code 1 at the end. Then times, in microseconds, lists included,
contenders in turns in one process: cuDNN's attention without a gate, the dense kernel under a sigmoid, and each kernel
at each share of open (token, head) pairs. `--tune` adds other ways to cut heads for Hopper.

    python benchmarks/bench_skip_kernels.py           # a GPU, a few minutes
    python benchmarks/bench_skip_kernels.py --device cpu --lengths 256 --batch-tokens 256 --rounds 1   # does it run
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from bench_attention import Inputs, _sdpa, _turn
from bench_skip import make_inputs, make_logits
from torch import Tensor
from torch.nn.attention import SDPBackend

from gated_attention import ops
from gated_attention.ops import reference
from gated_attention.ops.skip.op import skip_op
from gated_attention.spec import GateSpec

HARD = GateSpec(granularity="headwise", activation="hard_sigmoid")
SHAPES = [(1, 1, 1), (777, 777, 4), (1500, 1500, 1), (640, 1003, 8), (1000, 1000, 4)]  # T, S, group
TUNED = {
    64: [(128, 4, 2, False, 3), (64, 6, 2, False, 3), (128, 2, 2, False, 2)],
    128: [(128, 2, 2, True, 2), (64, 3, 2, True, 3), (64, 3, 2, False, 2)],
}  # as `hopper.forward_launch.Blocks`


def skip(kernels: str, q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """(B, T, H, D)."""
    scale = q.shape[-1] ** -0.5
    out: Tensor = skip_op(q, k, v, logits, "hard_sigmoid", -3.0, True, scale, kernels)[0]
    return out.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """The same in plain PyTorch, (B, T, H, D)."""
    return ops.gated_attention(q, k, v, logits, activation="hard_sigmoid", backend="composed")


def truth(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """The definition, (B, T, H, D)."""
    return reference.gate(reference.attention(q, k, v)[0].transpose(1, 2), logits, HARD)


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k, v and the logits."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(kernels: str, shape: tuple[int, int, int], head_dim: int, share: float, args: argparse.Namespace) -> str:
    """What is wrong, or the largest of the errors over what they may be."""
    T, S, group = shape
    generator = torch.Generator(args.device).manual_seed(T)
    make = partial(torch.randn, generator=generator, device=args.device)
    q, k, v, grad = (
        make(2, n, h, head_dim).to(args.dtype) for n, h in ((T, 2 * group), (S, 2), (S, 2), (T, 2 * group))
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = make_logits(q, share).detach()
    shut = (logits <= -3)[..., 0]
    exact = with_gradients(truth, [x.double() for x in (q, k, v, logits)], grad)
    plain = with_gradients(dense, [q, k, v, logits], grad)
    q = q.transpose(1, 2).masked_fill(shut[..., None], torch.nan).transpose(1, 2)
    grad = grad.masked_fill(shut[..., None], torch.nan)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills empty memory with NaN
    found = with_gradients(partial(skip, kernels), [q, k, v, logits], grad)
    torch.use_deterministic_algorithms(False)
    if found[0][shut].any() or found[1].transpose(1, 2)[shut].any() or found[4][shut].any():
        return "WRONG: closed rows are not 0"
    worst = 0.0
    for name, ours, theirs, true in zip(("out", "dq", "dk", "dv", "ds"), found, plain, exact, strict=True):
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        rounding = 1e-5 if true.abs().max() > 1e-9 else 8 * torch.finfo(args.dtype).eps  # of a gradient that is 0
        allowed = 2 * allowed + rounding * max(true.abs().max().item(), exact[3].abs().max().item(), 1e-30)
        if not error <= allowed:
            return f"WRONG: {name} is off by {error:.1e}, allowed {allowed:.1e}"
        worst = max(worst, error / allowed)
    return f"right, at most {worst:.2f} of what is allowed"


def agree(kernels: list[str], inputs: list[Tensor]) -> str:
    """Whether 20 runs of the last kernels give the same bits, and the first ones the same to rounding."""
    with torch.no_grad():
        first = skip(kernels[-1], *inputs)
        if not all(torch.equal(first, skip(kernels[-1], *inputs)) for _ in range(20)):
            return "WRONG: runs differ"
        other = skip(kernels[0], *inputs)
    error = ((first - other).float().norm() / other.float().norm()).item()
    return f"right, {error:.1e} from {kernels[0]}" if error < 5e-3 else f"WRONG: {error:.1e} from {kernels[0]}"


def contenders(inputs: list[Tensor], grad: Tensor, kernels: list[str], args: argparse.Namespace) -> Iterator[tuple]:
    """(Name, share of open rows, forward pass, leaves)."""
    q, k, v = inputs
    opened = make_logits(q, 1.0)
    cudnn = SDPBackend.CUDNN_ATTENTION if q.device.type == "cuda" else None
    yield "no gate", 1.0, partial(_sdpa, cudnn, Inputs(q, k, v, opened, grad)), inputs
    yield "dense", 1.0, partial(ops.gated_attention, q, k, v, opened), [*inputs, opened]
    for share in args.shares:
        logits = make_logits(q, share)
        for name in kernels:
            yield name, share, partial(skip, name, q, k, v, logits), [*inputs, logits]
        if args.tune and "hopper" in kernels:
            for cut in TUNED[q.shape[-1]]:
                yield str(cut), share, partial(cut_otherwise, cut, q, k, v, logits), [*inputs, logits]


def cut_otherwise(cut: tuple[int, int, int, bool, int], *inputs: Tensor) -> Tensor:
    """`hopper` with other blocks."""
    from gated_attention.ops.hopper import skip_forward_launch as launch

    head_dim = inputs[0].shape[-1]
    shipped = launch.BLOCKS[head_dim]
    launch.BLOCKS[head_dim] = launch.Blocks(*cut)
    try:
        return skip("hopper", *inputs)
    finally:
        launch.BLOCKS[head_dim] = shipped


def measure(inputs: list[Tensor], grad: Tensor, kernels: list[str], args: argparse.Namespace) -> None:
    """Print a line per contender and share: time, speed over the dense ones, and that as a share of the ideal."""
    runs: dict[tuple[str, float, str], Callable[[], object]] = {}
    for name, share, run, leaves in contenders(inputs, grad, kernels, args):
        out = run()
        runs[name, share, "forward"] = torch.no_grad()(run)
        if name in ("no gate", "dense", kernels[-1]):  # the backward passes of all kernels are the same
            runs[name, share, "backward"] = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
    times: dict[tuple[str, float, str], list[float]] = {key: [] for key in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(args.rounds + 1):
        for key in order:
            found = _turn(runs[key], grad.device)
            times[key] += found if turn else []  # the first is for compilation, plans and clocks
        shuffle(order)
    for (name, share, direction), found in times.items():
        time = median(found)
        plain, gated = (median(times[base, 1.0, direction]) / time for base in ("no gate", "dense"))
        print(
            f"  {direction:<8} {name:<24} {share:>5g} {time:>9.0f} us {plain:5.2f} x no gate ({plain * share:4.2f})"
            f" {gated:5.2f} x dense ({gated * share:4.2f})",
            flush=True,
        )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 1], help="query heads per key/value head")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tune", action="store_true", help="time other blocks for Hopper too")
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    kernels = ["eager"] if not on_gpu else ["triton"]
    if on_gpu and torch.cuda.get_device_capability(args.device) == (9, 0):
        kernels.append("hopper")
    args.dtype = torch.bfloat16
    said = []
    shares = (0.0, 0.01, 0.25, 0.5, 0.9, 1.0)
    for name, head_dim in itertools.product(kernels, args.head_dims):
        found = []
        for shape, share in itertools.product(SHAPES if on_gpu else SHAPES[:2], shares):
            found.append(check(name, shape, head_dim, share, args))
            if found[-1].startswith("WRONG"):
                print(f"{name}, T, S, group {shape}, D {head_dim}, {share:g} open: {found[-1]}", flush=True)
        print(f"{name}, D {head_dim}: {len(found)} checks; {max(found)}", flush=True)
        said += found
    args.dtype = "bfloat16"
    for length, head_dim, group in itertools.product(args.lengths, args.head_dims, args.groups):
        *inputs, grad = make_inputs(length, head_dim, group, args)
        print(f"{tuple(inputs[0].shape)} on {inputs[1].shape[1]} key heads", flush=True)
        said.append(agree(kernels, [*inputs, make_logits(inputs[0], 0.5)]))
        print(f"  20 runs of {kernels[-1]}: {said[-1]}", flush=True)
        measure(inputs, grad, kernels, args)
    wrong = sum(line.startswith("WRONG") for line in said)
    print(f"{len(said) - wrong} of {len(said)} checks right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
