"""Optimizers of table rows, fused into the backward of memory layers: a step costs what it touches."""

from ._algorithms import RowAdagrad, RowAdam, RowSGD
from ._clip import clip_grad_norm_
from ._rows import RowOptimizer
from ._tfidf import tfidf_rows

__all__ = ["RowAdagrad", "RowAdam", "RowOptimizer", "RowSGD", "clip_grad_norm_", "tfidf_rows"]
