"""Plain float64 PyTorch definitions of every op: what the compiled kernels are measured against.

Written for clarity, not speed: dense masks, quadratic memory, ordinary autograd. They need torch alone, never
the compiled module, and run on any device torch runs on.
"""

from .decode import moba_decode, moba_decode_route
from .grid import grid_attention, grid_groups, window_attention, window_groups
from .indexer import index_loss, index_route, index_scores
from .key_conv import key_conv
from .memory import (
    expert_lookup,
    memory_lookup,
    product_key_scores,
    product_key_topk,
    product_key_weights,
    quantized_rows,
)
from .moba import block_centroids, block_scores, moba_attention, moba_route
from .ngram import ngram_hash

__all__ = [
    "block_centroids",
    "block_scores",
    "expert_lookup",
    "grid_attention",
    "grid_groups",
    "index_loss",
    "index_route",
    "index_scores",
    "key_conv",
    "memory_lookup",
    "moba_attention",
    "moba_decode",
    "moba_decode_route",
    "moba_route",
    "ngram_hash",
    "product_key_scores",
    "product_key_topk",
    "product_key_weights",
    "quantized_rows",
    "window_attention",
    "window_groups",
]
