"""Modules that moved: their old names still import, with a DeprecationWarning that gives the new name."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "gated_attention."

_PREFIXES = {
    ("", "registry."): "penalty",
    ("analysis.", "analysis.measures."): "rank triton_rows",
    ("analysis.", "report."): "heatmaps plots",
    ("analysis.", "report.analysis."): "overview",
    ("models.", "models.saved."): "card loading self_contained",
    ("ops.hopper_", "ops.hopper."): "backward backward_launch compat forward forward_launch pipeline",
    ("ops.triton_", "ops.triton."): "backward forward gate prepare tiles",
    ("studies.", ""): "device",
    ("studies.", "jobs."): "analyze evaluation_plan retrieval_data",
    ("studies.", "registry."): "choices published settings variants",
    ("studies.", "report."): "catalogue",
    ("studies.", "report.analysis."): "demo token_view",
    ("studies.", "report.study."): "appendix figures lead ordering sections table",
    ("studies.", "study."): "comparison measure model_card plan record record_types run statistics workers",
    ("studies.analysis_", "report.analysis."): "figures page record",
    ("studies.evaluation_", "report.evaluation."): "figures record",
    ("train.", "train.text."): "blocks corpus data split tokenizer",
}
"""Old and new prefix of the modules whose last name stayed."""

MOVED = {f"{old}{name}": f"{new}{name}" for (old, new), names in _PREFIXES.items() for name in names.split()} | {
    "analysis.attention_panel": "report.panels",
    "jobs.domain_text": "jobs.text",
    "jobs.evaluate": "jobs.evaluation",
    "jobs.passages": "jobs.text",
    "models.causal": "models.decoder",
    "models.configuration": "models.configuration_gated_qwen3",
    "models.layer": "models.decoder",
    "models.modelling": "models.modeling_gated_qwen3",
    "models.modelling_moe": "models.modeling_gated_qwen3_moe",
    "nn.evaluating": "nn.eval_mode",
    "studies.analysis_display": "report.analysis.terminal",
    "studies.analysis_report": "report.analysis.page",
    "studies.beside": "report.study.beside_the_paper",
    "studies.catalogue_display": "report.catalogue_terminal",
    "studies.checkpoint": "jobs.named_model",
    "studies.command": "report.command_line",
    "studies.display": "report.study.terminal",
    "studies.domain_text": "jobs.text",
    "studies.evaluate": "jobs.evaluation",
    "studies.evaluation_report": "report.evaluation.page",
    "studies.page": "report.blocks",
    "studies.passages": "jobs.text",
    "studies.report": "report.study.page",
    "studies.study": "study.arms",
    "train.text_files": "train.text.files",
}
"""Old name to new name, both below `gated_attention`."""

_FOLDERS = {name.rpartition(".")[0] for name in MOVED} - {""}


class MovedModules:
    """Finds and loads old modules. Python asks it after all other finders, so only for modules that no longer exist.

    It is no subclass of importlib.abc's classes: their import takes as long as that of all the rest.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old module, or of a folder that held some."""
        name = fullname.removeprefix(_PACKAGE)
        if name == fullname or name not in MOVED.keys() | _FOLDERS:
            return None
        return ModuleSpec(fullname, self, is_package=name in _FOLDERS)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the old module everything that the new one has."""
        old = module.__name__.removeprefix(_PACKAGE)
        if old in MOVED:
            new = _PACKAGE + MOVED[old]
            warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
            found = vars(import_module(new))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})
