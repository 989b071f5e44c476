"""Text in, trained models out."""

from gated_attention.train.text.data import DataConfig, PackedData, load_data
from gated_attention.train.trainer import TrainConfig, train

__all__ = ["DataConfig", "PackedData", "TrainConfig", "load_data", "train"]
