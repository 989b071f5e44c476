"""The pages under docs are true: their code runs and their links lead somewhere."""

import re
import runpy
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest
import typer

from gated_attention.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


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


@pytest.mark.parametrize("page", ["index", "model-builder", "hugging-face", "interpreter"])
def test_the_first_block_runs(page):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL)
    exec(compile(block, f"docs/{page}.md", "exec"), {})


def test_figures_are_what_their_script_draws(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["main"](tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_bytes() for path in (ROOT / "docs" / "figures").glob("*.svg")}


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"[\w./-]+\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {path.relative_to(ROOT).as_posix() for path in [*PAGES, *ROOT.glob("*.md")]}
    reports = {page for page in listed if page.startswith("reports/")}  # a checkout may hold others, of its own studies
    assert listed - reports == pages
    assert {"reports/README.md", "reports/main-s/report.md"} <= reports
    assert all((ROOT / page).is_file() for page in reports)


def test_every_example_is_on_its_page():
    included = re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / "examples.md").read_text(), flags=re.MULTILINE)
    assert sorted(included) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


def test_the_reference_names_what_exists():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (.+)$", page.read_text(), flags=re.MULTILINE):
            resolve_name(":".join(name.rsplit(".", 1)))


def test_the_commands_in_the_rules_of_studies_exist():
    text = (ROOT / "reports" / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line.strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if "gated-attention " in line
    ]
    assert len(lines) >= 4
    for line in lines:
        program, name, *words = shlex.split(
            line.replace("$arm", "baseline").replace("seedK", "seed0").replace(" K ", " 0 ")
        )
        command = typer.main.get_command(app).commands[name]
        with command.make_context(name, words) as context:  # refuses an option that is not there, and wrong values
            assert program == "gated-attention"
        for file in re.findall(r"examples/\S+", line):
            assert (ROOT / file).is_file(), context


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
