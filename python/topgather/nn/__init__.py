"""Layers built on the ops, for people who want projections included."""

from ._tables import memory_parameter_groups
from ._usage import MemoryUsage
from .grid import LearnableFeatureFusion, SparseSelfAttention2d
from .indexer import IndexedAttention
from .memory import MemoryPool, PeerMemory, ProductKeyMemory
from .moba import MobaAttention

__all__ = [
    "IndexedAttention",
    "LearnableFeatureFusion",
    "MemoryPool",
    "MemoryUsage",
    "MobaAttention",
    "PeerMemory",
    "ProductKeyMemory",
    "SparseSelfAttention2d",
    "memory_parameter_groups",
]
