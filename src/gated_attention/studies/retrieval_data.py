"""Retrieval documents as JSON lines, to be mixed into training text."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.evaluate.retrieval import KINDS, make_samples
from gated_attention.files import write_text, writing_to
from gated_attention.studies.evaluate import plain_encoder, read_filler
from gated_attention.train.tokenizer import load_tokenizer


def write_retrieval_data(
    path: Path,
    tokenizer: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_samples: int,
    seed: int,
    filler: str | None,
) -> int:
    """Write question and answer as one `text`, `domain` the kind of question; returns how many.

    Raises:
        ValueError: if the tokenizer or the filler cannot be read, a length is too short, or nothing can be written.
    """
    encode, text = plain_encoder(load_tokenizer(tokenizer)), read_filler(filler)
    lines = [
        json.dumps({"text": f"{sample.prompt}{sample.answer}", "domain": sample.kind}, ensure_ascii=False) + "\n"
        for kind in KINDS
        for length in lengths
        for sample in make_samples(
            kind, encode, length=length, depths=depths, num_samples=num_samples, seed=seed, filler=text
        )
    ]
    with writing_to(path, "choose another file"):
        write_text(path, "".join(lines))
    return len(lines)
