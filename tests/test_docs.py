"""The pages under docs are true: their code runs and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


# PEFT asks for a name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_code_on_models_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "docs/models.md", "exec"), names)
    assert 5 < names["generated"].shape[1] <= 14  # "Gates", perhaps BOS, and up to 8 tokens
    assert type(names["merged"]).__name__ == "GatedQwen3ForCausalLM"
    assert "base_model: Qwen/Qwen3-0.6B" in names["card"].read_text()
    assert (tmp_path / "models" / "mine" / "modeling_gated_qwen3.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
