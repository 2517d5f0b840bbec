"""What a failed import of the integration says: that transformers is missing or too old where it is, else the cause."""

import subprocess
import sys
import types

import pytest

from topgather.integrations import _version

TOO_OLD = "needs transformers 4.56 or newer"
CAUSES = {
    "a package it needs": ModuleNotFoundError("No module named 'safetensors'", name="safetensors"),
    "a damaged library": ImportError("libfoo.so: undefined symbol: bar"),
    "a name that is gone": ImportError("cannot import name 'create_block_mask' from 'torch.nn.attention'"),
}


def modules_named(version: str) -> types.ModuleType:
    module = types.ModuleType("transformers")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_what_is_raised(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", modules_named("5.24.0"))
    with pytest.raises(ImportError) as raised:
        _version.raise_unless_too_old(CAUSES[cause])
    assert raised.value is CAUSES[cause]


@pytest.mark.parametrize("cause", CAUSES)
def test_an_old_one_is_named_with_the_cause(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", modules_named("4.40.0"))
    with pytest.raises(ImportError, match=TOO_OLD) as raised:
        _version.raise_unless_too_old(CAUSES[cause])
    assert "4.40 is installed" in str(raised.value) and str(CAUSES[cause]) in str(raised.value)
    assert raised.value.__cause__ is CAUSES[cause]


def test_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)

    def absent(name: str) -> str:
        raise _version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_version.metadata, "version", absent)
    with pytest.raises(ImportError, match=f"{TOO_OLD}, and it is not installed"):
        _version.raise_unless_too_old(ModuleNotFoundError("No module named 'transformers'", name="transformers"))


BROKEN = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "safetensors":
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
sys.meta_path.insert(0, Broken())
import topgather as tg
tg.integrations.transformers
"""


def test_importing_it_where_a_package_is_missing() -> None:
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and TOO_OLD not in done.stderr
    assert "No module named 'safetensors'" in done.stderr
