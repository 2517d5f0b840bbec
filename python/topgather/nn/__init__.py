"""Layers built on the ops, for people who want projections included."""

from ..ops.quantized import quantize_rows
from ._tables import memory_parameter_groups
from ._usage import MemoryUsage
from .grid import LearnableFeatureFusion, SparseSelfAttention2d
from .indexer import IndexedAttention
from .memory import PeerMemory, ProductKeyMemory
from .moba import MobaAttention
from .ngram import NgramMemory
from .offloaded import CacheUsage, OffloadedMemoryPool
from .pool import MemoryPool
from .quantized import QuantizedMemoryPool

__all__ = [
    "CacheUsage",
    "IndexedAttention",
    "LearnableFeatureFusion",
    "MemoryPool",
    "MemoryUsage",
    "MobaAttention",
    "NgramMemory",
    "OffloadedMemoryPool",
    "PeerMemory",
    "ProductKeyMemory",
    "QuantizedMemoryPool",
    "SparseSelfAttention2d",
    "memory_parameter_groups",
    "quantize_rows",
]
