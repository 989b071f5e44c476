"""Model folders that carry their own code, for readers with torch and transformers but without this package.

The files are this package's own sources, found by following imports from the models: one file per module, side by
side, because transformers copies flat files only. Absolute imports become relative ones, and shape annotations do
without jaxtyping.
"""

import ast
import json
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from gated_attention.files import write_text
from gated_attention.models.saved.card import CARD_NAME, say_that_code_is_carried

_PACKAGE = "gated_attention"
_ENTRIES = ("configuration_gated_qwen3", "modeling_gated_qwen3", "modeling_gated_qwen3_moe")
"""Modules of `models` whose files keep their names, which `auto_map` names."""

_MODELS = {
    "gated_qwen3": ("modeling_gated_qwen3", "GatedQwen3"),
    "gated_qwen3_moe": ("modeling_gated_qwen3_moe", "GatedQwen3Moe"),
}
_HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_PLAIN = "class {}:\n    __class_getitem__ = staticmethod(lambda shaped: shaped[0])\n\n"
_OPERATOR = re.compile(rf'"{_PACKAGE}::')
_OWN_OPERATOR = f'f"{_PACKAGE}_{{__name__.encode().hex()}}::'

Edit = tuple[ast.stmt | ast.expr, str]
"""A node of a source and what stands in its place."""


def write_self_contained(folder: Path | str) -> list[Path]:
    """Put the model's code beside its weights, so that `from_pretrained(folder, trust_remote_code=True)` needs no more.

    Args:
        folder: A saved model, whose `config.json` gains an `auto_map`.

    Returns:
        The code files written.

    Raises:
        ValueError: if the folder holds no gated model.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_path} cannot be read as a configuration ({error}); give a saved model") from error
    if model_type not in _MODELS:
        raise ValueError(
            f"{config_path} is of model_type {model_type!r}; code is carried for {' and '.join(_MODELS)} only"
        )
    module, prefix = _MODELS[model_type]
    files = generate_code(module)
    for name, text in files.items():
        write_text(folder / name, text)
    config["auto_map"] = {
        "AutoConfig": f"configuration_gated_qwen3.{prefix}Config",
        "AutoModel": f"{module}.{prefix}Model",
        **{f"AutoModelFor{head}": f"{module}.{prefix}For{head}" for head in _HEADS},
    }
    card = folder / CARD_NAME
    if card.exists():
        write_text(card, say_that_code_is_carried(card.read_text(encoding="utf-8")))
    write_text(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in files]


def generate_code(entry: str) -> dict[str, str]:
    """The code of a model by file name: the module `entry`, e.g. `modeling_gated_qwen3`, and all that it imports.

    Operators are renamed after the module that runs: torch tears an operator down when its name is registered again,
    by another folder's copy or by the installed package, under the models that still call it.
    """
    waiting = [f"{_PACKAGE}.models.{entry}"]
    texts: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module], imported = _detach(module)
            waiting.extend(imported)
    header = f"# Written by gated-attention {metadata.version('gated-attention')} (Apache-2.0), from its {{}}.\n\n"
    return {f"{_file_stem(module)}.py": header.format(module) + text for module, text in sorted(texts.items())}


def _file_stem(module: str) -> str:
    name = module.rpartition(".")[2]
    return name if name in _ENTRIES else module.replace(".", "_")


def _source_path(module: str) -> Path:
    """The file of a module of this package; of a package it is `__init__.py`."""
    return Path(cast(str, cast(ModuleSpec, find_spec(module)).origin))


def _home(module: str, name: str) -> str | None:
    """The module that defines a name which `module` defines or passes on; None for a module inside a package."""
    path = _source_path(module)
    if path.name != "__init__.py":
        return module
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _home(node.module, name)
    return None


def _detach(module: str) -> tuple[str, list[str]]:
    """The source of a module without its ties to the package and to jaxtyping, and the modules that it imports."""
    source = _source_path(module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported: list[str] = []
    edits = [*_plain_annotations(tree), *_relative_imports(tree, imported)]
    return _OPERATOR.sub(_OWN_OPERATOR, _apply(edits, source)), imported


def _plain_annotations(tree: ast.AST) -> Iterator[Edit]:
    """Where `Float` was imported, a `Float` of which `Float[Tensor, "b t c"]` is `Tensor`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
            yield node, "\n".join(_PLAIN.format(alias.name) for alias in node.names)


def _relative_imports(tree: ast.AST, imported: list[str]) -> Iterator[Edit]:
    """`from gated_attention.spec import GateSpec` becomes `from .gated_attention_spec import GateSpec`.

    A module that is imported whole, `ops` of `ops.gate(...)`, becomes the names taken from it, `ops_gate(...)`:
    transformers finds the files to copy by reading `from .file import`, and does not see `from . import file`.

    Args:
        imported: Is given the modules of this package that the source imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
            raise ValueError(f"line {node.lineno}: import names from {_PACKAGE}, not {_PACKAGE} itself")
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != _PACKAGE:
            continue
        module, here = str(node.module), dict[str, list[str]]()
        for alias in node.names:
            local = alias.asname or alias.name
            if home := _home(module, alias.name):
                here.setdefault(home, []).append(f"{alias.name} as {local}" if alias.asname else local)
                continue
            for use in _uses(tree, local):
                home = _home(f"{module}.{alias.name}", use.attr)
                if home is None:
                    raise ValueError(f"line {use.lineno}: {alias.name} passes on no {use.attr!r}")
                taken = here.setdefault(home, [])
                new = f"{local}_{use.attr}"
                if (name := f"{use.attr} as {new}") not in taken:
                    taken.append(name)
                yield use, new
        imported.extend(here)
        indent = "\n" + " " * node.col_offset
        yield node, indent.join(f"from .{_file_stem(home)} import {', '.join(here[home])}" for home in sorted(here))


def _uses(tree: ast.AST, module: str) -> list[ast.Attribute]:
    """Where something is taken from a module by attribute."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    ]


def _apply(edits: list[Edit], source: str) -> str:
    """The source with every edit made; nothing else of it changes."""
    content = source.encode()
    starts = [0]  # of each line; columns of the syntax tree count bytes, too
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    spans = []
    for node, new in edits:
        end_line, end_column = cast(int, node.end_lineno), cast(int, node.end_col_offset)
        spans.append((starts[node.lineno - 1] + node.col_offset, starts[end_line - 1] + end_column, new))
    for start, end, new in sorted(spans, reverse=True):
        content = content[:start] + new.encode() + content[end:]
    return content.decode()
