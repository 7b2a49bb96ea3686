"""What someone without the framework's package is told."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("transformers", ["transformers"]),
        ("accelerate", ["accelerate"]),
        ("ignite", ["ignite"]),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    module: str, packages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in packages:
            monkeypatch.delitem(sys.modules, name)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"hpsched.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'hpsched\[{module}\]'") as error:
        importlib.import_module(f"hpsched.integrations.{module}")
    assert "\n" not in str(error.value)
    assert packages[-1] in str(error.value)
