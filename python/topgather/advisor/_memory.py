"""What a memory layer costs on this machine, beside the feed-forward layer that it takes the place of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._common import checks
from ..nn import MemoryPool, ProductKeyMemory
from . import _show
from ._attention import _lengths
from ._measure import Run, apart, device_name, peak_bytes, show_bytes, show_seconds, time_in_turn
from ._progress import Progress
from ._shape import check_dtype


@dataclass(frozen=True)
class MemoryMeasurement:
    """One layer on a batch of tokens.

    Args:
        top_k: rows per head; None for the feed-forward layer.
        seconds: least time of a call, with its gradients where they were asked for.
        bytes: what the call adds to the memory held, at its peak; None where it was not measured.
        parameters: parameters of the layer, those of the table included.
        active_parameters: those that one token meets: all but the rows of the table that it does not read.
    """

    top_k: int | None
    seconds: float
    bytes: int | None
    parameters: int
    active_parameters: int

    @property
    def active_share(self) -> float:
        """Share of the parameters that one token meets."""
        return self.active_parameters / self.parameters


@dataclass(frozen=True)
class MemoryAdvice:
    """What :func:`topgather.advise_memory` measured, and what it advises. ``print`` shows the table.

    Args:
        rows: rows of the table, ``num_keys ** 2``.
        num_keys: half keys of each set.
        width: channels of the layer and of a row.
        num_heads: queries per token.
        key_dim: channels of a query.
        num_tokens: tokens that were measured at a time.
        train: whether the gradients were measured too.
        dtype: of parameters and tokens.
        device: name of the device that was measured on.
        table_bytes: bytes of the table.
        optimizer_bytes: bytes that Adam's two moments of the table take in training, in its dtype.
        feed_forward: the layer of the same width with four times as many hidden channels.
        measurements: of the memory layer, by ascending ``top_k``.
        recommended: the advised one.
        reason: why, in words.
        code: the lines that use it.
    """

    rows: int
    num_keys: int
    width: int
    num_heads: int
    key_dim: int
    num_tokens: int
    train: bool
    dtype: torch.dtype
    device: str
    table_bytes: int
    optimizer_bytes: int
    feed_forward: MemoryMeasurement
    measurements: tuple[MemoryMeasurement, ...]
    recommended: MemoryMeasurement
    reason: str
    code: str

    def __str__(self) -> str:
        return _show.memory_text(self)

    def save_html(self, path: str | Path) -> None:
        """Write one page with table, curves and advice, which needs no other file.

        Args:
            path: of the file to write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        _show.save_memory_html(self, Path(path))


@apart()
def advise_memory(
    rows: int,
    width: int,
    top_k: int | Sequence[int] = 32,
    *,
    num_heads: int = 4,
    key_dim: int | None = None,
    num_tokens: int = 4096,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 30.0,
    progress: bool = False,
) -> MemoryAdvice:
    """Measure a memory layer here, beside the feed-forward layer that it takes the place of, and advise a ``top_k``.

    The layer is a :class:`topgather.nn.ProductKeyMemory` (Memory+, arXiv 2412.09764), with sparse gradients of the
    table where ``train``. The advised ``top_k`` is the largest of those that take no longer than the feed-forward
    layer, or the smallest where none does.

    Args:
        rows: rows of the table; taken up to the next square.
        width: channels of the layer and of a row.
        top_k: rows per head to try; of one number its half and its double are tried too.
        num_heads: queries per token.
        key_dim: channels of a query, even; if None half of ``width``, between 2 and 512.
        num_tokens: tokens at a time.
        train: whether the gradients are computed too.
        dtype: of parameters and tokens.
        device: where to measure. The table must fit its memory.
        seconds: about how long to measure; everything is measured at least twice.
        progress: whether a bar is shown on stderr.

    Returns:
        A :class:`MemoryAdvice`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range.
    """
    for name, number in (("rows", rows), ("width", width), ("num_heads", num_heads), ("num_tokens", num_tokens)):
        checks.check_count(name, number)
    checks.check_flag("train", train)
    check_dtype(dtype)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {type(seconds).__name__}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    num_keys = math.isqrt(rows - 1) + 1
    key_dim = min(512, max(2, width // 4 * 2)) if key_dim is None else key_dim
    counts = _lengths("top_k", 1, top_k)
    if isinstance(top_k, int):
        counts = tuple(sorted({max(1, top_k // 2), top_k, min(2 * top_k, num_keys**2)}))
    place = torch.device(device)

    pool = MemoryPool(num_keys, width, sparse_grad=train, device=place, dtype=dtype)
    layers: dict[str, nn.Module] = {
        f"top_k {count}": ProductKeyMemory(width, pool, num_heads, count, key_dim, device=place, dtype=dtype)
        for count in counts
    }
    options: dict[str, Any] = {"device": place, "dtype": dtype}
    wide, narrow = nn.Linear(width, 4 * width, **options), nn.Linear(4 * width, width, **options)
    dense = nn.Sequential(wide, nn.SiLU(), narrow)
    layers["feed-forward"] = dense
    x = torch.randn(num_tokens, width, device=place).to(dtype)
    runs = {name: _run(layer, x, train) for name, layer in layers.items()}
    with Progress(progress) as shown:
        shown.begin("memory layer", 0.0, 1.0, float(seconds))
        least = time_in_turn(runs, place, float(seconds), on_run=shown.update)
        peaks = {name: peak_bytes(run, place) for name, run in runs.items()}

    def row(name: str, count: int | None) -> MemoryMeasurement:
        total = sum(parameter.numel() for parameter in layers[name].parameters())
        unread = 0 if count is None else pool.values.numel() - min(num_heads * count, num_keys**2) * width
        return MemoryMeasurement(count, least[name], peaks[name], total, total - unread)

    measurements = tuple(row(f"top_k {count}", count) for count in counts)
    feed_forward = row("feed-forward", None)
    cheap = [one for one in measurements if one.seconds <= feed_forward.seconds]
    best = cheap[-1] if cheap else measurements[0]
    table_bytes = pool.values.numel() * dtype.itemsize
    arguments = f"num_heads={num_heads}, top_k={best.top_k}, key_dim={key_dim}"
    sparse = ", sparse_grad=True" if train else ""
    code = (
        "import topgather as tg\n"
        f"pool = tg.nn.MemoryPool(num_keys={num_keys}, value_dim={width}{sparse})  # may be shared by layers\n"
        f"layer = tg.nn.ProductKeyMemory({width}, pool, {arguments})"
    )
    return MemoryAdvice(
        num_keys**2, num_keys, width, num_heads, key_dim, num_tokens, train, dtype, device_name(place), table_bytes,
        2 * table_bytes, feed_forward, measurements, best, _reason(best, feed_forward, bool(cheap), table_bytes), code,
    )  # fmt: skip


def _run(layer: nn.Module, x: Tensor, train: bool) -> Run:
    layer.train(train)
    if not train:

        def forward() -> Tensor:
            with torch.no_grad():
                out: Tensor = layer(x)
                return out

        return forward
    parameters = list(layer.parameters())
    grad_out = torch.randn_like(x)
    tokens = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(tokens), [tokens, *parameters], grad_out)


def _reason(best: MemoryMeasurement, dense: MemoryMeasurement, is_cheap: bool, table_bytes: int) -> str:
    cost = (
        f"With top_k {best.top_k} the layer takes {show_seconds(best.seconds)} where the feed-forward layer takes "
        f"{show_seconds(dense.seconds)}, and holds {best.parameters / dense.parameters:.1f} times its parameters "
        f"({show_bytes(table_bytes)} of table), of which a token meets {best.active_share:.2%}"
    )
    if is_cheap:
        return f"{cost}: the largest top_k tried that takes no longer."
    return f"{cost}: none of those tried is as fast, and this one reads the fewest rows."
