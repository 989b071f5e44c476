"""Modules that moved: their old names import them still, with a DeprecationWarning that says the new one."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "gated_attention."

MOVED = {
    "analysis.attention_panel": "report.panels",
    "analysis.heatmaps": "report.heatmaps",
    "analysis.overview": "report.analysis.overview",
    "analysis.plots": "report.plots",
    "analysis.rank": "analysis.measures.rank",
    "models.configuration": "models.configuration_gated_qwen3",
    "models.modelling": "models.modeling_gated_qwen3",
    "models.modelling_moe": "models.modeling_gated_qwen3_moe",
    "ops.hopper_backward": "ops.hopper.backward",
    "ops.hopper_backward_launch": "ops.hopper.backward_launch",
    "ops.hopper_compat": "ops.hopper.compat",
    "ops.hopper_forward": "ops.hopper.forward",
    "ops.hopper_forward_launch": "ops.hopper.forward_launch",
    "ops.hopper_pipeline": "ops.hopper.pipeline",
    "ops.triton_backward": "ops.triton.backward",
    "ops.triton_forward": "ops.triton.forward",
    "ops.triton_gate": "ops.triton.gate",
    "ops.triton_prepare": "ops.triton.prepare",
    "ops.triton_tiles": "ops.triton.tiles",
    "penalty": "registry.penalty",
    "studies.analysis_display": "report.analysis.terminal",
    "studies.analysis_figures": "report.analysis.figures",
    "studies.analysis_page": "report.analysis.page",
    "studies.analysis_record": "report.analysis.record",
    "studies.analysis_report": "report.analysis.write",
    "studies.analyze": "jobs.analyze",
    "studies.appendix": "report.study.appendix",
    "studies.beside": "report.study.beside_the_paper",
    "studies.catalogue": "report.catalogue",
    "studies.catalogue_display": "report.catalogue_terminal",
    "studies.checkpoint": "jobs.named_model",
    "studies.choices": "registry.choices",
    "studies.command": "report.command_line",
    "studies.comparison": "study.comparison",
    "studies.demo": "report.analysis.demo",
    "studies.device": "device",
    "studies.display": "report.study.terminal",
    "studies.domain_text": "jobs.domain_text",
    "studies.evaluate": "jobs.evaluate",
    "studies.evaluation_figures": "report.evaluation.figures",
    "studies.evaluation_plan": "jobs.evaluation_plan",
    "studies.evaluation_record": "report.evaluation.record",
    "studies.evaluation_report": "report.evaluation.write",
    "studies.figures": "report.study.figures",
    "studies.lead": "report.study.lead",
    "studies.measure": "study.measure",
    "studies.model_card": "study.model_card",
    "studies.ordering": "report.study.ordering",
    "studies.page": "report.blocks",
    "studies.passages": "jobs.passages",
    "studies.plan": "study.plan",
    "studies.published": "registry.published",
    "studies.record": "study.record",
    "studies.record_types": "study.record_types",
    "studies.report": "report.study.page",
    "studies.retrieval_data": "jobs.retrieval_data",
    "studies.run": "study.run",
    "studies.sections": "report.study.sections",
    "studies.settings": "registry.settings",
    "studies.statistics": "study.statistics",
    "studies.study": "study.arms",
    "studies.table": "report.study.table",
    "studies.token_view": "report.analysis.token_view",
    "studies.variants": "registry.variants",
    "studies.workers": "study.workers",
    "train.blocks": "train.text.blocks",
    "train.corpus": "train.text.corpus",
    "train.data": "train.text.data",
    "train.split": "train.text.split",
    "train.text_files": "train.text.files",
    "train.tokenizer": "train.text.tokenizer",
}
"""Old name to new, both below `gated_attention`."""

_FOLDERS = {name.rpartition(".")[0] for name in MOVED} - {""}


class MovedModules(MetaPathFinder, Loader):
    """Asked by Python after all other finders, hence only for what is no longer there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The place of an old module, or of a folder that held some."""
        name = fullname.removeprefix(_PACKAGE)
        if name == fullname or name not in MOVED.keys() | _FOLDERS:
            return None
        return ModuleSpec(fullname, self, is_package=name in _FOLDERS)

    def exec_module(self, module: ModuleType) -> None:
        """Give the old module everything that the new one has."""
        old = module.__name__.removeprefix(_PACKAGE)
        if old in MOVED:
            new = _PACKAGE + MOVED[old]
            warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
            found = vars(import_module(new))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})
