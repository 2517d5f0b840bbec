"""Something to be done once another module is loaded, for modules that are too dear to load for that alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _After(MetaPathFinder):
    """Finds one module as all others would, and lets ``then`` be imported behind it."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(self.then)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def import_after(name: str, then: str) -> None:
    """Import the module ``then`` as soon as the module ``name`` is loaded, at once where it is."""
    if name in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _After(name, then))
