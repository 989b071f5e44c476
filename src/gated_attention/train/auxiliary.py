"""Losses beside the cross-entropy: load balance and z-loss of routers, the penalty on open gates.

While the model runs, compiled or not, hooks reduce the outputs of routers and gates to a few sums per layer. The losses
are computed from these sums outside of the model. All arithmetic is in float32 or wider.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gated_attention import ops
from gated_attention.models.experts import routers
from gated_attention.nn.block import find_gates
from gated_attention.nn.gate import by_head
from gated_attention.nn.routing import count_experts, describe_load, load_balance_loss, num_ranks, sum_over_ranks
from gated_attention.ops.sdpa import widen
from gated_attention.registry.penalty import TARGET_BAND, AuxiliaryWeights, GatePenalty
from gated_attention.spec import GateSpec


class RouterSums(NamedTuple):
    """One router's pass over N tokens.

    Attributes:
        counts: (E,) tokens sent to each expert, int64; their sum is N * k.
        probabilities: (E,) mean router probability.
        squared_lse: () mean squared log-sum-exp of the router logits.
    """

    counts: Tensor
    probabilities: Tensor
    squared_lse: Tensor


class GateSums(NamedTuple):
    """One gate's pass: () mean score, () number of scores above 0, int64, and number of all scores."""

    mean: Tensor
    num_open: Tensor
    num_scores: int


def penalty_pressure(penalty: GatePenalty, open_share: Tensor) -> Tensor:
    """The factor on the mean gate score at this open share; see `GatePenalty`."""
    if penalty.target is None:
        return torch.full_like(open_share, penalty.weight)
    return penalty.weight * ((open_share - penalty.target) / TARGET_BAND).clamp(0, 1)


class AuxiliaryLosses:
    """The auxiliary losses of one model, whose hooks gather sums while it runs.

        with losses.gather():
            loss = model(**batch).loss
        loss = loss + losses.loss()

    The load-balancing loss is that of the global batch: expert counts are summed over the ranks of the default
    process group, and over the passes of a step if `count` ran over them first. All ranks and passes must have the same
    number of tokens, as packed blocks do; padding would be counted.

    Args:
        model: Any model; without routers and hard-sigmoid gates there is nothing to gather.

    Raises:
        ValueError: if a gate penalty has no hard-sigmoid gate to act on, or the model adds transformers' own
            load-balancing loss.
    """

    def __init__(self, model: nn.Module, weights: AuxiliaryWeights) -> None:
        self.weights = weights
        routing = routers(model)
        gates = [found for found in find_gates(model) if found[0].activation == "hard_sigmoid"]
        if weights.gate_penalty and not gates:
            raise ValueError("a gate penalty needs gates that close; use activation='hard_sigmoid', or no penalty")
        if routing and getattr(getattr(model, "config", None), "output_router_logits", False):
            raise ValueError("output_router_logits=True adds a second load-balancing loss; leave it at False")
        self.has_routers, self.has_gates = bool(routing), bool(gates)
        self._gathering = False
        self._router_sums: list[RouterSums] = []
        self._gate_sums: list[GateSums] = []
        self._logged: dict[str, Tensor] = {}  # sums over passes, kept on the device: only `read` waits for it
        self._num_logged = 0
        self._hooks = [module.register_forward_hook(self._see_router) for module in routing]
        self._hooks += [gate.register_forward_hook(partial(self._see_gate, spec, width)) for spec, gate, width in gates]

    def __bool__(self) -> bool:
        return self.has_routers or self.has_gates

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep the sums of the pass in this block, in place of the previous ones."""
        self._router_sums, self._gate_sums = [], []
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    @torch.no_grad()
    def count(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """(L, E) pairs sent to each expert in all batches of a step and on all ranks.

        The counts of a whole step are needed before its first backward pass. So this adds a forward pass of every
        batch, without gradients and without the language model head: about a third of the time of a step.

        Args:
            model: The model as it is trained, wrapped or compiled.
            batches: Keyword arguments of its forward pass; `labels` are ignored.
        """
        counts = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with self.gather():
                model(**inputs, use_cache=False, logits_to_keep=1)
            counts.append(torch.stack([sums.counts for sums in self._router_sums]))
        return sum_over_ranks(torch.stack(counts).sum(0))

    def total(self, cross_entropy: Tensor, counts: Tensor | None = None, num_passes: int = 1) -> Tensor:
        """What a pass is trained on: its share of the cross-entropy and `loss`, whose arguments the others are."""
        return cross_entropy + self.loss(counts, num_passes)

    def loss(self, counts: Tensor | None = None, num_passes: int = 1) -> Tensor:
        """The weighted sum of the losses of the last gathered pass, to be added to its share of the cross-entropy.

        Args:
            counts: The result of `count` for a step of several passes; None for a step of one.
            num_passes: Passes per optimizer step.
        """
        total = torch.zeros(())
        values: dict[str, Tensor] = {}
        if self.has_routers:
            router = [torch.stack(sums) for sums in zip(*self._router_sums, strict=True)]
            if counts is None:
                counts = sum_over_ranks(router[0])
            values["expert_load"] = counts.double()
            values["load_balance_loss"] = load_balance_loss(counts, router[1])
            values["router_z_loss"] = router[2].mean()
            total = self.weights.load_balance * values["load_balance_loss"]
            total = total + self.weights.router_z * values["router_z_loss"]
        if self.has_gates:
            mean, open_share = self._mean_gate()
            values["gate_open_share"], values["gate_score_mean"] = open_share, mean
            if self.weights.gate_penalty:
                values["gate_penalty"] = penalty_pressure(self.weights.gate_penalty, open_share) * mean
                total = total + values["gate_penalty"]
        for name, value in values.items():
            self._logged[name] = self._logged.get(name, 0) + value.detach()
        self._num_logged += 1
        return total / num_passes

    def read(self) -> dict[str, Any]:
        """Means over the passes since the last call, and over ranks.

        `load_balance_loss`, 1 when balanced, and `router_z_loss` are unweighted; `gate_penalty` is weighted.
        `expert_load` holds, per layer, the tokens of each expert relative to a balanced router; `expert_load_max` and
        `expert_load_min` are its extremes.
        """
        sums, num_passes = self._logged, self._num_logged
        self._logged, self._num_logged = {}, 0
        if not sums:
            return {}
        counts = sums.pop("expert_load", None)
        means = sum_over_ranks(torch.stack(list(sums.values()))) / (num_ranks() * num_passes)
        found: dict[str, Any] = dict(zip(sums, means.tolist(), strict=True))
        if counts is not None:
            found |= describe_load(counts)
        return found

    def _mean_gate(self) -> tuple[Tensor, Tensor]:
        """The mean score of this rank, which has a gradient, and the open share of all ranks, which has none."""
        num_scores = sum(sums.num_scores for sums in self._gate_sums)
        mean = torch.stack([sums.mean * (sums.num_scores / num_scores) for sums in self._gate_sums]).sum()
        num_open = sum_over_ranks(torch.stack([sums.num_open for sums in self._gate_sums]).sum())
        return mean, num_open.to(mean.dtype) / (num_scores * num_ranks())

    # Both also run when activations are recomputed for a backward pass: what was saved must be saved again.

    def _see_router(self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if not (self._gathering or torch.is_grad_enabled()):
            return
        logits, _, chosen = output  # (N, E), (N, k), (N, k)
        logits = widen(logits)
        counts = count_experts(chosen, logits.shape[-1])
        sums = RouterSums(counts, F.softmax(logits, -1).mean(0), torch.logsumexp(logits, -1).square().mean())
        if self._gathering:
            self._router_sums.append(sums)

    def _see_gate(self, spec: GateSpec, head_dim: int, gate: nn.Module, inputs: Any, logits: Tensor) -> None:
        if not (self._gathering or torch.is_grad_enabled()):
            return
        scores = ops.gate_scores(by_head(widen(logits), spec, head_dim), spec)
        sums = GateSums(scores.mean(), (scores > 0).sum(), scores.numel())
        if self._gathering:
            self._gate_sums.append(sums)
