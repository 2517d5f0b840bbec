"""Whole models built on the layers."""

from .sparse_vit import SparseViT

__all__ = ["SparseViT"]
