"""Small models of many families, one row each: class, configuration, inputs."""

from typing import Any, NamedTuple

import torch
import transformers as tf

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
}
DECODER = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
VISION = {
    **{key: value for key, value in WIDTHS.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
}
BART: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


class Family(NamedTuple):
    """A small model of a family."""

    kind: str
    """Its class in transformers; the configuration's is the model's."""
    settings: dict[str, Any]
    inputs: str = "text"
    no_sites: tuple[str, ...] = ()
    """Sites that the family has no projection for."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", DECODER),
    "mistral": Family("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen2": Family("Qwen2ForCausalLM", DECODER),
    "qwen3": Family("Qwen3ForCausalLM", DECODER),
    "gemma": Family("GemmaForCausalLM", DECODER),
    "gemma2": Family("Gemma2ForCausalLM", {**DECODER, "sliding_window": 4}),
    "gemma3": Family("Gemma3ForCausalLM", {**DECODER, "sliding_window": 4}),
    "olmo2": Family("Olmo2ForCausalLM", {key: value for key, value in DECODER.items() if key != "head_dim"}),
    "granite": Family("GraniteForCausalLM", {key: value for key, value in DECODER.items() if key != "head_dim"}),
    "phi": Family("PhiForCausalLM", {**DECODER, "partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3ForCausalLM", {**DECODER, **SPECIAL}),
    "smollm3": Family("SmolLM3ForCausalLM", {**DECODER, **SPECIAL}),
    "glm": Family("GlmForCausalLM", {**DECODER, **SPECIAL}),
    "cohere": Family("CohereForCausalLM", DECODER),
    "stablelm": Family("StableLmForCausalLM", {**DECODER, "partial_rotary_factor": 0.5}),
    "gpt_neox": Family("GPTNeoXForCausalLM", WIDTHS),
    "gpt2": Family("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, **SPECIAL}),
    "opt": Family("OPTForCausalLM", {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32, **SPECIAL}),
    "mixtral": Family("MixtralForCausalLM", {**DECODER, **EXPERTS}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {**DECODER, **EXPERTS}),
    "olmoe": Family("OlmoeForCausalLM", {**{k: v for k, v in DECODER.items() if k != "head_dim"}, **EXPERTS}),
    "gpt_oss": Family("GptOssForCausalLM", {**DECODER, **EXPERTS, "sliding_window": 4}),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            **{k: v for k, v in DECODER.items() if k not in ("head_dim", "num_key_value_heads")},
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        no_sites=("value", "key", "query"),
    ),
    "bert": Family("BertForMaskedLM", WIDTHS),
    "roberta": Family("RobertaForMaskedLM", {**WIDTHS, "pad_token_id": 0}),
    "electra": Family("ElectraForMaskedLM", {**WIDTHS, "embedding_size": 32}),
    "albert": Family("AlbertForMaskedLM", {**WIDTHS, "embedding_size": 32}),
    "distilbert": Family(
        "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 61}
    ),
    "modernbert": Family("ModernBertForMaskedLM", {**WIDTHS, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}),
    "bart": Family("BartForConditionalGeneration", BART),
    "t5": Family(
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 61}
        | {"decoder_start_token_id": 0, "eos_token_id": None},
    ),
    "vit": Family("ViTForImageClassification", VISION, "image"),
    "dinov2": Family("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}, "image"),
    "deit": Family("DeiTForImageClassification", VISION, "image"),
    "siglip": Family("SiglipVisionModel", VISION, "image"),
    "clip": Family("CLIPVisionModel", VISION, "image"),
    "whisper": Family(
        "WhisperForConditionalGeneration", {**BART, "num_mel_bins": 8, "max_source_positions": 20}, "audio"
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC",
        {**WIDTHS, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
        "sound",
    ),
}


def make_model(name: str, **overrides: Any) -> tf.PreTrainedModel:
    """A small model of the family, the same at each call, whose weights are large enough to matter."""
    family = FAMILIES[name]
    kind = getattr(tf, family.kind)
    torch.manual_seed(0)
    return kind(kind.config_class(**{**family.settings, **overrides})).eval()


def make_inputs(name: str, model: tf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    kind = FAMILIES[name].inputs
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if kind == "sound":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    inputs = {"input_features": torch.randn(2, 8, 40, generator=generator)} if kind == "audio" else {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    return inputs


def output(name: str, model: tf.PreTrainedModel) -> torch.Tensor:
    """Logits, or hidden states where a model has no head."""
    return model(**make_inputs(name, model))[0]
