"""The ops: checks, registration and autograd, one module an op."""

from .moba import (
    BlockRouting,
    block_centroids,
    moba_attention,
    moba_attention_varlen,
    moba_route,
    moba_route_varlen,
)

__all__ = [
    "BlockRouting",
    "block_centroids",
    "moba_attention",
    "moba_attention_varlen",
    "moba_route",
    "moba_route_varlen",
]
