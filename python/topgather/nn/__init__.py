"""Layers built on the ops, for people who want projections included."""

from .moba import MobaAttention

__all__ = ["MobaAttention"]
