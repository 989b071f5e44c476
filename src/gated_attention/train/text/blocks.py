"""Sequences of token ids as a model reads them: fixed blocks, positions within documents, batches."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.int32]

Packing = Literal["stream", "documents"]
"""Whether a token sees all tokens before it in its block, or only those of its own document."""


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of token ids, (num_blocks, block_size), mapped from a file.

    This is a flat array, not an Arrow table: a batch of 64 x 1024 ids takes 0.3 ms to read and collate, not 8 ms.

    Args:
        opener: The first token of every document, if documents are kept apart: positions then restart at each, which is
            how transformers learns of documents. None reads a block as one sequence.
    """

    def __init__(self, ids: Ids, opener: int | None = None) -> None:
        self.ids, self.opener = ids, opener

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = torch.from_numpy(self.ids[index].astype(np.int64))
        if self.opener is None:
            return {"input_ids": input_ids}
        return {"input_ids": input_ids, "position_ids": positions(input_ids, self.opener)}

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.ids.size)

    def sample(self, num_tokens: int) -> "Blocks":
        """Evenly spaced blocks of about `num_tokens` in all, at least one; neighbours would share documents."""
        num_blocks = min(len(self), max(1, num_tokens // self.ids.shape[1]))
        return Blocks(self.ids[evenly_spaced(len(self), num_blocks)], self.opener)

    def undivided(self) -> "Blocks":
        """The blocks as plain sequences; if documents are kept apart, only blocks that hold a single document."""
        if self.opener is None:
            return self
        whole = ~(np.asarray(self.ids)[:, 1:] == self.opener).any(1)
        return Blocks(np.asarray(self.ids)[whole] if whole.any() else self.ids)

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """All blocks in order as inputs of a model, (B, T) each."""
        starts = range(0, len(self), batch_size)
        return [stack([self[i] for i in range(start, min(len(self), start + batch_size))]) for start in starts]

    def id_batches(self, batch_size: int) -> list[Tensor]:
        """The token ids of `batches`."""
        return [batch["input_ids"] for batch in self.batches(batch_size)]


def evenly_spaced(num_blocks: int, num_chosen: int) -> npt.NDArray[np.int64]:
    """Indices of `num_chosen` blocks spread evenly over all, starting with the first."""
    return np.arange(num_chosen) * num_blocks // num_chosen


def positions(input_ids: Tensor, opener: int) -> Tensor:
    """Positions, (..., T), of tokens counted from the last `opener`."""
    index = torch.arange(input_ids.shape[-1]).expand(input_ids.shape)
    starts = torch.where(input_ids == opener, index, 0)
    return index - starts.cummax(-1).values


def stack(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks as one batch, (B, T) each."""
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def collate(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for a causal language model; the model itself shifts the labels."""
    batch = stack(blocks)
    return {**batch, "labels": batch["input_ids"]}
