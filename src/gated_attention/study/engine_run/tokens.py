"""The tokens of a run: shards that exist, or text packed as `compare` packs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gated_attention.engine.run.run_file import Run
from gated_attention.engine.run.token_folders import Tokens, read_folders
from gated_attention.files import new_folder, waiting_for, writing_to
from gated_attention.train.text.data import DataConfig, PackedData, load_data
from gated_attention.train.text.tokenizer import vocabulary_size

_AT_ONCE = 2**24  # ids copied at a time


def find_tokens(run: Run, cache: Path, say: Callable[[str], None]) -> Tokens:
    """What a run reads. Text is packed into the same sequences, and holds out the same, as in `compare`.

    Raises:
        ValueError: if the text or the shards are unfit, or nothing can be written to the cache.
    """
    data = run.file.data
    if data.paths:
        return read_folders(data.paths, data.validation)
    config = DataConfig(
        source=data.text or "stdlib",
        validation=data.validation,
        text_field=data.text_field,
        tokenizer=data.tokenizer or "bytes",
        block_size=run.context,
        bos=data.bos,
        packing=data.packing,
        max_validation_tokens=run.file.evaluation.tokens,
    )
    return _as_files(load_data(config, cache, say), cache, config, say)


def _as_files(data: PackedData, cache: Path, config: DataConfig, say: Callable[[str], None]) -> Tokens:
    """Packed text without the headers of its arrays."""
    blocks: Any = data.train.ids
    packed = Path(blocks.filename).parent
    folder = cache / "raw" / packed.name
    parts = {"train": data.train.ids, "validation": data.validation.ids}
    if not folder.exists():
        lock = folder.with_name(f".{folder.name}.lock")
        with writing_to(f"the cache {cache}", "free space or set XDG_CACHE_HOME"), waiting_for(lock, say):
            if not folder.exists():  # otherwise another process wrote it during the wait
                with new_folder(folder) as part:
                    for name, ids in parts.items():
                        _write(part / f"{name}.npy", ids.reshape(-1))
    return Tokens(
        train=(folder / "train.npy",),
        validation=(folder / "validation.npy",),
        dtype=f"<u{blocks.dtype.itemsize}",
        vocab_size=vocabulary_size(data.tokenizer),
        eos_token_id=data.tokenizer.eos_token_id,
        tokenizer=packed / "tokenizer",
        source=config.source,
    )


def _write(path: Path, ids: Any) -> None:
    with path.open("wb") as file:
        for start in range(0, len(ids), _AT_ONCE):
            np.asarray(ids[start : start + _AT_ONCE]).tofile(file)
