"""Small models for the tests of the engine, and the variants that are trained in parallel."""

from dataclasses import replace

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import ModelSize

DENSE = ModelSize("dense", 2, 24, 4, 2, 8, 96, 31, 16, ffn_multiple=1)
MOE = ModelSize("moe", 2, 24, 4, 2, 8, 16, 31, 16, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
MIXTURE = "mixture"
"""Name, among the trained, of a mixture of experts with a headwise gate."""

TRAINED = ("baseline", "sdpa-headwise", "sdpa-elementwise", "value-elementwise", "learned-sink", MIXTURE)
"""What every layout of processes trains."""

PARALLEL = ModelSize("parallel", 2, 64, 4, 2, 16, 192, 256, 64, ffn_multiple=4)
"""Their size: PyTorch shards by tensor and by data only what divides by both, here 2 and 2."""


EXPERTS = replace(PARALLEL, intermediate_size=32, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
"""That size with experts."""


def config_of(variant, size):
    """The configuration of a variant, its weights large enough that every part shows."""
    if variant == MIXTURE:
        variant, size = "sdpa-headwise", EXPERTS
    chosen = VARIANTS[variant]
    return make_config(chosen.resize(size), chosen.block, initializer_range=0.1)


def save(variant, size, folder, seed=0):
    """The gated Qwen3 of a variant, saved to a folder."""
    model = build_model(config_of(variant, size), seed).eval()
    model.save_pretrained(folder)
    return model
