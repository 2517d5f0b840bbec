"""Caches of keys and values, and attention over them.

A cache keeps, beside keys and values, the centroid of every block, and keeps it up to date as tokens come: appending
costs what the new tokens cost. :class:`MobaCache` has one piece of memory a sequence, :class:`PagedMobaCache` pages
that sequences take from a pool, as serving engines keep them. :func:`moba_decode` attends to either.
"""

from .contiguous import MobaCache
from .decode import moba_decode
from .paged import PagedMobaCache

__all__ = ["MobaCache", "PagedMobaCache", "moba_decode"]
