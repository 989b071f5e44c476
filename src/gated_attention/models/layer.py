"""What gated decoder layers share, dense or mixture-of-experts: sandwich norms and clipped outputs."""

from typing import Any

from torch import Tensor, nn

from gated_attention.models.configuration_gated_qwen3 import GatedConfig


class GatedLayer(nn.Module):
    """The forward pass of Qwen3's decoder layer, with what is added to the residual stream normalised or clipped.

    Sandwich norms (T2.7) follow the attention and the FFN; clipping (A.6) bounds what leaves them, after the norm.
    """

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module  # before the FFN: Qwen3's name

    def add_residual_control(self, config: GatedConfig, norm: type[nn.Module]) -> None:
        """Give the layer its sandwich norms, of the model's own kind, and its bound."""
        self.output_clip = config.output_clip
        self.sandwich_norm = config.sandwich_norm
        if config.sandwich_norm:
            self.attention_output_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.feedforward_output_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the decoder layers of Qwen3 and Qwen3-MoE."""
        y, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.sandwich_norm:
            y = self.attention_output_layernorm(y)
        hidden_states = hidden_states + self._clip(y)
        y = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.sandwich_norm:
            y = self.feedforward_output_layernorm(y)
        return hidden_states + self._clip(y)

    def _clip(self, y: Tensor) -> Tensor:
        return y if self.output_clip is None else y.clamp(-self.output_clip, self.output_clip)
