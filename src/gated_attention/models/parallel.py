"""A style of tensor parallelism that transformers lacks: a whole projection whose gradient is partial on each rank."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

HEAD_SHARED = "gated_attention_head_shared"
"""The style of a gate that all heads share: each rank computes it whole and applies it to its own heads."""


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class HeadSharedParallel(TensorParallelLayer):  # type: ignore[misc]
    """Sums the gradient of the logits over ranks, so that those of the weight and of the input are whole."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: Any) -> Tensor:
        """As transformers calls it since 5.21."""
        return _SumGradients.apply(output, mesh.get_group())  # type: ignore[no-any-return,no-untyped-call]

    def _prepare_output_fn(self, module: nn.Module, output: Tensor, mesh: Any) -> Tensor:
        """As transformers called it before."""
        return self.transform_output_post_forward(module, output, mesh)


class LocalParameters(TensorParallelLayer):  # type: ignore[misc]
    """transformers' own style of this name, which 5.17 lacks: the module reads its shards as plain tensors."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        """Always."""
        return True


if "local_params" not in ALL_PARALLEL_STYLES:
    ALL_PARALLEL_STYLES.register("local_params", LocalParameters())
ALL_PARALLEL_STYLES.register(HEAD_SHARED, HeadSharedParallel())
