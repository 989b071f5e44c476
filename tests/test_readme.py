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


@pytest.mark.trust
def test_worked_example_of_contributing_adds_a_variant(monkeypatch, capsys, tmp_path):
    from gated_attention.cli import main
    from gated_attention.registry import variants

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = (ROOT / "CONTRIBUTING.md").read_text()
    (row,) = re.findall(r"```python\n(Variant\(.*?)\n```", text, flags=re.DOTALL)
    variant = eval(row, vars(variants).copy())  # where the row would stand
    monkeypatch.setitem(variants.VARIANTS, variant.name, variant)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    assert variant.name in run("variants")
    assert "G1: 6 x 1 scores per token, 390 parameters per layer" in run("variants", variant.name)
    (command,) = re.findall(rf"`gated-attention (compare \S+ \S+,{variant.name})`", text)
    (tmp_path / "text").mkdir()
    for part in range(6):
        (tmp_path / "text" / f"{part}.txt").write_text("".join(f"{part} and {i} is {part + i}\n" for i in range(300)))
    small = ["--steps", "2", "--context", "64", "--batch-size", "2", "--device", "cpu"]
    printed = run(*command.split(), *small, "--data", str(tmp_path / "text"), "--output", str(tmp_path))
    assert variant.name in printed
    report = (tmp_path / "reports" / "compare-tiny" / "report.md").read_text()
    assert f"| {variant.name} | {variant.describe()} |" in report
