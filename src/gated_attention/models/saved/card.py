"""The model card, README.md, that a gated model is saved and pushed with."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from gated_attention.models.configuration_gated_qwen3 import GatedConfigMixin

CARD_NAME = "README.md"

TAGS = ("gated-attention",)
"""Tags of every card, beside the model's type."""

_MODELS = {"gated_qwen3": "A Qwen3 language model", "gated_qwen3_moe": "A Qwen3-MoE language model"}
_AUTO = "AutoModelForCausalLM"
_STOCK = " The weights are laid out as transformers' own `{}`, which needs no other code."
_REWRITTEN = ("## Model", "## Loading", "## Citation")
_REGISTER = "import gated_attention.models  # registers the model\n"
_TRANSFORMERS_TEMPLATE = "has been automatically generated"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CITATION = """\
```bibtex
@inproceedings{qiu2025gated,
  title     = {Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free},
  author    = {Qiu, Zihan and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2505.06708}
}
```
"""


class Table(NamedTuple):
    """A section of a card: a title, a sentence on what follows, and rows of a name and a value."""

    title: str
    text: str
    rows: Mapping[str, str]


def model_card(
    config: GatedConfigMixin,
    name: str,
    num_parameters: int,
    *,
    base_model: str | None = None,
    license: str | None = None,
    carries_code: bool = False,
    stored_as: str | None = None,
    tables: Iterable[Table] = (),
    sections: str = "",
) -> str:
    """A card in Markdown: what the gate is and costs, how to load the model, and the tables given.

    Args:
        config: The model's.
        name: Hub name or name of the folder, from which the card says to load.
        num_parameters: Of the whole model.
        base_model: Hub name of the model that this one started from, if it is known.
        license: As the hub writes it, e.g. `apache-2.0`; a model's licence is its maker's to name.
        carries_code: Whether the model's code lies beside its weights.
        stored_as: The `model_type` of the folder where that is not the configuration's but a stock architecture.
        tables: Training, measures: `study.model_card` makes them from records.
        sections: Those of another card, as `measured_sections` finds them.
    """
    stored_as = stored_as or config.model_type
    is_stock = stored_as != config.model_type
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        license=license,
        tags=[*TAGS, stored_as],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name.rsplit('/', maxsplit=1)[-1]}\n",
        f"{_MODELS[config.model_type]} for transformers. What is changed in its decoder blocks: "
        f"{config.block.describe()}.{_STOCK.format(stored_as) if is_stock else ''}\n",
        *map(_section, [Table("Model", "", _model_rows(config, num_parameters, base_model)), *tables]),
        *([sections] if sections else []),
        f"## Loading\n\n{loading(name, carries_code=carries_code, is_stock=is_stock)}",
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n".join(parts)


def family_card(
    kind: str,
    config: Any,
    name: str,
    place: str,
    num_parameters: int,
    num_added: int,
    base_model: str | None = None,
    license: str | None = None,
    pipeline_tag: str | None = None,
    tables: Iterable[Table] = (),
) -> str:
    """A card in Markdown of a model of any family, with gates or without: which, where, at what cost, how to load it.

    Args:
        kind: The name of the model's class without gates.
        config: The model's, with `gates` if it has some.
        name: As of `model_card`.
        place: The attention that has the gates, in words.
        num_parameters: Of the whole model.
        num_added: Of the gates.
        base_model: As of `model_card`, as is `license`.
        license: As the hub writes it.
        pipeline_tag: The hub's word for the model's task.
        tables: As of `model_card`.
    """
    gates = getattr(config, "gates", ())
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        license=license,
        tags=[*TAGS, config.model_type],
    )
    added = {"Added by the gates": f"{num_added:,} ({num_added / num_parameters:.2%})"}
    rows = {
        **{f"Gate at {gate.site} ({gate.label})": gate.describe() for gate in gates},
        **({"Where": place} if gates else {"Gate": "none"}),
        "Parameters": f"{num_parameters:,}",
        **(added if gates else {}),
        **({"Base model": base_model} if base_model else {}),
    }
    if registers := getattr(config, "num_register_tokens", 0):
        rows["Registers"] = str(registers)
    auto = "AutoModelForImageClassification" if pipeline_tag == "image-classification" else _AUTO
    own = "" if registers else "transformers' "
    is_known = not gates and not registers  # by transformers alone
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n\n# {name.rsplit('/', maxsplit=1)[-1]}\n",
            f"{own}`{kind}` with{'' if gates else 'out'} gates in its attention.\n",
            *map(_section, [Table("Model", "", rows), *tables]),
            _family_loading(kind, config.model_type, name)
            if gates and auto == _AUTO
            else f"## Loading\n\n{loading(name, is_stock=is_known, auto=auto)}",
            f"## Citation\n\n{_CITATION}",
        ]
    )


def _family_loading(kind: str, model_type: str, name: str) -> str:
    return (
        f"## Loading\n\n```python\nfrom gated_attention import gated\nfrom transformers import {kind}\n\n"
        f'model = gated({kind}).from_pretrained("{name}")\n```\n\n'
        "After `import gated_attention.models`, the Auto classes load it too. Without that package, transformers "
        f"refuses its type, `{model_type}`, rather than load it without gates.\n"
    )


def measured_sections(card: str) -> str:
    """What a card of this package says of training and measures; nothing of anyone else's card."""
    own = f"- {TAGS[0]}\n" in card.split("\n---", maxsplit=1)[0] + "\n"
    parts = re.split(r"(?m)^(?=## )", card)[1:] if own else []
    kept = [part for part in parts if part.split("\n", maxsplit=1)[0] not in _REWRITTEN]
    return "".join(kept).rstrip("\n") + "\n" if kept else ""


def loading(name: str, *, carries_code: bool = False, is_stock: bool = False, auto: str = _AUTO) -> str:
    """How a reader loads the model: with this package, with the code that the model carries, or with neither."""
    register = "" if carries_code or is_stock else _REGISTER
    trust = ", trust_remote_code=True" if carries_code else ""
    return (
        f"```python\n{register}from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{name}"{trust})\n```\n'
    )


def say_that_code_is_carried(card: str) -> str:
    """The card with the loading lines of a model that carries its code."""
    lines = r'(?m)^(model = AutoModelForCausalLM\.from_pretrained\("[^"\n]*")\)$'
    return re.sub(lines, r"\1, trust_remote_code=True)", card.replace(_REGISTER, ""))


def _model_rows(config: GatedConfigMixin, num_parameters: int, base_model: str | None) -> dict[str, str]:
    added = config.num_hidden_layers * config.block.num_parameters(config.geometry)
    text = "{}; {} x {} scores per token"
    rows = {
        f"Gate at {gate.site} ({gate.label})": text.format(gate.describe(), *gate.score_shape(config.geometry))
        for gate in config.block.gates
    }
    return {
        **(rows or {"Gate": "none"}),
        "Parameters": f"{num_parameters:,}",
        "Added by the gate and what else changes the block": f"{added:,} ({added / num_parameters:.2%})",
        "Layers, query heads, key/value heads, head width": (
            f"{config.num_hidden_layers}, {config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}"
        ),
        **({"Base model": base_model} if base_model else {}),
    }


def _section(table: Table) -> str:
    text = f"{table.text}\n\n" if table.text else ""
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in table.rows.items())
    return f"## {table.title}\n\n{text}| | |\n|---|---|\n{rows}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


class ModelCardMixin:
    """Writes the card where transformers saves or pushes the model; put before the transformers class.

    A `README.md` that is there already is left alone.
    """

    config: GatedConfigMixin
    name_or_path: str
    _auto_class: str | None

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers saves it, and a model card beside it."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        if is_main_process and folder.is_dir() and not (folder / CARD_NAME).exists():
            (folder / CARD_NAME).write_text(self._card(folder.resolve().name), encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Whatever lies in the folder, transformers replaces it with the hub's card or else with an empty template.
        path = Path(working_dir) / CARD_NAME
        if path.exists() and _TRANSFORMERS_TEMPLATE in path.read_text(encoding="utf-8"):
            path.write_text(self._card(repo_id), encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def _card(self, name: str) -> str:
        origin = self.name_or_path
        is_hub_name = bool(_HUB_NAME.fullmatch(origin)) and not Path(origin).exists() and origin != name
        num_parameters: int = self.num_parameters()  # type: ignore[attr-defined]
        return model_card(
            self.config,
            name,
            num_parameters,
            base_model=origin if is_hub_name else None,
            carries_code=self._auto_class is not None,
        )
