"""Models from a configuration and a seed, with weights that pair across variants, and their parameters counted."""

from collections import Counter
from typing import Any, cast
from zlib import crc32

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel, ViTConfig

from gated_attention.models.families.configuration import GatesConfigMixin
from gated_attention.models.families.layouts import calls_interface
from gated_attention.nn.block import GatedBlock
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.sizes import ParameterAccount


def auto_class(config: Any) -> Any:
    """The Auto class that builds a study's models: classifiers of images from a vision transformer's configuration."""
    return AutoModelForImageClassification if isinstance(config, ViTConfig) else AutoModelForCausalLM


def plain_class(config: Any) -> type[PreTrainedModel]:
    """What `auto_class` builds from a configuration, or from that without its gates."""
    base = type(config).__bases__[1] if isinstance(config, GatesConfigMixin) else type(config)
    return cast(type[PreTrainedModel], auto_class(config)._model_mapping[base])


def build_model(config: Any, seed: int) -> PreTrainedModel:
    """A fresh model whose weights depend on the seed and on their own names only.

    Two variants built with one seed therefore start from the same weights wherever names and shapes
    agree: an added gate does not shift the random numbers of the layers after it.
    """
    device = torch.empty(0).device  # of the tensors that are made next
    is_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if is_gpu else torch.default_generator
    with torch.random.fork_rng(devices=[device] if is_gpu else []):
        model: PreTrainedModel = auto_class(config).from_config(config)
        with torch.no_grad():
            for name, module in model.named_modules():
                if any(True for _ in module.parameters(recurse=False)):
                    generator.manual_seed(crc32(f"{seed}/{name}".encode()))
                    model._init_weights(module)
            embedding = model.get_input_embeddings()  # last: tied weights were drawn again for the head
            if getattr(embedding, "padding_idx", None) is not None:
                embedding.weight[embedding.padding_idx].zero_()
    return model


def count_of(config: Any) -> ParameterAccount:
    """The parameters of the model of a configuration, which is built without memory for its weights."""
    with torch.device("meta"):
        return parameter_account(auto_class(config).from_config(config))


def parameter_account(model: PreTrainedModel) -> ParameterAccount:
    """Every parameter once: whatever lies neither in gates, norms, embeddings and head nor in attention is FFN."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    head, attention = model.get_output_embeddings() or getattr(model, "classifier", None), list[str]()
    for path, module in model.named_modules():
        if isinstance(module, GatedBlock) or calls_interface(type(module)):  # type: ignore[arg-type]
            attention.append(f"{path}.")
        parts = {
            "gates": not set(path.split(".")).isdisjoint(GATE_MODULES.values()),
            "norms": "Norm" in type(module).__name__,
            "embeddings": isinstance(module, nn.Embedding) or module is head or "embeddings" in path.split("."),
            "attention": f"{path}.".startswith(tuple(attention)),
            "ffn": True,
        }
        part = next(name for name, holds in parts.items() if holds)
        for parameter in module.parameters(recurse=False):
            counts[part] += parameter.numel() * (id(parameter) not in seen)
            seen.add(id(parameter))
    return ParameterAccount(**{name: counts[name] for name in ("embeddings", "attention", "gates", "ffn", "norms")})
