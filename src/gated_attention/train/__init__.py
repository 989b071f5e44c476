"""Text in, trained models out.

The names below load on first use: processes that only tokenise import no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gated_attention.train.text.data import DataConfig, PackedData, load_data
    from gated_attention.train.trainer import TrainConfig, train

__all__ = ["DataConfig", "PackedData", "TrainConfig", "load_data", "train"]

_DATA = ("DataConfig", "PackedData", "load_data")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gated_attention.train' has no attribute {name!r}")
    home = "gated_attention.train.text.data" if name in _DATA else "gated_attention.train.trainer"
    return getattr(import_module(home), name)
