"""Model cards with the content of records: how an arm was trained, and what was measured on a model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, ViTConfig

import gated_attention.models  # noqa: F401  registers the gated models
from gated_attention.analysis.definitions import MEASURES
from gated_attention.files import write_text
from gated_attention.models.build import count_of, plain_class
from gated_attention.models.configuration_gated_qwen3 import GatedConfigMixin
from gated_attention.models.convert.any_family import describe_place
from gated_attention.models.families.configuration import GatesConfigMixin
from gated_attention.models.saved.card import CARD_NAME, Table, family_card, model_card
from gated_attention.registry.choices import TEXT, VISION
from gated_attention.study.record import Result, read_result

_TITLES = {
    "val_loss_nats": "Held-out loss",
    "val_perplexity": "Held-out perplexity",
    "accuracy": "Held-out accuracy",
    "f_attn": f"{MEASURES['f_attn'].title}, attention on the first token",
    "f_attn_uniform": "The same if attention were spread evenly",
    "m_act": MEASURES["m_act"].title,
    "no_op_sink": MEASURES["no_op_sink"].title,
    "broadcast_sink": MEASURES["broadcast_sink"].title,
    "gate_score_mean": "Mean gate score",
}
"""The measures on a card, in order."""


def write_model_card(
    folder: Path | str,
    *,
    name: str | None = None,
    result: Result | Path | str | None = None,
    analysis: Path | str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a saved model; it replaces an existing one.

    Args:
        folder: A saved gated model, or with a result any model that an arm trained.
        name: The name that the card's code loads; None is the folder's own name.
        result: The result of the arm that trained it, or the path of its `result.json`.
        analysis: An `analysis.json` of `gated-attention analyze` that covers the folder.
        base_model, license: As `models.saved.card.model_card`.

    Raises:
        ValueError: if the folder holds no gated model, or a record is of another one.
    """
    folder = Path(folder)
    config = _read_config(folder, needs_gates=result is None)
    account = count_of(config)
    tables = []
    if result is not None:
        tables += arm_tables(result if isinstance(result, Result) else read_result(Path(result)))
    if analysis is not None:
        tables.append(_analysis_table(Path(analysis), folder))
    name = name or folder.resolve().name
    if isinstance(config, GatedConfigMixin):
        card = model_card(
            config, name, account.total, base_model=base_model, license=license,
            carries_code=bool(getattr(config, "auto_map", None)), tables=tables,
        )  # fmt: skip
    else:
        kind, place = plain_class(config).__name__, describe_place(config) if hasattr(config, "gates") else ""
        task = "image-classification" if isinstance(config, ViTConfig) else "text-generation"
        card = family_card(kind, config, name, place, account.total, account.gates, base_model, license, task, tables)
    write_text(folder / CARD_NAME, card)
    return folder / CARD_NAME


def arm_tables(result: Result) -> list[Table]:
    """How an arm was trained, and what was measured on it."""
    train, data = result.config["train"], result.config["data"]
    is_vision = result.config.get("task", TEXT) == VISION
    training = {
        "Study, variant, seed": f"{result.study}, {result.variant}, {result.seed}",
        ("Images" if is_vision else "Text"): _public_name(data["source"]),
        "Tokens seen": f"{result.tokens_seen:,}",
        "Steps": f"{train['steps']:,}",
        "Peak learning rate": f"{train['learning_rate']:g}",
        "Precision": str(train["precision"]),
        "Device": result.device,
        "Libraries": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        **({"Commit": result.git_commit} if result.git_commit else {}),
    }
    found = ((title, result.measures.get(name)) for name, title in _TITLES.items())
    measured = {_with_unit(title, one.unit): f"{one.value:.4g}" for title, one in found if one is not None}
    text = f"On held-out {'images' if is_vision else 'text'}; one seed, so differences between models may be noise."
    return [Table("Training", "Trained by `gated-attention compare`.", training), Table("Measures", text, measured)]


def _public_name(source: str) -> str:
    """A file or folder by its last part, because paths of this machine mean nothing to readers of a card."""
    return Path(source).name if Path(source).exists() else source


def _with_unit(title: str, unit: str) -> str:
    return title if unit == "1" else f"{title} ({unit})"


def _analysis_table(path: Path, folder: Path) -> Table:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models: dict[str, Any] = {model["name"]: model for model in content["models"]}
        found = next((model for name, model in models.items() if Path(name).resolve() == folder.resolve()), None)
        source = content["text"]["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as an analysis ({error}); give `analysis.json` of analyze") from error
    if found is None:
        raise ValueError(f"{path} is of {', '.join(models)}, not of {folder}; analyze this folder")
    rows = {
        _with_unit(MEASURES[name].title, MEASURES[name].unit): f"{value:.4g}"
        for name, value in found["summary"].items()
        if name in MEASURES and value is not None
    }
    words = (
        f"By `gated-attention analyze`, on {found['num_tokens']:,} tokens of {_public_name(source)} in "
        f"passages of {found['context']}."
    )
    return Table("Inside", words, rows)


def _read_config(folder: Path, *, needs_gates: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model that can be read; give the folder of a saved model") from error
    if needs_gates and not isinstance(config, GatedConfigMixin | GatesConfigMixin):
        raise ValueError(f"{folder} holds a {config.model_type} model; cards are for gated models")
    return config
