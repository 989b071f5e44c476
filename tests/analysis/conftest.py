"""Small models of every family that `analyze` reads, in float64 and with weights large enough to matter."""

import gated_families
import pytest
import torch
import transformers
from gated_families import EXPERTS, LINEAR, SHARED

SMALL = {**gated_families.SMALL, "intermediate_size": 64}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=16, attn_logit_softcapping=2.0),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=128, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 4}, **EXPERTS, **SHARED, **LINEAR, head_dim=16
    ),
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, **LINEAR, head_dim=16,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True,
            "partial_rotary_factor": 1.0,
        },
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, first_k_dense_replace=1,
    ),
    "afmoe": lambda: transformers.AfmoeConfig(
        **SMALL, **EXPERTS, head_dim=16, num_dense_layers=1, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.fixture
def build_family():
    """A family's model in float64."""

    def build(name):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("sinks"):
                    parameter.normal_()
        if hasattr(model.config, "_experts_implementation"):
            model.set_experts_implementation("eager")
        return model.double().eval()

    return build
