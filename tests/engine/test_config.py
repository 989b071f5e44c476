"""Sizes, variants and matched widths as OLMo-core's configurations; what the engine refuses."""

import pytest
from engine_models import DENSE, MOE, config_of
from olmo_core.nn.transformer import TransformerConfig

from gated_attention.engine import engine_config, variant_config
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES, count_parameters
from gated_attention.spec import BlockSpec

SANDWICHES = [variant.name for variant in VARIANTS.values() if variant.block.sandwich_norm]
REFUSED = {(name, size.name) for name in SANDWICHES for size in (MOE, *SIZES.values()) if size.num_experts}
"""Variants of the registry that the engine does not take: its blocks with experts have no sandwich norms."""


def fitting(*sizes):
    for size in sizes:
        for variant in VARIANTS.values():
            try:
                yield variant, size, variant.resize(size)
            except ValueError:
                continue  # maps that cost more than the FFN; experts where there are none


def test_every_variant_at_every_size_has_the_parameters_that_the_registry_says():
    for variant, size, resized in fitting(DENSE, MOE, *SIZES.values()):
        config = make_config(resized, variant.block)
        if (variant.name, size.name) in REFUSED:
            with pytest.raises(ValueError, match="sandwich norms in dense blocks only"):
                engine_config(config)
            continue
        count = engine_config(config).num_params
        assert count == count_parameters(resized, variant.block).total, (variant.name, size.name)


@pytest.mark.parametrize("size", ["1.7b-28l", "1.7b-48l", "15a2b"])
def test_the_papers_models_have_their_parameters_once_built(size):
    config = variant_config("sdpa-headwise", size)
    model = config.build(init_device="meta")
    resized = VARIANTS["sdpa-headwise"].resize(SIZES[size])
    expected = count_parameters(resized, VARIANTS["sdpa-headwise"].block).total
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params == expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("experts-x1.03", "switch-kv-8-top-8")])
def test_a_configuration_survives_being_written(variant):
    config = engine_config(config_of(variant, DENSE))
    assert TransformerConfig.from_dict(config.as_config_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"attention_bias": True}, "attention_bias=False only, not True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.0 only, not 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='silu' only, not 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "not 'linear'"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        engine_config(make_config(DENSE, BlockSpec(), **override))
