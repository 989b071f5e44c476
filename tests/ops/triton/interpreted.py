"""What scripts share that run kernels in Triton's interpreter."""

import dataclasses

import torch
from triton.runtime import interpreter

from gated_attention import ops


def _patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor):
    """Bounds of loops are arrays of one number, which NumPy 2.4 no longer takes for a number."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _call(self, *args, **kwargs):
    """Triton's language is patched once a module, not at every call of a function, which takes most of the time."""
    if id(self.fn.__globals__) not in patched:
        patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


patched = set()
# A third of the time goes into looking for overflow in sums, which is then said only under `debug`.
options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
interpreter.interpreter_builder.options = options
interpreter._patch_lang_tensor = _patch_tensor
interpreter.InterpretedFunction.__call__ = _call


def first_keys_of(kind, batch, t, s):
    """First keys, (B, T), of a kind; None for the empty one."""
    generator = torch.Generator().manual_seed(7)
    own = torch.arange(s - t, s).expand(batch, -1)
    if kind == "documents":
        opens = torch.rand(batch, s, generator=generator) < 0.06
        starts = torch.where(opens, torch.arange(s), 0).cummax(1).values[:, s - t :]
        return ops.find_first_keys(own - starts, s)
    if kind == "window":
        return ops.find_first_keys(own, s, window=13)
    if kind == "padding":
        positions = torch.arange(t) - torch.tensor([[21], [0]])
        return ops.find_first_keys(positions.clamp_min(1))
    if kind == "any order":
        return (torch.rand(batch, t, generator=generator) * (own + 1)).int()
    return None


def surrounded(x):
    """The same values in memory whose rest is NaN."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 2), float("nan"), dtype=x.dtype)
    wide[:, :, 1:-2, 1:-1] = x
    return wide[:, :, 1:-2, 1:-1]
