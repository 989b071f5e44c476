"""Models from a configuration and a seed, with weights that pair across variants."""

from zlib import crc32

import torch

from gated_attention.models.configuration import GatedQwen3Config
from gated_attention.models.modelling import GatedQwen3ForCausalLM


def build_model(config: GatedQwen3Config, seed: int) -> GatedQwen3ForCausalLM:
    """A fresh model whose weights depend on the seed and on their own names only.

    Two variants built with one seed therefore start from the same weights wherever names and shapes
    agree: an added gate does not shift the random numbers of the layers after it.
    """
    with torch.random.fork_rng(devices=[]):
        model = GatedQwen3ForCausalLM(config)
        with torch.no_grad():
            for name, module in model.named_modules():
                if any(True for _ in module.parameters(recurse=False)):
                    torch.manual_seed(crc32(f"{seed}/{name}".encode()))
                    model._init_weights(module)
    return model
