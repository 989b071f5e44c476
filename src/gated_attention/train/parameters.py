"""Which parameters AdamW decays, and the learning rate of each."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from gated_attention.nn import AttentionGate
from gated_attention.nn.gate import GATE_MODULES

if TYPE_CHECKING:
    from gated_attention.train.trainer import TrainConfig

_MAPS = (AttentionGate, nn.Linear, nn.Conv2d, nn.Embedding, Qwen3MoeExperts, Qwen3MoeTopKRouter)
_SITES = {name: site for site, name in GATE_MODULES.items()}


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: weights that map the input of a module.

    These are the weights of linear layers, convolutions, embeddings, experts and routers. Norms, biases, sinks and
    gates without an input are not decayed, whatever their shape: they multiply no input, and decay would pull the scale
    of a norm to 0.
    """
    names = set()
    for path, module in model.named_modules():
        if not isinstance(module, _MAPS) or _reads_nothing(model, path, module):
            continue
        names |= {_join(path, name) for name, _ in module.named_parameters(recurse=False) if name != "bias"}
    return names


def parameter_groups(model: nn.Module, config: "TrainConfig") -> list[dict[str, Any]]:
    """AdamW's groups: decayed weights, all other parameters, and both again for gates, with their own settings."""
    decayed, gates = decayed_names(model), set(gate_names(model))
    gate_decay = config.weight_decay if config.gate_weight_decay is None else config.gate_weight_decay
    settings = {
        (False, True): ("decayed", config.weight_decay, 1.0),
        (False, False): ("not decayed", 0.0, 1.0),
        (True, True): ("gates, decayed", gate_decay, config.gate_learning_rate),
        (True, False): ("gates, not decayed", 0.0, config.gate_learning_rate),
    }
    groups = {
        key: {"name": name, "params": [], "weight_decay": decay, "lr": config.learning_rate * rate}
        for key, (name, decay, rate) in settings.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in gates, name in decayed]["params"].append(parameter)  # type: ignore[attr-defined]
    return [group for group in groups.values() if group["params"]]


def gate_names(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of gates, whatever kind of model has them."""
    for path, module in model.named_modules():
        if isinstance(module, AttentionGate) or not _SITES.keys().isdisjoint(path.split(".")):
            yield from (_join(path, name) for name, _ in module.named_parameters(recurse=False))


def _reads_nothing(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether it is a gate whose weight is its logits."""
    if (spec := getattr(module, "spec" if isinstance(module, AttentionGate) else "gate_spec", None)) is not None:
        return bool(spec.input == "parameter")
    site = _SITES.get(path.rsplit(".", maxsplit=1)[-1])
    specs = getattr(getattr(model, "config", None), "gates", ())
    return any(spec.site == site and spec.input == "parameter" for spec in specs)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
