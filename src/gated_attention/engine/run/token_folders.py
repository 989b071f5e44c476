"""Token ids as the engine reads them, and the folders of shards that `tokenize` writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gated_attention.ranges import require_once
from gated_attention.shards import mix


@dataclass(frozen=True, slots=True)
class Tokens:
    """Files of token ids: little-endian, without a header, EOS after every document.

    Attributes:
        train: Sequences are cut from each file by itself.
        validation: None are held out if it is empty.
        vocab_size: One more than the largest id.
        tokenizer: The folder of the tokenizer, if there is one.
        source: What a record says they were made from.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer: Path | None = None
    source: str = ""

    def sequences(self, paths: Sequence[Path], context: int) -> int:
        """How many whole sequences the files hold."""
        return sum(path.stat().st_size // (np.dtype(self.dtype).itemsize * context) for path in paths)

    def held_out(self, context: int, num_tokens: int) -> npt.NDArray[np.int64]:
        """Evenly spaced held-out sequences of about `num_tokens` in all, (sequences, context)."""
        files = [np.memmap(path, self.dtype, mode="r") for path in self.validation if path.stat().st_size]
        rows = [ids[: len(ids) // context * context].reshape(-1, context) for ids in files]
        counts = np.cumsum([0, *map(len, rows)])
        wanted = min(int(counts[-1]), max(1, num_tokens // context))
        found = np.empty((wanted, context), np.int64)
        for place, row in enumerate(np.arange(wanted) * int(counts[-1]) // max(1, wanted)):
            file = int(np.searchsorted(counts, row, side="right")) - 1
            found[place] = rows[file][row - counts[file]]
        return found


def read_folders(paths: Sequence[str], validation: str | None = None) -> Tokens:
    """Folders of shards of one tokenizer, read one after the other.

    Raises:
        ValueError: as `shards.mix`.
    """
    require_once("data.paths", paths)
    names = dict.fromkeys([*paths, *([validation] if validation else [])], 1.0)
    opened = {name: shards for name, (shards, _) in zip(names, mix(names), strict=True)}
    first = opened[paths[0]]
    return Tokens(
        train=tuple(path for name in paths for path in opened[name].paths),
        validation=tuple(opened[validation].paths) if validation else (),
        dtype=first.dtype.str,
        vocab_size=first.index.tokenizer.vocab_size,
        eos_token_id=first.index.tokenizer.eos_token_id,
        tokenizer=first.tokenizer,
        source=", ".join(paths),
    )
