"""Libraries from outside: a missing one is named with pip's line, and a torchvision built for CUDA is mended."""
import importlib
import sys

import pytest
import torch

import outside
from config import UserError


def test_a_library_is_imported_or_named_with_what_needs_it_and_how_to_get_it(monkeypatch):
    assert outside.library("json", "nothing") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(UserError, match="plots needs absent .*: pip install absent-package$"):
        outside.library("absent", "plots", "absent-package")
    with pytest.raises(UserError, match=": pip install absent$"):
        outside.library("absent", "plots")


@pytest.mark.parametrize("error, defined", [
    (RuntimeError("operator torchvision::nms does not exist"), ["torchvision::nms", "torchvision::qnms"]),
    (ModuleNotFoundError("No module named 'torchvision'"), []), (None, [])])
def test_torchvision_s_missing_operators_get_a_name_and_nothing_else_is_touched(monkeypatch, error, defined):
    def load(name):
        if error:
            raise error

    names = []
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    outside.mend_torchvision()
    assert names == defined


def test_any_other_error_of_torchvision_is_not_hidden(monkeypatch):
    def load(name):
        raise RuntimeError("broken in another way")

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(RuntimeError, match="another way"):
        outside.mend_torchvision()
