"""The README is true: its code runs, its tree is the tree, its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (2, 128, 512)
    assert names["tokens"].shape == (1, 8)


def test_tree_names_every_source_file_once():
    tree = README.split("```\nsrc/gated_attention/")[1].split("```")[0]
    named, folders = [], []
    for line in tree.splitlines():
        if match := re.match(r"( +)(\w+/|\w+\.py)", line):
            depth = len(match[1]) // 2 - 1
            folders = folders[:depth]
            if match[2].endswith("/"):
                folders.append(match[2])
            else:
                named.append("".join(folders) + match[2])
    source = ROOT / "src" / "gated_attention"
    files = [path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(files)


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"compare", "test"} <= set(targets)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_no_source_file_is_longer_than_400_lines():
    for path in (ROOT / "src").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_worked_example_of_contributing_adds_a_variant(monkeypatch, capsys):
    from gated_attention.cli import main
    from gated_attention.spec import BlockSpec, GateSpec
    from gated_attention.studies.variants import VARIANTS, Variant, get_variant

    (row,) = re.findall(r"```python\n(Variant\(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    variant = eval(row, {"Variant": Variant, "BlockSpec": BlockSpec, "GateSpec": GateSpec})
    monkeypatch.setitem(VARIANTS, variant.name, variant)
    assert get_variant("sdpa-headwise-64-open") is variant
    with pytest.raises(SystemExit):
        main(["variants"])
    assert "sdpa-headwise-64-open" in capsys.readouterr().out.replace("\n", " ")
