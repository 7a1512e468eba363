"""Optional imports: a missing one is named with its pip line, and a torchvision built for CUDA is patched."""
import importlib
import sys

import pytest
import torch

from config import UserError
from runtime import optional


def test_a_library_is_imported_or_named_with_what_needs_it_and_how_to_get_it(monkeypatch):
    assert optional.optional_import("json", "nothing") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(UserError, match="plots needs absent .*: pip install absent-package$"):
        optional.optional_import("absent", "plots", "absent-package")
    with pytest.raises(UserError, match=": pip install absent$"):
        optional.optional_import("absent", "plots")
    assert optional.optional_import("json", "nothing", part="loads") is sys.modules["json"].loads
    with pytest.raises(UserError, match="plots needs json .*no attribute 'draw'"):
        optional.optional_import("json", "plots", part="draw")


def torchvision(monkeypatch, *missing: str) -> list[str]:
    """Importing it stops until these operators have a name. Those that get one."""
    names = []

    def load(name):
        for operator in missing:
            if operator not in names:
                raise RuntimeError(f"operator {operator} does not exist")

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    return names


def test_torchvision_s_missing_operators_get_a_name_where_they_are_missing(monkeypatch):
    names = torchvision(monkeypatch)
    optional.patch_torchvision_ops()
    assert names == []
    names = torchvision(monkeypatch, "torchvision::nms", "torchvision::qnms")
    optional.patch_torchvision_ops()
    assert names == ["torchvision::nms", "torchvision::qnms"]


@pytest.mark.parametrize("missing", ["torchvision::other", "elsewhere::nms"])
def test_errors_that_are_not_patched_are_not_hidden(monkeypatch, missing):
    torchvision(monkeypatch, missing)
    with pytest.raises(RuntimeError, match=f"operator {missing}"):
        optional.patch_torchvision_ops()


def test_without_torchvision_there_is_nothing_to_patch(monkeypatch):
    names = []
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    optional.patch_torchvision_ops()
    assert names == []
