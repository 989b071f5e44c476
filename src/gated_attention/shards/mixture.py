"""Several folders of token shards, read in fixed proportions."""

import os
from collections.abc import Mapping

from gated_attention.ranges import require_once, require_within
from gated_attention.shards.read import TokenShards, is_token_folder, open_shards

Mixture = list[tuple[TokenShards, float]]
"""Folders with their shares of the tokens, which sum to 1."""


def mix(weights: Mapping[str, float]) -> Mixture:
    """Folders of token shards with their shares; weights need not sum to 1.

    Raises:
        ValueError: if a weight is not positive, a folder is not finished, or two have different tokenizers.
    """
    for folder, weight in weights.items():
        require_within(f"weight of {folder}", weight, above=0)
    opened = [open_shards(folder) for folder in weights]
    first = opened[0].index.tokenizer
    for shards in opened[1:]:
        if shards.index.tokenizer.sha256 != first.sha256:
            names = f"{opened[0].folder} ({first.name}) and {shards.folder} ({shards.index.tokenizer.name})"
            raise ValueError(
                f"{names} have different tokenizers; write one again with --tokenizer {opened[0].tokenizer}"
            )
    return [(shards, weight / sum(weights.values())) for shards, weight in zip(opened, weights.values(), strict=True)]


def find_shards(source: str) -> Mixture:
    """The token shards that a source names, `FOLDER` or `FOLDER=WEIGHT,FOLDER=WEIGHT`; none if it names text.

    Raises:
        ValueError: as `mix`, or if a weight is no number or a folder is named twice.
    """
    if is_token_folder(source):
        return mix({source: 1.0})
    if "=" not in source or os.path.exists(os.path.expanduser(source)):
        return []
    parts = [part.rpartition("=")[::2] for part in source.split(",")]
    require_once("folder", [folder for folder, _ in parts])
    weights = {}
    for folder, weight in parts:
        try:
            weights[folder] = float(weight)
        except ValueError as error:
            cure = "write a mixture of token shards as FOLDER=0.7,FOLDER=0.3"
            raise ValueError(f"{source!r} has no weight {weight!r}; {cure}") from error
    return mix(weights)
