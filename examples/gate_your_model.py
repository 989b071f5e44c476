"""Gate an attention of your own: the gate is three lines, marked `new` below.

In this toy task some tokens carry a flag and ask for the mean of all tokens so far; the others ask for nothing. Softmax
weights add up to one, so plain attention always returns something. A gate closes, and returns nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gated_attention import AttentionGate, GateSpec


class SelfAttention(nn.Module):
    """Causal self-attention as you may have it, and a gate on the output of its heads."""

    def __init__(self, hidden_size: int, num_heads: int, gate: GateSpec | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = AttentionGate(gate, hidden_size, num_heads) if gate else None  # new

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)  # (B, T, H, D)
        if self.gate:  # new
            y = self.gate(y, x)  # new: before the output projection
        return self.out(y.flatten(2))


def examples(batch: int = 32, tokens: int = 32, hidden_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states whose first channel is the flag, what attention should return for them, and the flags."""
    x = torch.randn(batch, tokens, hidden_size)
    flag = torch.rand(batch, tokens, 1) < 0.25
    x[..., :1] = flag * 4.0 - 2.0
    mean = x.cumsum(1) / torch.arange(1, tokens + 1)[:, None]
    return x, mean * flag, flag


def main() -> None:
    for name, gate in (("no gate", None), ("headwise gate", GateSpec(granularity="headwise", bias=0.0))):
        torch.manual_seed(0)
        model = SelfAttention(hidden_size=32, num_heads=2, gate=gate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(300):
            x, target, flag = examples()
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{name}: loss {loss.item():.5f}")
    scores = model.gate(torch.ones(32, 32, 2, 16), x)[..., 0]  # gated ones are the scores
    flagged, others = scores[flag[..., 0]].mean(), scores[~flag[..., 0]].mean()
    print(f"mean gate score: {flagged:.3f} at tokens that ask, {others:.3f} at the others")


if __name__ == "__main__":
    main()
