"""OLMo-core's configuration of a gated Qwen3, and what its decoder blocks add around the attention."""

from dataclasses import dataclass, replace
from typing import Any

from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.moe import MoEType
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerBlockType, TransformerConfig, TransformerType
from olmo_core.nn.transformer.block import TransformerBlockBase
from torch import Tensor, nn

from gated_attention.engine.experts import BalancedMoEConfig, BalancedRouterConfig
from gated_attention.engine.mixer import GatedSelfAttentionConfig
from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig, make_config
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.registry.variants import get_variant
from gated_attention.sizes import get_size
from gated_attention.spec import GateSpec

_ONLY = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "sliding_window": None,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "qk_norm": True,
}
"""Fields of the configuration that the engine takes with one value only."""


def variant_config(variant: str, size: str) -> TransformerConfig:
    """OLMo-core's configuration of a variant of the registry at a size, its FFN narrowed as in a study.

    Raises:
        ValueError: if there is no such variant or size, they do not fit, or the engine does not take them.
    """
    chosen = get_variant(variant)
    return engine_config(make_config(chosen.resize(get_size(size)), chosen.block))


def engine_config(
    config: GatedQwen3Config | GatedQwen3MoeConfig,
    auxiliary: AuxiliaryWeights = AuxiliaryWeights(),  # noqa: B008  frozen
) -> TransformerConfig:
    """OLMo-core's configuration of the model that transformers would build from `config`.

    Args:
        auxiliary: On the losses of routers, which `BalancedTrainModule` adds; a dense model has none.

    Raises:
        ValueError: if the engine does not take the model; names the field.
    """
    for name, value in _ONLY.items():
        if (found := getattr(config, name, value)) != value:
            raise ValueError(f"the engine takes {name}={value!r} only, not {found!r}")
    if (rope := config.rope_parameters)["rope_type"] != "default":
        raise ValueError(f"the engine takes rope_type 'default' only, not {rope['rope_type']!r}")
    is_moe = isinstance(config, GatedQwen3MoeConfig)
    if is_moe and config.sandwich_norm:
        raise ValueError("the engine has sandwich norms in dense blocks only; use a dense size")
    norm = LayerNormConfig(name=LayerNormType.qwen_rms, eps=config.rms_norm_eps, bias=False)
    mixer = GatedSelfAttentionConfig(
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope=RoPEConfig(theta=int(rope["rope_theta"])),
        norm=norm,
        block=replace(config.block, sandwich_norm=False, output_clip=None),
    )
    block: dict[str, Any] = {"sequence_mixer": mixer, "layer_norm": norm}
    if is_moe:
        router = BalancedRouterConfig(
            top_k=config.num_experts_per_tok, normalize_expert_weights=1.0 if config.norm_topk_prob else None
        )
        block |= {
            "name": TransformerBlockType.moe,
            "feed_forward_moe": BalancedMoEConfig(
                name=MoEType.dropless,
                num_experts=config.num_experts,
                hidden_size=config.moe_intermediate_size,
                router=router,
                lb_loss_weight=auxiliary.load_balance,
                z_loss_weight=auxiliary.router_z,
            ),
        }
    else:
        block |= {
            "name": TransformerBlockType.peri_norm if config.sandwich_norm else TransformerBlockType.default,
            "feed_forward": FeedForwardConfig(hidden_size=config.intermediate_size, bias=False),
        }
    return TransformerConfig(
        name=TransformerType.moe if is_moe else TransformerType.default,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_layers=config.num_hidden_layers,
        block=ClippedBlockConfig(output_clip=config.output_clip, **block)
        if config.output_clip
        else TransformerBlockConfig(**block),
        lm_head=LMHeadConfig(layer_norm=norm, bias=False),
        init_std=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def undecayed(config: GatedQwen3Config | GatedQwen3MoeConfig) -> list[str]:
    """Patterns of the weights that no weight decay acts on, as in `train.parameters`: norms, biases, gates alone.

    For `OptimGroupOverride` of OLMo-core's optimizers, which decay all that is not named.
    """
    gates: tuple[GateSpec, ...] = config.gates
    alone = [f"*.{GATE_MODULES[spec.site]}.weight" for spec in gates if spec.input == "parameter"]
    return ["*norm.weight", *alone, *(["*.bias"] if any(spec.bias is not None for spec in gates) else [])]


class OutputClip(nn.Module):
    """Bounds the absolute value of what a block adds to the residual stream."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """`x`, clipped."""
        return x.clamp(-self.bound, self.bound)


@dataclass
class ClippedBlockConfig(TransformerBlockConfig):  # type: ignore[misc]
    """OLMo-core's block, dense or with experts, with the outputs of attention and FFN clipped (A.6)."""

    output_clip: float = 100.0

    def build(self, **options: Any) -> TransformerBlockBase:
        """The block; the clip stands where dropout would."""
        values = self.as_dict(recurse=False)
        clip = OutputClip(values.pop("output_clip"))
        block = TransformerBlockConfig(**values).build(**options)
        for name in ("attention_residual_stream", "feed_forward_residual_stream"):
            getattr(block, name, block).dropout = clip
        return block
