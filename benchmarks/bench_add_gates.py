"""What the seam of `add_gates` costs: Llama gated by it, Llama with the same gate written into its class, and no gate.

The two gated models have the same weights and are first compared with each other. Contenders take turns in one
process, compiled, in bfloat16, forward without gradients and forward + backward. Prints and writes one CSV row per
contender, gate and direction: median and quartiles in microseconds, and the median over that of the gate written by
hand.

    python benchmarks/bench_add_gates.py --output reports/bench_add_gates            # GPU, two minutes
    python benchmarks/bench_add_gates.py --device cpu --layers 1 --rounds 1 --length 64 --no-compile  # does it run
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from bench_attention import _turn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from gated_attention import GateSpec, add_gates
from gated_attention.device import device_name
from gated_attention.versions import library_versions

BY_HAND = "by hand"


class HandGatedAttention(LlamaAttention):
    """Llama's attention, its output gated per head or per channel before the output projection."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Without a cache."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        y, _ = sdpa_attention_forward(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        gate = torch.sigmoid(self.g_proj(hidden_states)).view(*y.shape[:-1], -1)  # (B, T, H, 1 or D)
        return self.o_proj((y * gate).reshape(*hidden_states.shape[:-1], -1)), None


def make_models(granularity: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """By name, on the device, with equal weights where they have the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=max(1, args.width // 256), vocab_size=32000,
        max_position_embeddings=args.length,
    )  # fmt: skip
    models = {name: LlamaForCausalLM(config).to(torch.bfloat16) for name in ("no gate", BY_HAND, "add_gates")}
    seam, hand = add_gates(models["add_gates"], GateSpec(granularity=granularity)), models[BY_HAND]
    for layer in hand.model.layers:
        outputs = config.num_attention_heads * (config.head_dim if granularity == "elementwise" else 1)
        layer.self_attn.g_proj = nn.Linear(args.width, outputs, bias=False, dtype=torch.bfloat16)
        layer.self_attn.__class__ = HandGatedAttention
    hand.load_state_dict(seam.state_dict())
    models["no gate"].load_state_dict({k: v for k, v in seam.state_dict().items() if "g_proj" not in k})
    return {name: model.to(args.device).eval() for name, model in models.items()}


def forward(run: Callable[..., Any], ids: Tensor) -> Tensor:
    """The decoder's output without gradients, (B, T, width)."""
    with torch.no_grad():
        return run(input_ids=ids, use_cache=False).last_hidden_state


def both(run: Callable[..., Any], ids: Tensor, gradient: Tensor, leaves: list[Tensor]) -> Any:
    """Gradients of all weights."""
    return torch.autograd.grad(run(input_ids=ids, use_cache=False).last_hidden_state, leaves, gradient)


def measure(granularity: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of all contenders and directions."""
    ids = torch.randint(0, 32000, (args.batch_size, args.length), device=args.device)
    gradient = torch.randn(*ids.shape, args.width, device=args.device, dtype=torch.bfloat16)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    outputs = {}
    for name, model in make_models(granularity, args).items():
        decoder = model.model  # without the head, which would hide the difference
        run = decoder if args.no_compile else torch.compile(decoder, fullgraph=True)
        outputs[name] = forward(run, ids)
        leaves = [one for one in decoder.parameters() if one.requires_grad and one.ndim == 2][1:]  # but embeddings
        runs[name, "forward"] = partial(forward, run, ids)
        runs[name, "forward + backward"] = partial(both, run, ids, gradient, leaves)
    error = (outputs["add_gates"] - outputs[BY_HAND]).float().norm() / outputs[BY_HAND].float().norm()
    if not error <= 0.02:
        raise RuntimeError(f"the two gated models differ by {error:.1e} of the norm of their output")
    for run in runs.values():  # compiles
        run()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for round_index in range(args.rounds + 1):
        for key in runs if round_index % 2 else reversed(runs):
            found = _turn(runs[key], ids.device)
            if round_index:  # the first is for clocks
                times[key] += found
    rows = []
    for (name, direction), found in times.items():
        low, middle, high = quantiles(found, n=4)
        over = middle / quantiles(times[BY_HAND, direction], n=4)[1]
        rows.append(
            {
                "device": device_name(ids.device), **library_versions(), "batch": args.batch_size,
                "length": args.length, "width": args.width, "layers": args.layers, "gate": granularity,
                "contender": name, "direction": direction, "n": len(found), "lower_us": round(low, 1),
                "median_us": round(middle, 1), "upper_us": round(high, 1), "over_by_hand": round(over, 4),
            }
        )  # fmt: skip
        print(
            f"{granularity:>11} {name:>9} {direction:>18}: {middle:>11,.1f} us ({low:,.1f} to {high:,.1f}), {over:.4f}"
        )
    return rows


def main() -> None:
    """Run both gates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path, help="name of .csv")
    args = parser.parse_args()
    rows = [row for granularity in ("headwise", "elementwise") for row in measure(granularity, args)]
    if args.output:
        with args.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
