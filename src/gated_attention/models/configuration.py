"""The configuration of gated Qwen3 models: Qwen3's, and a tuple of gates."""

from typing import Any

from transformers import Qwen3Config

from gated_attention.nn.gate import GATE_MODULES
from gated_attention.sizes import ModelSize
from gated_attention.spec import AttentionGeometry, Gates, as_gates, check_qk_norm


class GatedQwen3Config(Qwen3Config):  # type: ignore[misc]  # transformers is untyped
    """`Qwen3Config` plus `gates`: none, one, or at most one per site, as specs or as their dictionaries.

    Raises:
        ValueError: if a gate is invalid or does not fit the widths.
    """

    model_type = "gated_qwen3"

    # G1, G3 and G4 shard with the heads they gate. G2's values are gated before the cache, so v_g_proj shards
    # like v_proj; G5 acts on the summed output of o_proj and stays whole.
    base_model_tp_plan = {  # noqa: RUF012  transformers' own idiom
        **Qwen3Config.base_model_tp_plan,
        **{f"layers.*.self_attn.{name}": "colwise" for site, name in GATE_MODULES.items() if site != "output"},
    }

    gates: Any = ()  # whatever `as_gates` takes; a tuple of GateSpec once assigned

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for spec in self.gates:
            spec.in_features(self.geometry)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., gates=...)` assigns to the finished configuration.
        if name == "gates":
            value = as_gates(value)
            check_qk_norm(value)
        super().__setattr__(name, value)

    @property
    def geometry(self) -> AttentionGeometry:
        """The attention widths that gate shapes follow from."""
        return AttentionGeometry(self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    @classmethod
    def from_size(cls, size: ModelSize, gates: Gates = (), **overrides: Any) -> "GatedQwen3Config":
        """The configuration of a named size; `overrides` are fields of the configuration."""
        values = {
            "num_hidden_layers": size.num_hidden_layers,
            "hidden_size": size.hidden_size,
            "num_attention_heads": size.num_attention_heads,
            "num_key_value_heads": size.num_key_value_heads,
            "head_dim": size.head_dim,
            "intermediate_size": size.intermediate_size,
            "vocab_size": size.vocab_size,
            "max_position_embeddings": size.context,
            "tie_word_embeddings": size.tie_word_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        }
        return cls(gates=gates, **{**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """As `Qwen3Config.to_dict`, gates as dictionaries."""
        return {**super().to_dict(), "gates": [spec.to_dict() for spec in self.gates]}
