"""A small configuration of every family of transformers whose attention has an output gate."""

import torch
import transformers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}  # fmt: skip
INDEXED = {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 16}
ONE_FULL = ["linear_attention", "full_attention"]
BOTH = ["sliding_attention", "full_attention"]
MROPE = {
    "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    "partial_rotary_factor": 1.0,
}  # fmt: skip

THETA = {"rope_type": "default", "rope_theta": 10_000.0}
QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 6,
    "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 4,
}  # fmt: skip
WINDOW = {"sliding_window": 16, "layer_types": BOTH}
QWEN = {**SMALL, **HEAD, **LINEAR, "layer_types": ONE_FULL}
INKLING = {
    **SMALL, **HEAD, **ROUTED, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 16, "d_rel": 4, "rel_extent": 8, "n_layers_per_attn_res_block": 1,
    "layer_types": ["hybrid_sliding", "hybrid"], "unpadded_vocab_size": 50,
}  # fmt: skip

# By the name of its configuration: older releases of transformers lack some.
FAMILIES = {
    "Qwen3NextConfig": {**QWEN, **EXPERTS, **SHARED},
    "Qwen3_5TextConfig": {**QWEN, "rope_parameters": MROPE},
    "Qwen3_5MoeTextConfig": {**QWEN, **EXPERTS, **SHARED, "rope_parameters": MROPE},
    "Qwen4ExpTextConfig": {**QWEN, **EXPERTS, **SHARED, **QSA, "rope_parameters": MROPE},
    "AfmoeConfig": {**SMALL, **HEAD, **EXPERTS, **WINDOW, "num_dense_layers": 1},
    "HrmTextConfig": {**SMALL, **HEAD, "H_cycles": 2, "L_cycles": 1},
    "MuseGlimmerTextConfig": {**SMALL, **HEAD, **WINDOW, "rope_parameters": THETA},
    "MuseSparkTextConfig": {
        **SMALL, **WINDOW, **EXPERTS, "head_dim": 8, "num_local_experts": 4, "moe_hidden_size": 16,
        "num_key_value_heads": 4,
    },
    "BeamConfig": {**SMALL, **HEAD, **EXPERTS, **WINDOW, "n_group": 1, "topk_group": 1},
    "DoryConfig": {
        **SMALL, **HEAD, "num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1, "sliding_window": 16,
        "layer_types": [*BOTH, "sliding_attention"],
    },
    "Step3p7TextConfig": {
        **SMALL, **HEAD, **ROUTED, **WINDOW, "num_local_experts": 4, "share_expert_dim": 16, "pad_token_id": 0,
        "num_sliding_attention_heads": 2,
    },
    "LagunaConfig": {**SMALL, **HEAD, **EXPERTS, **WINDOW, "num_attention_heads_per_layer": [4, 2]},
    "LagunaConfig, elementwise": {**SMALL, **HEAD, **EXPERTS, **WINDOW, "gating": "per-element"},
    "Lfm3Config": {**SMALL, **HEAD, **WINDOW},
    "Lfm3Config, no gate": {**SMALL, **HEAD, **WINDOW, "use_attention_gate": False},
    "AXK2Config": {**SMALL, **LATENT, **ROUTED, **INDEXED},
    "BailingHybridConfig": {
        **SMALL, **LATENT, **EXPERTS, "num_local_experts": 4, "n_group": 1, "topk_group": 1, "layer_types": ONE_FULL,
    },
    "Dots3NoteTextConfig": {**SMALL, **LATENT, **ROUTED, **INDEXED},
    "HYV4Config": {**SMALL, **LATENT, **ROUTED, **INDEXED},
    "HYV4VLTextConfig": {
        **SMALL, **LATENT, **ROUTED, **INDEXED, "rope_parameters": {**THETA, "mrope_section": [2, 1, 1]},
    },
    "Inkling2TextConfig": INKLING,
    "Inkling2LoopTextConfig": {
        **INKLING, "num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2, "loop_gate_rank": 4,
    },
    "MiniMaxConfig": {**SMALL, **HEAD, "num_local_experts": 4, "layer_types": ONE_FULL},
}  # fmt: skip


def build(name):
    """The family's causal model, or its decoder where none is for text alone; in float64 if its forward allows that."""
    config = getattr(transformers, name.partition(",")[0])(**FAMILIES[name])
    torch.manual_seed(0)
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, type(config).__name__.replace("Config", "Model"))._from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("sinks", "gate_bias")):
                parameter.normal_()
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")
    return (model if name.startswith("Inkling2") else model.double()).eval()
