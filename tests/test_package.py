"""The front door: names load on first use, and nothing else happens."""

import subprocess
import sys

import pytest

import gated_attention


def test_every_listed_name_loads():
    for name in gated_attention.__all__:
        assert getattr(gated_attention, name).__name__ == name
    assert set(gated_attention.__all__) <= set(dir(gated_attention))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gated_attention' has no attribute 'GatedAtention'"):
        gated_attention.GatedAtention  # noqa: B018


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_modules_load_without_transformers():
    assert run("import sys; from gated_attention import GatedAttention; print('transformers' in sys.modules)") == [
        "False"
    ]


def test_measuring_needs_neither_datasets_nor_figures():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['datasets', 'matplotlib', 'typer', 'rich']))"
    names = "analysis, gated_attention.models, gated_attention.device, gated_attention.study.record"
    assert run(f"{blocked}; import gated_attention.{names}; print('imported')") == ["imported"]
