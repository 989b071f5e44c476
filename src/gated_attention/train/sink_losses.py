"""Losses that take a model's sink away: attention to the first token, the largest activations, distance to a teacher.

Attention runs through a function of our own behind transformers' attention interface. It computes the weight of key 0
alone, from the log-sum-exp of the kernel, so no T x T matrix is formed for it; its gradient reaches queries and keys.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from gated_attention import ops
from gated_attention.models.families.layers import decoder_layers
from gated_attention.models.implementations import lse_attention
from gated_attention.ops.sdpa import repeat_heads, widen
from gated_attention.train.auxiliary import AuxiliaryLosses

if TYPE_CHECKING:
    from gated_attention.train.adapt import AdaptConfig

_IMPLEMENTATION = "gated_attention_first_token"
_ASKED_BY = "the penalty on first-token attention"
_WIDEST = 128  # channels of a head up to which every release of cuDNN has a backward pass

_weights: ContextVar[list[Tensor] | None] = ContextVar("mean first-token attention of each call", default=None)


def first_key_weights(q: Tensor, k: Tensor, lse: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The attention of every query to key 0, (B, H, T), in float32 or wider; 0 where the query does not see it.

    Args:
        q, k: (B, H, T, D) and (B, K, S, D); query head i reads key head i // (H / K).
        lse: Log-sum-exp of the scaled scores, (B, H, T).
        mask: True where a query sees a key, (B or 1, H or 1, T, S); None is causal.
    """
    first = repeat_heads(k[:, :, :1], q)
    with torch.autocast(q.device.type, enabled=False):  # which would round the scores
        scores = (widen(q) @ widen(first).transpose(-1, -2)).squeeze(-1) * scale
    weights = torch.exp(scores - lse)
    return weights if mask is None else weights.masked_fill(~mask[..., 0], 0.0)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; keeps the mean weight of key 0 over all queries but the first."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    in_full = query.is_cuda and query.shape[-1] > _WIDEST
    backend = "eager" if in_full else ops.choose_backend(query, key, value, mask=attention_mask)
    attend = lse_attention(backend)
    out, weights, lse = attend(
        module, query, key, value, attention_mask, scaling=scale, asked_by=_ASKED_BY, **options
    )  # fmt: skip
    if (found := _weights.get()) is not None:
        first = first_key_weights(query, key, lse, scale, attention_mask) if weights is None else weights[..., 0]
        found.append(widen(first[..., 1:]).mean())
    return out, None


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


class SinkLosses(AuxiliaryLosses):
    """Penalties on what a sink shows in, and the distance to a teacher, as `AuxiliaryLosses` are added.

    `first_token_attention` is F-Attn of the batch: the mean over layers, heads, sequences and all queries but the
    first, where a query whose window does not reach token 0 counts as 0. `log_max_activation` is the mean over layers
    and sequences of `log max |h|`. With a teacher, `kl_nats`, the mean over tokens of KL(teacher || model), takes the
    place of the cross-entropy.

    Args:
        model: A causal language model; its attention implementation changes until `remove`.
        config: The weights.
        teacher: On the model's device.
        precision: In which the teacher computes.

    Raises:
        ValueError: if its attention has an option that the penalty does not know, such as a cap on scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: "AdaptConfig",
        teacher: PreTrainedModel | None = None,
        precision: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__(model, config.auxiliary)
        self.model, self.sink_weight, self.activation_weight = model, config.sink_weight, config.activation_weight
        self.teacher, self.precision = teacher, precision or nullcontext()
        self._implementation = model.config._attn_implementation
        self._attention: list[Tensor] = []
        self._activations: list[Tensor] = []
        self._read: tuple[Tensor, Tensor] | None = None
        if self.sink_weight:
            model.set_attn_implementation(_IMPLEMENTATION)
        if self.activation_weight:
            layers = dict.fromkeys(decoder_layers(model))
            self._hooks += [layer.register_forward_hook(self._see_layer) for layer in layers]
        if teacher is not None:
            self._hooks.append(model.register_forward_hook(self._see_model, with_kwargs=True))

    def __bool__(self) -> bool:
        return super().__bool__() or bool(self.sink_weight or self.activation_weight or self.teacher is not None)

    def remove(self) -> None:
        """Take the hooks off the model, and give back its attention implementation."""
        super().remove()
        self.model.set_attn_implementation(self._implementation)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep what the losses need of the pass in this block, in place of the previous ones."""
        self._attention, self._activations, self._read = [], [], None
        token = _weights.set(self._attention)
        try:
            with super().gather():
                yield
        finally:
            _weights.reset(token)

    def total(self, cross_entropy: Tensor, counts: Tensor | None = None, num_passes: int = 1) -> Tensor:
        """As in `AuxiliaryLosses`; the distance to the teacher replaces the cross-entropy."""
        if self._read is not None:
            distance = self._keep("kl_nats", self._distance(*self._read))
            cross_entropy = distance / num_passes
        return super().total(cross_entropy, counts, num_passes)

    def loss(self, counts: Tensor | None = None, num_passes: int = 1) -> Tensor:
        """The weighted sum of the penalties, and of the losses of routers."""
        total = super().loss(counts, num_passes)
        if self._attention:
            sink = self._keep("first_token_attention", torch.stack(self._attention).mean())
            total = total + self.sink_weight * sink / num_passes
        if self._activations:
            size = self._keep("log_max_activation", torch.stack(self._activations).mean())
            total = total + self.activation_weight * size / num_passes
        return total

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self._logged[name] = self._logged.get(name, 0) + value.detach()
        return value

    def _see_layer(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._gathering:
            hidden = widen(output[0] if isinstance(output, tuple) else output)
            self._activations.append(hidden.abs().flatten(1).amax(-1).log().mean())

    def _see_model(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._gathering:
            self._read = kwargs["input_ids"], output.logits

    def _distance(self, ids: Tensor, logits: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad(), self.precision:
            aims = self.teacher(input_ids=ids, use_cache=False).logits
        rows = zip(logits, aims, strict=True)  # one sequence at a time, which keeps the wide copies small
        parts = [
            F.kl_div(widen(row).log_softmax(-1), widen(aim).log_softmax(-1), reduction="sum", log_target=True)
            for row, aim in rows
        ]
        return torch.stack(parts).sum() / ids.numel()
