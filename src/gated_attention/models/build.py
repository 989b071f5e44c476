"""Models from a configuration and a seed, with weights that pair across variants."""

from zlib import crc32

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig


def build_model(config: GatedQwen3Config | GatedQwen3MoeConfig, seed: int) -> PreTrainedModel:
    """A fresh model whose weights depend on the seed and on their own names only.

    Two variants built with one seed therefore start from the same weights wherever names and shapes
    agree: an added gate does not shift the random numbers of the layers after it.
    """
    device = torch.empty(0).device  # of the tensors that are made next
    is_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if is_gpu else torch.default_generator
    with torch.random.fork_rng(devices=[device] if is_gpu else []):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, module in model.named_modules():
                if any(True for _ in module.parameters(recurse=False)):
                    generator.manual_seed(crc32(f"{seed}/{name}".encode()))
                    model._init_weights(module)
            embedding = model.get_input_embeddings()  # last: tied weights were drawn again for the head
            if embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx].zero_()
    return model
