"""Layers built on the ops, for people who want projections included."""

from .grid import LearnableFeatureFusion, SparseSelfAttention2d
from .memory import MemoryPool, MemoryUsage, PeerMemory, ProductKeyMemory, memory_parameter_groups
from .moba import MobaAttention

__all__ = [
    "LearnableFeatureFusion",
    "MemoryPool",
    "MemoryUsage",
    "MobaAttention",
    "PeerMemory",
    "ProductKeyMemory",
    "SparseSelfAttention2d",
    "memory_parameter_groups",
]
