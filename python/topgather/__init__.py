"""topgather: trainable sparse kernels for PyTorch.

Score, keep the top, gather, compute densely, scatter back.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ._environment import apply_environment
from ._on_import import import_after
from .cache import MobaCache, PagedMobaCache, moba_decode
from .ops import *  # noqa: F403  every op, as ops/__init__.py lists them

from . import compat, integrations, models, nn, ops, optim, reference  # isort: skip  these build on the ops
from . import advisor  # isort: skip  this on the layers
from .advisor import advise, advise_memory  # isort: skip

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import viz as viz

__version__ = "0.2.0"

apply_environment()
# Where there is triton, it is loaded with the counter.
import_after("torch.utils.flop_counter", "topgather.ops._flops")

__all__ = [
    "MobaCache",
    "PagedMobaCache",
    "advise",
    "advise_memory",
    "advisor",
    "compat",
    "integrations",
    "moba_decode",
    "models",
    "nn",
    "optim",
    "reference",
]
__all__ += ops.__all__

# Modules that are loaded at their first use, with what they need of torch or besides.
_LAZY = ("distributed", "viz")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
