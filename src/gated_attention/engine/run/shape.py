"""The shape of a run's model: its size and its block, from names of the registry or from fields."""

import re
from dataclasses import fields, replace
from pathlib import Path

from gated_attention.engine.run.sections import Model, Sections
from gated_attention.engine.run.token_folders import read_folders
from gated_attention.registry.variants import BASELINE, Variant, get_variant
from gated_attention.sizes import ModelSize, get_size
from gated_attention.spec import BlockSpec, SwitchSpec, as_gates, check_qk_norm
from gated_attention.typed import require_known

CUSTOM = "custom"
"""Name of the variant of a run whose file gives gates or other fields of the block."""

_BLOCK = ("gates", "switch", "sdpa_transform", "sandwich_norm", "output_clip")
_NEEDED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
)  # fmt: skip
_SIZE = (*_NEEDED, "num_experts", "num_experts_per_tok", "tie_word_embeddings", "rope_theta", "ffn_multiple")
_BPE = re.compile(r"bpe-(\d+)")


def variant_of(model: Model) -> Variant | None:
    """The variant that a file names, or the baseline; None for a block of its own.

    Raises:
        ValueError: if there is none of that name, it needs what the engine lacks, or a block is given, too.
    """
    given = [name for name in _BLOCK if getattr(model, name) is not None]
    if given and model.variant is not None and model.variant != CUSTOM:
        raise ValueError(f"model.variant {model.variant!r} and model.{given[0]} are both given; keep one")
    if given or model.variant == CUSTOM:
        return None
    chosen = get_variant(model.variant or BASELINE)
    if chosen.gate_penalty is not None:
        raise ValueError(f"variant {chosen.name!r} has a gate penalty, which the engine has not; use `compare`")
    return chosen


def block_of(model: Model) -> BlockSpec:
    """The block of every layer."""
    if (chosen := variant_of(model)) is not None:
        return chosen.block
    given = {name: getattr(model, name) for name in _BLOCK if getattr(model, name) is not None}
    if "switch" in given:
        require_known(given["switch"], [one.name for one in fields(SwitchSpec)], "model.switch")
        given["switch"] = SwitchSpec(**given["switch"])
    block = BlockSpec(**{**given, "gates": as_gates(given.get("gates"))})
    check_qk_norm(block.gates)
    return block


def size_of(file: Sections) -> ModelSize:
    """The size that is trained: as the file gives it, then as the variant widens or narrows it.

    Raises:
        ValueError: if a field is missing, or the variant does not fit.
    """
    model = file.model
    given = {name: getattr(model, name) for name in _SIZE if getattr(model, name) is not None}
    if model.size is None:
        if missing := [name for name in _NEEDED if name not in given]:
            raise ValueError(
                f"[model] names no size and lacks {missing[0]}; give a size, or all of {', '.join(_NEEDED)}"
            )
        size = ModelSize("custom", **given, vocab_size=0, context=file.data.context or 1024)
    else:
        size = replace(get_size(model.size), **given)
    size = replace(size, vocab_size=model.vocab_size or _vocabulary(file) or size.vocab_size)
    if not size.vocab_size:
        raise ValueError("the vocabulary is known once the data is read; give model.vocab_size to plan without it")
    if bool(size.num_experts) != bool(size.num_experts_per_tok) or size.num_experts_per_tok > size.num_experts:
        raise ValueError(
            f"num_experts_per_tok is {size.num_experts_per_tok} of num_experts {size.num_experts}; "
            "choose from 1 to num_experts, or leave both out"
        )
    block, chosen = block_of(model), variant_of(model)
    for gate in block.gates:
        gate.in_features(size.geometry)
    if chosen is None:
        return size
    return (chosen if model.match_parameters else replace(chosen, match_parameters=False)).resize(size)


def _vocabulary(file: Sections) -> int | None:
    """The vocabulary that a tokenizer's name or a folder of tokens tells."""
    data = file.data
    if data.paths:
        exist = all(Path(path).exists() for path in data.paths)  # a plan comes before its data
        return read_folders(data.paths).vocab_size if exist else None
    name = data.tokenizer
    if name == "bytes" or (name is None and file.model.size in ("tiny", "moe-tiny")):
        return 257
    found = _BPE.fullmatch(name or "")
    return int(found[1]) if found else None
