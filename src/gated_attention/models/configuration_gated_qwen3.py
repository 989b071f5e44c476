"""The configurations of gated Qwen3 models, dense and mixture-of-experts: Qwen3's, and what a `BlockSpec` holds."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from transformers import Qwen3Config, Qwen3MoeConfig

from gated_attention.models.parallel import HEAD_SHARED
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.sizes import ModelSize
from gated_attention.spec import (
    AttentionGeometry,
    BlockSpec,
    GateSpec,
    SdpaTransform,
    SwitchSpec,
    as_gates,
    check_qk_norm,
)

_PLAIN = BlockSpec()


def gate_tp_plan(gates: Iterable[GateSpec]) -> dict[str, str]:
    """How gates shard under tensor parallelism, by the names that `GATE_MODULES` gives: with the heads they gate.

    G2's values are gated before the cache, so `v_g_proj` shards like `v_proj`. G5 acts on the summed output of
    `o_proj` and stays whole. So does a gate whose scores are a mean over all heads, which every rank needs; the
    gradient of its logits is summed over ranks. One row per head without a projection is local to its module.
    """
    plan = {}
    for spec in gates:
        name = GATE_MODULES[spec.site]
        if spec.head_shared:
            plan[name] = HEAD_SHARED
        elif spec.input == "lse" and spec.bias is not None:
            plan |= {f"{name}.bias": "colwise", name: "local_params"}
        elif spec.site != "output" and spec.input != "lse":
            plan[name] = "colwise"
    return plan


class GatedConfigMixin:
    """What gated configurations share: the fields of `BlockSpec`, normalised and checked whenever they are assigned."""

    gates: tuple[GateSpec, ...]
    switch: SwitchSpec | None
    sdpa_transform: SdpaTransform | None
    sandwich_norm: bool
    output_clip: float | None
    qk_norm: bool
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    initializer_range: float
    rms_norm_eps: float
    base_model_tp_plan: dict[str, str]
    _attn_implementation: str
    _auto_class: str | None
    auto_map: dict[str, str] | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the transformers configuration behind this class
        if getattr(self, "auto_map", None) is None:
            self.auto_map = {}  # trl asks every configuration that transformers does not define for it
        for spec in self.block.gates:
            spec.in_features(self.geometry)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., gates=...)` assigns to the finished configuration.
        if name == "gates":
            value = as_gates(value)
            check_qk_norm(value)
        elif name == "switch" and isinstance(value, Mapping):
            value = SwitchSpec(**value)
        elif name in ("sdpa_transform", "output_clip"):
            BlockSpec(**{name: value})
        super().__setattr__(name, value)
        if name in ("gates", "switch", "sdpa_transform"):
            self.base_model_tp_plan = {**type(self).base_model_tp_plan, **self._block_tp_plan()}

    def _block_tp_plan(self) -> dict[str, str]:
        """How what a block adds shards under tensor parallelism: with the heads it belongs to."""
        plan = gate_tp_plan(self.gates)
        if self.switch is not None:
            plan["switch_router"] = "colwise"
        if self.sdpa_transform == "rms_norm":
            plan |= {"sdpa_norm.weight": "colwise", "sdpa_norm": "local_params"}
        return {f"layers.*.self_attn.{name}": style for name, style in plan.items()}

    @property
    def block(self) -> BlockSpec:
        """What every decoder block carries."""
        return BlockSpec(**{field.name: getattr(self, field.name) for field in fields(BlockSpec)})

    @property
    def geometry(self) -> AttentionGeometry:
        """The attention widths that gate shapes follow from."""
        return AttentionGeometry(self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, gates and switch as dictionaries."""
        give_peft_defaults(self.model_type, "qwen3")
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if self._auto_class is None:
            content.pop("auto_map", None)  # of the folder it was read from: these classes save no code that it names
        switch = None if self.switch is None else asdict(self.switch)
        return {**content, "gates": [spec.to_dict() for spec in self.gates], "switch": switch}


def give_peft_defaults(model_type: str, base: str) -> None:
    """Give a gated model type the adapter targets that PEFT has for the one it is built on; once PEFT is imported.

    PEFT has no other way in, and reads a configuration as a dictionary right before it looks its targets up.
    """
    tables = vars(sys.modules.get("peft.utils.constants", object))
    for name, table in tables.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and base in table:
            table.setdefault(model_type, table[base])


class GatedQwen3Config(GatedConfigMixin, Qwen3Config):  # type: ignore[misc]  # transformers is untyped
    """`Qwen3Config` plus the fields of `BlockSpec`; gates are none, one, or at most one per site.

    Raises:
        ValueError: if a field is invalid or a gate does not fit the widths.
    """

    model_type = "gated_qwen3"

    gates: Any = ()  # whatever `as_gates` takes; a tuple of GateSpec once assigned
    switch: Any = None  # SwitchSpec once assigned
    sdpa_transform: SdpaTransform | None = None
    sandwich_norm: bool = False
    output_clip: float | None = None
    qk_norm: bool = True


class GatedQwen3MoeConfig(GatedConfigMixin, Qwen3MoeConfig):  # type: ignore[misc]
    """`Qwen3MoeConfig`, whose defaults are the paper's 15A2B model (Table 7), plus the fields of `BlockSpec`.

    Raises:
        ValueError: if a field is invalid or a gate does not fit the widths.
    """

    model_type = "gated_qwen3_moe"

    head_dim: int = 128
    gates: Any = ()
    switch: Any = None
    sdpa_transform: SdpaTransform | None = None
    sandwich_norm: bool = False
    output_clip: float | None = None
    qk_norm: bool = True


def make_config(size: ModelSize, block: BlockSpec = _PLAIN, **overrides: Any) -> GatedQwen3Config | GatedQwen3MoeConfig:
    """The configuration of a size with this block in every layer; `overrides` are fields of the configuration."""
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
        **{field.name: getattr(block, field.name) for field in fields(block)},
        **overrides,
    }
    if not size.num_experts:
        return GatedQwen3Config(**values)
    experts = {
        "moe_intermediate_size": size.intermediate_size,
        "num_experts": size.num_experts,
        "num_experts_per_tok": size.num_experts_per_tok,
        "norm_topk_prob": True,
    }
    return GatedQwen3MoeConfig(**{**experts, **values})
