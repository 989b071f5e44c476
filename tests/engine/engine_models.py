"""Small models for the tests of the engine, and the variants that are trained in parallel."""

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import ModelSize

DENSE = ModelSize("dense", 2, 24, 4, 2, 8, 96, 31, 16, ffn_multiple=1)
MOE = ModelSize("moe", 2, 24, 4, 2, 8, 16, 31, 16, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
TRAINED = ("baseline", "sdpa-headwise", "sdpa-elementwise", "value-elementwise", "learned-sink")
"""The variants that every layout of processes trains."""

PARALLEL = ModelSize("parallel", 2, 64, 4, 2, 16, 192, 256, 64, ffn_multiple=4)
"""Their size: PyTorch shards by tensor and by data only what divides by both, here 2 and 2."""


def config_of(variant, size):
    """The configuration of a variant, its weights large enough that every part shows."""
    chosen = VARIANTS[variant]
    return make_config(chosen.resize(size), chosen.block, initializer_range=0.1)


def save(variant, size, folder, seed=0):
    """The gated Qwen3 of a variant, saved to a folder."""
    model = build_model(config_of(variant, size), seed).eval()
    model.save_pretrained(folder)
    return model
