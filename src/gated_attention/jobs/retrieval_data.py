"""Retrieval documents as JSON lines, to be mixed into training text."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.evaluate.retrieval import KINDS, make_samples
from gated_attention.files import write_text, writing_to
from gated_attention.jobs.domain_text import encoder
from gated_attention.jobs.evaluate import read_filler
from gated_attention.ranges import require_within
from gated_attention.train.text.tokenizer import load_tokenizer


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
    for name, values, bounds in (
        ("length", lengths, {"least": 1, "most": 2**30}),
        ("depth", depths, {"least": 0, "most": 1}),
        ("samples", [num_samples], {"least": 1, "most": 10**7}),
        ("seed", [seed], {"least": 0, "most": 2**63}),
    ):
        if not values:
            raise ValueError(f"no {name} is given; give at least one")
        for value in values:
            require_within(name, value, **bounds)
    with writing_to(path, "choose another file"):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{path} cannot be written: its folder must exist, and it must be a file")
    encode, text = encoder(load_tokenizer(tokenizer)), read_filler(filler)
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
