"""Cards written from records, and records that are refused."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import Qwen3Config

from gated_attention.models import GatedQwen3Config
from gated_attention.models.build import build_model
from gated_attention.models.saved.self_contained import write_self_contained
from gated_attention.spec import GateSpec
from gated_attention.study.model_card import write_model_card


@pytest.fixture
def folder(tmp_path):
    config = GatedQwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, gates=GateSpec(),
    )  # fmt: skip
    build_model(config, 0).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def analysis(tmp_path, name):
    model = {"name": str(name), "num_tokens": 4096, "context": 256, "summary": {"f_attn": 0.467, "m_act": 1053.2}}
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"text": {"source": str(tmp_path)}, "models": [model]}))
    return path


def test_a_card_with_an_analysis(folder, tmp_path):
    path = write_model_card(
        folder, analysis=analysis(tmp_path, folder), base_model="Qwen/Qwen3-0.6B", license="apache-2.0"
    )
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen3-0.6B", "apache-2.0")
    assert "| F-Attn (share) | 0.467 |" in card.text
    assert "| 1053 |" in card.text
    assert f"on 4,096 tokens of {tmp_path.name} in passages of 256" in card.text
    assert str(tmp_path) not in card.content


def test_the_count_is_the_models(folder):
    before = (folder / "README.md").read_text()
    assert write_model_card(folder).read_text() == before


def test_a_folder_with_code_says_so(folder):
    write_self_contained(folder)
    assert write_model_card(folder).read_text().count("trust_remote_code=True") == 1


def test_an_analysis_of_other_models_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"analysis\.json is of elsewhere, not of .*mine; analyze this folder"):
        write_model_card(folder, analysis=analysis(tmp_path, "elsewhere"))


@pytest.mark.parametrize("content", ["{", "[]", '{"models": 3}'])
def test_what_is_no_analysis_is_refused(folder, tmp_path, content):
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read as an analysis"):
        write_model_card(folder, analysis=tmp_path / "analysis.json")


def test_folders_without_a_gated_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model that can be read"):
        write_model_card(tmp_path)
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a qwen3 model; cards are for gated models"):
        write_model_card(tmp_path)
