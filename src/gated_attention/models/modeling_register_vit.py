"""transformers' ViT with registers: learned tokens that every layer reads and that no head does."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTEmbeddings

from gated_attention.models.parent import init_with


class RegisterViTConfig(ViTConfig):  # type: ignore[misc]  # transformers is untyped
    """`ViTConfig` and a number of registers (Darcet et al., arXiv 2309.16588)."""

    model_type = "register_vit"

    num_register_tokens: int = 4


class RegisterViTEmbeddings(ViTEmbeddings):  # type: ignore[misc]
    """The class token, then registers, which have no positions, then patches."""

    def __init__(self, config: RegisterViTConfig, use_mask_token: bool = False) -> None:
        super().__init__(config, use_mask_token)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `ViTEmbeddings`, with the registers behind the class token."""
        x = super().forward(*args, **kwargs)  # (B, 1 + patches, C)
        return torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)


class _InitialisesRegisters(nn.Module):
    config: RegisterViTConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, RegisterViTEmbeddings):  # after the class token and positions, which pair with ViT's
            init.trunc_normal_(module.register_tokens, mean=0.0, std=self.config.initializer_range)


class RegisterViTModel(_InitialisesRegisters, ViTModel):  # type: ignore[misc]
    """The encoder; its last hidden states are those of the class token, registers and patches."""

    config: RegisterViTConfig
    config_class = RegisterViTConfig
    __init__ = init_with(ViTModel, ViTEmbeddings=RegisterViTEmbeddings)


class RegisterViTForImageClassification(_InitialisesRegisters, ViTForImageClassification):  # type: ignore[misc]
    """The classifier, whose head reads the class token."""

    config: RegisterViTConfig
    config_class = RegisterViTConfig
    __init__ = init_with(ViTForImageClassification, ViTModel=RegisterViTModel)
