"""Modules that moved import by their old names, and say the new ones."""

import subprocess
import sys
from importlib import import_module

import pytest

from gated_attention.moved import MOVED


@pytest.mark.parametrize("old", ["studies.variants", "models.configuration", "train.tokenizer", "studies.model_card"])
def test_an_old_name_gives_the_same_objects_and_a_warning(old):
    sys.modules.pop(f"gated_attention.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"gated_attention.{old} is now gated_attention.{MOVED[old]}"):
        module = import_module(f"gated_attention.{old}")
    new = vars(import_module(f"gated_attention.{MOVED[old]}"))
    assert all(vars(module)[name] is value for name, value in new.items() if not name.startswith("__"))


def test_every_old_name_leads_to_a_module_and_hides_none():
    code = (
        "from importlib.util import find_spec\n"
        "from gated_attention.moved import MOVED, MovedModules\n"
        "for old, new in MOVED.items():\n"
        "    assert type(find_spec(f'gated_attention.{new}').loader) is not MovedModules, new\n"
        "    assert type(find_spec(f'gated_attention.{old}').loader) is MovedModules, old\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"studies\.nothing"):
        import_module("gated_attention.studies.nothing")
