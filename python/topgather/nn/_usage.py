"""Counts of how a memory layer uses the rows of its table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._common import checks

# Use is counted in whole units of a weight, so that its sums are exact, the same in any order, and left alone where a
# module is converted to another dtype. What passes a whole weight is carried to a count of its own.
UNIT_BITS = 30
LOOKUP_BITS = 62
# Keeps the units of one call's entries below 2 ** 63.
MAX_WEIGHT = 1024.0

COUNTERS = ("usage_units", "usage_weights", "usage_lookups", "usage_lookups_carried")


@dataclass(frozen=True)
class MemoryUsage:
    """How evenly a layer used its rows, as arXiv 1907.05242 reports it.

    Args:
        share_touched: share of the rows that were looked up at least once, from 0 to 1.
        kl_divergence: Kullback-Leibler divergence, in nats, of the use of rows from even use. The use of a row is the
            sum of the weights it was looked up with. 0 where all rows are used alike, the log of the number of rows
            where one row has all use, NaN where nothing was looked up.
        num_lookups: rows looked up, ``num_heads * top_k`` for each token.
    """

    share_touched: float
    kl_divergence: float
    num_lookups: int


class UsageCounters(nn.Module):
    """The counters of a layer with ``num_keys ** 2`` rows, buffers that are None while ``track_usage`` is off."""

    num_keys: int
    keys: nn.Parameter
    usage_units: Tensor | None  # [rows] int64, below 2 ** UNIT_BITS
    usage_weights: Tensor | None  # [rows] int64, whole weights
    usage_lookups: Tensor | None  # [] int64, below 2 ** LOOKUP_BITS
    usage_lookups_carried: Tensor | None  # [] int64

    def _register_usage(self) -> None:
        for name in COUNTERS:
            self.register_buffer(name, None, persistent=False)

    @property
    def track_usage(self) -> bool:
        """Whether lookups are counted for ``usage()``. Turned on, the layer holds 16 bytes for each row."""
        return self.usage_units is not None

    @track_usage.setter
    def track_usage(self, is_tracked: bool) -> None:
        checks.check_flag("track_usage", is_tracked)
        if is_tracked == self.track_usage:
            return
        for name in COUNTERS:
            shape = () if name.startswith("usage_lookups") else (self.num_keys**2,)
            with torch.inference_mode(False):  # to be written to in any mode
                counts = torch.zeros(shape, dtype=torch.int64, device=self.keys.device) if is_tracked else None
            setattr(self, name, counts)

    def _check_counting(self) -> None:
        """Raise where a call's lookups cannot be counted."""
        if self.usage_units is None or torch.compiler.is_compiling():
            return
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "track_usage must be False under torch.vmap and other transforms of torch.func: counters are written "
                "to in place"
            )

    @torch.no_grad()
    def _count(self, indices: Tensor, weights: Tensor) -> None:
        """Count a call's lookups, ``indices`` and ``weights [T, K]``, where usage is tracked.

        Behind everything else: a call that was refused did not use a row.
        """
        if self.usage_units is None or _is_recomputing():
            return
        if not torch.compiler.is_compiling():
            self._make_ordinary()
        assert self.usage_weights is not None
        assert self.usage_lookups is not None and self.usage_lookups_carried is not None
        rows = indices.flatten()
        # A weight too small for a unit counts as one: the row was touched.
        units = (weights.detach().clamp(max=MAX_WEIGHT) * 2**UNIT_BITS).to(torch.int64).clamp(min=1)
        self.usage_units.index_add_(0, rows, units.flatten())
        # Written, not added: a row that stands several times is given the same numbers each time.
        sums = self.usage_units[rows]
        self.usage_weights[rows] = self.usage_weights[rows] + (sums >> UNIT_BITS)
        self.usage_units[rows] = sums & (2**UNIT_BITS - 1)
        self.usage_lookups.add_(rows.numel())
        self.usage_lookups_carried.add_(self.usage_lookups >> LOOKUP_BITS)
        self.usage_lookups.bitwise_and_(2**LOOKUP_BITS - 1)

    def _make_ordinary(self) -> None:
        """Copy counters that inference mode made, as ``module.to`` does there: outside, they cannot be written to."""
        for name in COUNTERS:
            counts = getattr(self, name)
            if counts is not None and counts.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, counts.clone())

    def usage(self) -> MemoryUsage:
        """How evenly rows were used since the layer was made or reset, ``track_usage`` was set or ``reset_usage`` was
        called.

        Every forward counts, in training and evaluation, but for one that runs within a backward pass: activation
        checkpointing repeats what was counted before. A weight above 1024 counts as 1024. The counts are right up to
        2^60 tokens times heads. They are no part of the ``state_dict``, and of each process alone; but
        ``DistributedDataParallel`` hands rank 0's to all ranks, as all buffers, unless it is told
        ``broadcast_buffers=False``. A forward under a transform of ``torch.func`` is refused with
        ``NotImplementedError`` while usage is tracked. Waits for the device; counting itself does not.

        Raises:
            RuntimeError: ``track_usage`` is off.
        """
        if self.usage_units is None:
            raise RuntimeError("usage is not recorded: set track_usage = True first")
        assert self.usage_weights is not None
        assert self.usage_lookups is not None and self.usage_lookups_carried is not None
        num_lookups = int(self.usage_lookups) + (int(self.usage_lookups_carried) << LOOKUP_BITS)
        if num_lookups == 0:
            return MemoryUsage(0.0, float("nan"), 0)
        use = self.usage_weights.double() + self.usage_units.double() / 2**UNIT_BITS
        share_touched = float((use > 0).double().mean())
        entropy = torch.special.entr(use / use.sum()).sum()
        return MemoryUsage(share_touched, max(0.0, math.log(use.numel()) - float(entropy)), num_lookups)

    def reset_usage(self) -> None:
        """Forget what ``usage`` counted so far."""
        self._make_ordinary()
        for name in COUNTERS:
            counts = getattr(self, name)
            if counts is not None:
                counts.zero_()


def _is_recomputing() -> bool:
    """Whether this runs within a backward pass, as what activation checkpointing recomputes does.

    A compiled forward is not asked: its counts are updated once, whatever of it is recomputed.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
