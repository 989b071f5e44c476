"""Blocks with everything that can be sharded, and the small model that carries them."""

import torch
from transformers import LlamaConfig

from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.models.families.add_gates import register
from gated_attention.sizes import ModelSize
from gated_attention.spec import SITES, BlockSpec, GateSpec, SwitchSpec

DENSE = ModelSize("dense", 2, 32, 4, 2, 8, 48, 32, 16, ffn_multiple=1)
MOE = ModelSize("moe", 2, 32, 4, 2, 8, 16, 32, 16, num_experts=4, num_experts_per_tok=2)


def _gate(**fields):
    return BlockSpec((GateSpec(**fields),))


BLOCKS = {
    "none": BlockSpec(),
    **{f"{site} elementwise": _gate(site=site) for site in SITES},
    **{f"{site} headwise": _gate(site=site, granularity="headwise") for site in ("sdpa", "value")},
    "key headwise, added": _gate(site="key", granularity="headwise", combine="add"),
    **{f"{site} head-shared": _gate(site=site, head_shared=True) for site in ("sdpa", "value", "query")},
    "head-shared, silu, added": _gate(head_shared=True, activation="silu", combine="add"),
    "input_dim and bias": _gate(granularity="headwise", input_dim=8, bias=1.0),
    "parameter": _gate(input="parameter"),
    "parameter headwise": _gate(input="parameter", granularity="headwise"),
    "parameter head-shared": _gate(input="parameter", head_shared=True),
    "parameter output": _gate(input="parameter", site="output"),
    "learned sink": _gate(input="lse", granularity="headwise", bias=0.5),
    "off by one": _gate(input="lse", granularity="headwise"),
    "sdpa rms_norm": BlockSpec(sdpa_transform="rms_norm"),
    "sdpa rms_norm, gated": BlockSpec((GateSpec(),), sdpa_transform="rms_norm"),
    "sdpa silu": BlockSpec(sdpa_transform="silu"),
    "sandwich and clip": BlockSpec((GateSpec(),), sandwich_norm=True, output_clip=1.0),
    "switch": BlockSpec(switch=SwitchSpec(num_experts=4, top_k=4)),
    "switch, 2 of 4": BlockSpec(switch=SwitchSpec(num_experts=4, top_k=2)),
    "switch keys and values": BlockSpec((GateSpec(),), SwitchSpec("key_value", 2, 1)),
    "all sites": BlockSpec(tuple(GateSpec(site=site) for site in SITES)),
    "moe": _gate(granularity="headwise"),
    "added to Llama": BlockSpec(tuple(GateSpec(site=site) for site in SITES)),
}


def config_of(name):
    if name == "added to Llama":
        widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
        return register(LlamaConfig)(**widths, **heads, gates=BLOCKS[name].gates)
    return make_config(MOE if name == "moe" else DENSE, BLOCKS[name], initializer_range=0.2)


def ids():
    return torch.arange(22).reshape(2, 11) * 7 % 32
