"""topgather: trainable sparse kernels for PyTorch.

Score, keep the top, gather, compute densely, scatter back.
"""

from ._environment import apply_environment
from .cache import MobaCache, PagedMobaCache, moba_decode
from .ops import *  # noqa: F403  every op, as ops/__init__.py lists them

from . import compat, integrations, models, nn, ops, reference  # isort: skip  these build on the ops
from . import advisor  # isort: skip  this on the layers
from .advisor import advise, advise_memory  # isort: skip

__version__ = "0.1.0"

apply_environment()

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
    "reference",
]
__all__ += ops.__all__
