"""Layers built on the ops, for people who want projections included."""

from .memory import MemoryPool, MemoryUsage, PeerMemory, ProductKeyMemory, memory_parameter_groups
from .moba import MobaAttention

__all__ = [
    "MemoryPool",
    "MemoryUsage",
    "MobaAttention",
    "PeerMemory",
    "ProductKeyMemory",
    "memory_parameter_groups",
]
