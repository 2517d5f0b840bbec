"""The ops: checks, registration and autograd, one module an op.

The ops of decoding have no functions here: :mod:`topgather.cache`, which builds on what is named here, calls them.
"""

from .grid import grid_attention, window_attention
from .indexer import index_loss, index_route
from .key_conv import key_conv
from .memory import expert_lookup, memory_lookup, product_key_topk
from .moba import (
    block_centroids,
    moba_attention,
    moba_attention_varlen,
    moba_route,
    moba_route_varlen,
)
from .ngram import ngram_hash, ngram_table_rows
from .quantized import quantized_lookup
from .replay import record_routing, replay_routing
from .routing import BlockRouting, RoutingRecord
from .statistics import RoutingStatistics, routing_statistics

__all__ = [
    "BlockRouting",
    "RoutingRecord",
    "RoutingStatistics",
    "block_centroids",
    "expert_lookup",
    "grid_attention",
    "index_loss",
    "index_route",
    "key_conv",
    "memory_lookup",
    "moba_attention",
    "moba_attention_varlen",
    "moba_route",
    "moba_route_varlen",
    "ngram_hash",
    "ngram_table_rows",
    "product_key_topk",
    "quantized_lookup",
    "record_routing",
    "replay_routing",
    "routing_statistics",
    "window_attention",
]
