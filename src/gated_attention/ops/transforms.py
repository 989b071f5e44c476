"""Kernels as functions that the transforms of `torch.func` either support or refuse, and never silently get wrong.

PyTorch treats a custom op as a constant in forward mode, and `torch.func.grad` cannot enter it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation runs through one of the tensors."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if x is not None)  # type: ignore[no-untyped-call]


class Function(torch.autograd.Function):
    """A function that caches the signature of its `forward`; `apply` would build it at every call.

    That would take longer than a small kernel.
    """

    def __init_subclass__(cls) -> None:
        """Build the signature once."""
        super().__init_subclass__()
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


class KernelFunction(Function):
    """A kernel whose tensors all start with a batch dimension, into which `vmap` folds its own.

    Subclasses define `forward`, and `setup_context` and `backward` if they have gradients. Any other derivative raises
    an error made of `name` and `cure`.
    """

    name: str
    cure: str

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing."""

    @classmethod
    def backward(cls, ctx: Any, *_: Any) -> Any:
        """Refuse, unless a subclass defines it."""
        raise NotImplementedError(f"{cls.name} has no second derivative; use {cls.cure}")

    @classmethod
    def jvp(cls, ctx: Any, *_: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(f"{cls.name} has no forward-mode derivative; use {cls.cure}")

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        """One call, with the mapped dimension folded into the batch."""
        n = info.batch_size
        mapped = [
            x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments, in_dims, strict=True)
            if isinstance(x, Tensor)
        ]
        batch = max(x.shape[1] for x in mapped)  # that of a mask may be 1
        folded = iter([x.expand(n, batch, *x.shape[2:]).flatten(0, 1) for x in mapped])
        results = cls.apply(*(next(folded) if isinstance(x, Tensor) else x for x in arguments))  # type: ignore[no-untyped-call]
        return tuple(x.unflatten(0, (n, batch)) for x in results), (0,) * len(results)
