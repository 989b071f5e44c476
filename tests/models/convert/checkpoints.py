"""Random checkpoints in every layout, as small as shapes allow, and what tests ask of a folder."""

import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from gated_attention.models import GatedQwen3Config
from gated_attention.spec import GateSpec

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
HEADS, LAYERS, DIM = 4, 2, 12
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}


def sizes(num_kv_heads=2):
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": num_kv_heads,
        "head_dim": DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def next_config(num_kv_heads=2, moe=False):
    values = sizes(num_kv_heads) | {"layer_types": ["full_attention"] * LAYERS}
    values["rope_parameters"]["partial_rotary_factor"] = 1.0
    if moe:
        return Qwen3NextConfig(**values, **EXPERTS, shared_expert_intermediate_size=1)
    return Qwen3NextConfig(**values, num_experts=0, mlp_only_layers=list(range(LAYERS)))


def qwen3_5_config(num_kv_heads=2, moe=False):
    values = sizes(num_kv_heads) | {"layer_types": ["full_attention"] * LAYERS}
    values["rope_parameters"] |= {
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    }
    if moe:
        return Qwen3_5MoeTextConfig(**values, **EXPERTS, shared_expert_intermediate_size=1)
    return Qwen3_5TextConfig(**values)


STOCK = {"qwen3_next": next_config, "qwen3_5": qwen3_5_config}


def random_model(config):
    """A model whose every weight is random and large enough that a wrong one shows."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            start = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.3 * start if name.endswith("norm.weight") else 0.3 * start)
            if ".shared_expert.down_proj." in name:
                weight.zero_()  # Qwen3-MoE has no shared expert
    return model


def save(config, folder):
    random_model(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def distance(one, other):
    return (one - other).abs().max().item()


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_model(one, other):
    """Configuration and weights, to the bit."""
    assert read_config(one) == read_config(other)
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def pack_per_group(q, g, num_kv_heads):
    """The release's `q_proj`: of every key/value group the queries, then the gates."""
    group, rows = HEADS // num_kv_heads, len(g) // HEADS
    packed = []
    for first in range(0, HEADS, group):
        packed += [q[DIM * first : DIM * (first + group)], g[rows * first : rows * (first + group)]]
    return torch.cat(packed)


def write_release(folder, granularity, num_kv_heads=2, **changes):
    """The paper's release as it lies on the hub; returns the model whose weights it holds."""
    gates = GateSpec(granularity=granularity, dtype="model") if granularity else ()
    model = random_model(GatedQwen3Config(**sizes(num_kv_heads), gates=gates))
    state = dict(model.state_dict())
    for layer in range(LAYERS if granularity else 0):
        q_proj, g_proj = (f"model.layers.{layer}.self_attn.{name}.weight" for name in ("q_proj", "g_proj"))
        state[q_proj] = pack_per_group(state[q_proj], state.pop(g_proj), num_kv_heads)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = {key: value for key, value in sizes(num_kv_heads).items() if key != "rope_parameters"}
    config |= {
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"},
        "model_type": "qwen2",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "use_qk_norm": True,
        "qkv_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "torch_dtype": "float32",
        "headwise_attn_output_gate": granularity == "headwise",
        "elementwise_attn_output_gate": granularity == "elementwise",
    }
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_qwen3.py").write_text("")
    return model
