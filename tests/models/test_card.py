"""The card beside a saved or pushed model says what the model is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.models.saved.card import Table, model_card
from gated_attention.models.saved.self_contained import write_self_contained
from gated_attention.spec import GateSpec

WIDTHS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make_model(gates=(), **changes):
    return build_model(GatedQwen3Config(**WIDTHS, gates=gates, **changes), seed=0)


def test_a_saved_model_has_a_card(tmp_path):
    model = make_model((GateSpec(granularity="headwise"), GateSpec("value")), sandwich_norm=True)
    model.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["gated-attention", "gated_qwen3"]
    assert card.data.license is None
    assert card.data.base_model is None
    added = 2 * (32 * 4 + 32 * 2 * 8 + 2 * 32)
    assert f"| {added:,} ({added / model.num_parameters():.2%}) |" in card.text
    assert f"| Parameters | {model.num_parameters():,} |" in card.text
    assert "| Gate at sdpa (G1) | G1 sdpa headwise sigmoid; 4 x 1 scores per token |" in card.text
    assert "| Gate at value (G2) | G2 value elementwise sigmoid; 2 x 8 scores per token |" in card.text
    assert "sandwich norm" in card.text
    assert "arXiv:2505.06708" in card.text
    assert str(tmp_path) not in card.content


def test_the_loading_lines_load(tmp_path):
    make_model(GateSpec()).save_pretrained(tmp_path / "mine")
    lines = (tmp_path / "mine" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = f"{lines}\nprint(type(model).__name__)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.split() == ["GatedQwen3ForCausalLM"]


def test_a_card_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    make_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_the_main_process_writes_it(tmp_path):
    make_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_model_without_gates_says_so():
    config = GatedQwen3MoeConfig(**WIDTHS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    card = model_card(config, "me/plain", 1000)
    assert "| Gate | none |" in card
    assert "# plain\n" in card
    assert "A Qwen3-MoE language model" in card


def test_licence_base_and_tables_are_the_callers():
    config = GatedQwen3Config(**WIDTHS, gates=GateSpec())
    tables = [Table("Measures", "On my text.", {"Loss | nats": "3.1\n2"})]
    text = model_card(config, "me/mine", 1000, base_model="Qwen/Qwen3-0.6B", license="apache-2.0", tables=tables)
    data = ModelCard(text).data
    assert (data.base_model, data.license) == ("Qwen/Qwen3-0.6B", "apache-2.0")
    assert "## Measures\n\nOn my text.\n" in text
    assert "| Loss \\| nats | 3.1 2 |" in text


@pytest.mark.parametrize(
    ("origin", "base"),
    [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("", None), ("tests/models", None), ("/data/qwen3", None)],
)
def test_the_base_model_is_a_hub_name_or_unknown(origin, base, tmp_path):
    model = make_model(GateSpec())
    model.config._name_or_path = model.name_or_path = origin
    model.save_pretrained(tmp_path / "mine")
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.base_model == base


def test_carried_code_changes_the_loading_lines(tmp_path):
    make_model(GateSpec()).save_pretrained(tmp_path / "mine")
    write_self_contained(tmp_path / "mine")
    write_self_contained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert 'from_pretrained("mine", trust_remote_code=True)\n' in card
    assert "import gated_attention" not in card
    # Saved by the installed classes the model carries no code, and says so.
    GatedQwen3ForCausalLM.from_pretrained(tmp_path / "mine").save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert "import gated_attention.models" in (tmp_path / "again" / "README.md").read_text()


class Hub:
    """The calls that pushing makes, without a network."""

    def __init__(self, monkeypatch, card=None):
        from transformers.utils import hub

        self.pushed = {}
        self.card = card
        monkeypatch.setattr(hub.ModelCard, "load", self.load)
        api = type("Api", (), {"create_repo": self.create_repo})
        for name in ("hf_api", "create_repo"):
            monkeypatch.setattr(hub, name, api if name == "hf_api" else self.create_repo, raising=False)
        monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", self.upload)

    def load(self, *args, **kwargs):
        if self.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.card)

    @staticmethod
    def create_repo(*args, **kwargs):
        return type("Url", (), {"repo_id": "me/mine"})

    def upload(self, folder, repo_id, *args, **kwargs):
        self.pushed = {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_pushed_model_has_a_card_that_names_its_repository(monkeypatch):
    hub = Hub(monkeypatch)
    make_model(GateSpec()).push_to_hub("me/mine")
    assert "model.safetensors" in hub.pushed
    card = hub.pushed["README.md"].decode()
    assert 'from_pretrained("me/mine")' in card
    assert "| Gate at sdpa (G1) |" in card


def test_a_card_on_the_hub_is_left_alone(monkeypatch):
    hub = Hub(monkeypatch, "---\nlicense: mit\n---\nmine")
    make_model(GateSpec()).push_to_hub("me/mine")
    assert hub.pushed["README.md"].decode().rstrip().endswith("mine")
