"""The optimizer of a run: AdamW, or Muon on matrices with AdamW on the rest."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from gated_attention.models.families.layers import decoder_layers, named_child
from gated_attention.train.parameters import parameter_groups

if TYPE_CHECKING:
    from gated_attention.train.trainer import TrainConfig

_LAST_NORMS = ("norm", "final_layer_norm")

Optimizer = Literal["adamw", "muon"]


def make_optimizer(
    model: Any, config: "TrainConfig", adamw: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; with `muon`, Muon on the decayed matrices but embeddings and the head.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that both share a learning rate and a weight
    decay.

    Raises:
        ValueError: for Muon on experts, whose weights are stacks of matrices.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return adamw(groups, **options)
    if stacked := next((name for name, weight in model.named_parameters() if weight.ndim > 2), None):
        raise ValueError(f"Muon takes matrices, and {stacked} is a stack of them; choose optimizer 'adamw'")
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(end.weight) for end in (*tables, model.get_output_embeddings())}
    matrices, rest = [], []
    for group in groups:
        is_decayed = not group["name"].endswith("not decayed")
        hidden = [p for p in group["params"] if is_decayed and id(p) not in ends]
        others = [p for p in group["params"] if not is_decayed or id(p) in ends]
        matrices += [{**group, "params": hidden}] if hidden else []
        rest += [{**group, "params": others}] if others else []
    muon = torch.optim.Muon(matrices, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
    return Together(muon, adamw(rest, **options))


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one, which a scheduler and checkpoints take for one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})  # the same dictionaries

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def round_residual(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the residual stream to `dtype` before every layer and the last norm, in every later forward pass.

    The rotation of positions keeps its dtype, and weights keep theirs.
    """

    def rounded(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0].to(dtype), *arguments[1:]

    decoder: Any = model.get_decoder()
    norm = named_child(decoder, _LAST_NORMS)
    for module in (*decoder_layers(model), *([] if norm is None else [norm])):
        module.register_forward_pre_hook(rounded)
