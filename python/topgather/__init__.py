"""topgather: trainable sparse kernels for PyTorch.

Score, keep the top, gather, compute densely, scatter back.
"""

from ._environment import apply_environment
from .cache import MobaCache, PagedMobaCache, moba_decode
from .ops import (
    BlockRouting,
    block_centroids,
    expert_lookup,
    grid_attention,
    key_conv,
    memory_lookup,
    moba_attention,
    moba_attention_varlen,
    moba_route,
    moba_route_varlen,
    product_key_topk,
    window_attention,
)

from . import compat, integrations, models, nn, reference  # isort: skip  these build on the ops

__version__ = "0.1.0"

apply_environment()

__all__ = [
    "BlockRouting",
    "MobaCache",
    "PagedMobaCache",
    "block_centroids",
    "compat",
    "expert_lookup",
    "grid_attention",
    "integrations",
    "key_conv",
    "memory_lookup",
    "moba_attention",
    "moba_attention_varlen",
    "moba_decode",
    "moba_route",
    "moba_route_varlen",
    "models",
    "nn",
    "product_key_topk",
    "reference",
    "window_attention",
]
