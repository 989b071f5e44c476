"""How good a model is."""

from gated_attention.evaluate.loss import HeldOutLoss, held_out_loss

__all__ = ["HeldOutLoss", "held_out_loss"]
