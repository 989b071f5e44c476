"""Mixtures of experts on OLMo-core: a router that balances the global batch, experts as PyTorch's grouped product.

OLMo-core's own balance is of one process or one sequence. Its permutations are Triton kernels, which need a GPU, and
its product a package that its distribution lacks; the ones here run on any device.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from olmo_core.nn.moe import MoEConfig, MoELinearRouter, MoERouterConfig
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from olmo_core.nn.moe.moe import DroplessMoE
from olmo_core.nn.moe.parallel_mlp import ParallelDroplessMLP
from olmo_core.train.common import ReduceType
from torch import Tensor, nn
from torch.nn import functional as F

from gated_attention.models.experts import ALIGNMENT, product_dtype
from gated_attention.nn.routing import count_experts, describe_load, load_balance_loss, sum_over_ranks

LOAD_BALANCE, ROUTER_Z = "load balance loss", "router z loss"
"""Names of a router's metrics."""


class BalancedRouter(MoELinearRouter):  # type: ignore[misc]  # OLMo-core is untyped here
    """OLMo-core's router with the load-balancing loss of the global batch, and the z-loss.

    A step of several passes needs its counts before the first backward pass: `begin`, then all passes in training mode
    without gradients, then `counts` is given the sum over ranks. A step of one pass sums them itself.

    Attributes:
        counts: (E,) pairs of the last step sent to each expert, on all ranks.
    """

    num_experts: int
    training: bool
    lb_loss_weight: float | None
    z_loss_weight: float | None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.counts: Tensor | None = None
        self._num_passes, self._pass = 0, 0
        self._losses: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, num_passes: int) -> None:
        """A step of so many passes begins."""
        self._num_passes, self._pass, self.counts = num_passes, 0, None
        self._losses = {}

    def begin_pass(self, index: int) -> None:
        """A pass begins, whose forward may run again in its backward pass."""
        self._pass = index

    def forward(self, x: Tensor, *, loss_div_factor: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Weights (B, T, k), experts (B, T, k), counts (E,) and the auxiliary loss of a pass over (B, T, C)."""
        del loss_div_factor  # of targets, of which a sequence has one less than tokens
        logits = self.get_expert_logits(x).float()  # (B, T, E)
        scores = logits.softmax(-1)
        weights, chosen = self.get_top_k(scores)
        if self.normalize_expert_weights is not None:
            weights = F.normalize(weights, self.normalize_expert_weights, dim=-1)
        counts = count_experts(chosen.flatten(0, -2), self.num_experts)
        return weights, chosen, counts, self._auxiliary(counts, scores, logits) if self.training else None

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _auxiliary(self, counts: Tensor, scores: Tensor, logits: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            self.counts = counts if self.counts is None else self.counts + counts
            return None
        if not self._num_passes:
            raise ValueError("routers balance a whole step; train a mixture of experts with BalancedTrainModule")
        if self.counts is None:
            self.counts = sum_over_ranks(counts)
        balance = load_balance_loss(self.counts[None], scores.flatten(0, -2).mean(0)[None])
        z = logits.logsumexp(-1).square().mean()
        self._losses[self._pass] = balance.detach(), z.detach()
        return ((self.lb_loss_weight or 0.0) * balance + (self.z_loss_weight or 0.0) * z) / self._num_passes

    def compute_metrics(self, reset: bool = True) -> dict[str, tuple[Tensor, ReduceType]]:
        """Both losses, unweighted, as means over the passes of the step."""
        del reset  # `begin` does
        balance, z = (torch.stack(values).mean() for values in zip(*self._losses.values(), strict=True))
        return {LOAD_BALANCE: (balance, ReduceType.mean), ROUTER_Z: (z, ReduceType.mean)}

    def reset_metrics(self) -> None:
        """Nothing: `begin` does."""


def routers(model: nn.Module) -> list[BalancedRouter]:
    """The routers of a model, first layer first; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, BalancedRouter)]


def expert_load(model: nn.Module) -> dict[str, Any]:
    """Tokens of each expert in the last step relative to a balanced router, as in `compare`; empty if dense."""
    counts = [router.counts for router in routers(model) if router.counts is not None]
    return describe_load(torch.stack(counts).double()) if counts else {}


class _Products(DroplessMoEMLP):  # type: ignore[misc]
    """OLMo-core's experts by the grouped product of PyTorch where rows are whole 16 bytes, else in its loop."""

    def gmm(self, x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        """Rows of `x` (N, C or F), sorted by expert, times their expert's matrix of `w`."""
        dtype = product_dtype(x, w)
        x, w = x.to(dtype), w.to(dtype)
        if any(width % ALIGNMENT for width in w.shape[1:]):
            plain: Tensor = super().gmm(x, w, batch_sizes, trans_b)
            return plain
        ends = batch_sizes.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x, w.mT if trans_b else w, offs=ends)


class _Indexed(ParallelDroplessMLP):  # type: ignore[misc]
    """OLMo-core's permutations as indexing."""

    def permute_and_compute(
        self,
        x: Tensor,
        *,
        batch_size_per_expert: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        top_k: int,
    ) -> Tensor:
        """Tokens (N, C) through their experts, weighted and added.

        Args:
            batch_size_per_expert: Pairs of each expert.
            indices: (N * k,) pairs, those of the first expert first; a token's pairs lie side by side.
            bin_ids: Unused.
            expert_weights: (N * k,), by pair.
            bins: Unused.
            top_k: Pairs per token.
        """
        del bin_ids, bins
        tokens = indices // top_k
        y = self.mlp(x.view(-1, x.shape[-1])[tokens], batch_size_per_expert)
        if expert_weights is not None:
            y = y * expert_weights[indices, None].to(y.dtype)
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, tokens, y)


class _Mixture(DroplessMoE):  # type: ignore[misc]
    def _init_parallel_mlp(self, *, cache: Any = None, **options: Any) -> _Indexed:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # PyTorch's is used
            return _Indexed(mlp=_Products(**options), top_k=self.router.top_k, cache=cache)


@dataclass
class BalancedRouterConfig(MoERouterConfig):  # type: ignore[misc]
    """The configuration that builds a `BalancedRouter`."""

    def build(self, d_model: int, num_experts: int, **options: Any) -> BalancedRouter:
        """The router; `options` are `MoERouterConfig`'s."""
        return BalancedRouter(
            d_model=d_model,
            num_experts=num_experts,
            top_k=self.top_k,
            normalize_expert_weights=self.normalize_expert_weights,
            **options,
        )


@dataclass
class BalancedMoEConfig(MoEConfig):  # type: ignore[misc]
    """The configuration that builds experts with a `BalancedRouter`.

    `lb_loss_weight` is on the load-balancing loss of the global batch, `z_loss_weight` on the z-loss; both are means
    over layers.
    """

    def build(self, d_model: int, *, n_layers: int = 1, init_device: str = "cpu", cache: Any = None) -> DroplessMoE:
        """The experts of one block."""
        return _Mixture(
            d_model=d_model,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            router=self.router,
            lb_loss_weight=self.lb_loss_weight,
            z_loss_weight=self.z_loss_weight,
            n_layers=n_layers,
            dtype=self.dtype.as_pt(),
            init_device=init_device,
            cache=cache,
        )
