"""Retrieval questions of every kind and length, and files of them to train on."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.evaluate.retrieval import KINDS, Encode, Sample, make_samples
from gated_attention.files import write_text, writing_to
from gated_attention.jobs.text import encoder
from gated_attention.ranges import require_within
from gated_attention.train.text.corpus import load_documents
from gated_attention.train.text.tokenizer import load_tokenizer

_FILLER_CHARACTERS = 2_000_000


def all_samples(
    encode: Encode, *, lengths: Sequence[int], depths: Sequence[float], num_samples: int, seed: int, filler: str | None
) -> list[Sample]:
    """The samples of `evaluate.retrieval.make_samples` for every kind and length.

    Args:
        filler: Source of the text that needles are hidden in; None generates it.

    Raises:
        ValueError: if the filler cannot be read, or a length is too short.
    """
    text = ""
    for row in load_documents(filler) if filler is not None else ():
        text += row["text"] + "\n"
        if len(text) >= _FILLER_CHARACTERS:
            break
    return [
        sample
        for kind in KINDS
        for length in lengths
        for sample in make_samples(
            kind, encode, length=length, depths=depths, num_samples=num_samples, seed=seed, filler=text
        )
    ]


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
    """Write JSON lines with question and answer as `text` and the kind of question as `domain`; returns their number.

    Raises:
        ValueError: if the tokenizer or the filler cannot be read, a length is too short, or nothing can be written.
    """
    for name, values, least, most in (
        ("length", lengths, 1, 2**30),
        ("depth", depths, 0, 1),
        ("samples", [num_samples], 1, 10**7),
        ("seed", [seed], 0, 2**63),
    ):
        if not values:
            raise ValueError(f"no {name} is given; give at least one")
        for value in values:
            require_within(name, value, least=least, most=most)
    with writing_to(path, "choose another file"):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{path} cannot be written: its folder must exist, and it must be a file")
    samples = all_samples(
        encoder(load_tokenizer(tokenizer)),
        lengths=lengths,
        depths=depths,
        num_samples=num_samples,
        seed=seed,
        filler=filler,
    )
    rows = ({"text": f"{sample.prompt}{sample.answer}", "domain": sample.kind} for sample in samples)
    with writing_to(path, "choose another file"):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(samples)
