"""Pictures of what was chosen: blocks by heads, rows of a memory.

They take matplotlib, which is loaded when one is drawn. ``topgather.viz`` itself is loaded at its first use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._common import checks
from .cache._base import BaseCache
from .nn._usage import UNIT_BITS, UsageCounters
from .ops import BlockRouting, RoutingRecord
from .ops.moba import forced_within
from .ops.statistics import choices_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # annotations can be read where matplotlib is not installed

__all__ = ["memory_usage", "routing"]

MAX_PANELS = 16


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"topgather.viz needs the package matplotlib (pip install matplotlib): {error}") from error
    return Figure(figsize=(width, height), layout="constrained")


def _figure_of(ax: Axes) -> Figure:
    figure: Figure | None = ax.get_figure()  # type: ignore[assignment]
    if figure is None:
        raise ValueError("ax must belong to a figure")
    return figure


# --- blocks ---------------------------------------------------------------------------------------------------------


def routing(
    source: BlockRouting | RoutingRecord | BaseCache,
    *,
    head: int | None = None,
    batch: int = 0,
    call: int = 0,
    first_query: int = 0,
    cu_seqlens: Tensor | None = None,
    query: Tensor | None = None,
    top_k: int = 8,
    max_bins: int = 256,
    ax: Axes | None = None,
    force_first: int = 0,
    force_last: int = 1,
    window: int | None = None,
) -> Figure:
    """Draw which blocks of keys each head's queries attend to (MoBA, arXiv 2502.13189, section 2.2).

    Queries run down, keys to the right, both by tokens. The colour is the share of the queries and blocks under a point
    that chose each other, so that a picture of 65536 tokens shows what one of 1024 does. Without ``head`` and ``ax``
    every head has a panel, up to 16 of them; with ``ax`` alone it shows the mean of the heads.

    Args:
        source: the choice; a record, of which ``call`` says which; or a :class:`MobaCache` or
            :class:`PagedMobaCache`, for which ``query`` chooses now.
        head: the head to draw; None for all.
        batch: the batch entry to draw. Packed sequences are drawn one behind the other.
        call: number of the choice in a record; of a forward, the layer.
        first_query: position of the first query; ``Nk - Nq`` where keys are more than queries. A cache knows it.
        cu_seqlens: boundaries of packed queries, for a packed choice.
        query: ``[B, Hq, M, D]`` of a cache's newest ``M`` tokens, as :func:`moba_decode` takes it.
        top_k: blocks per query, for a cache.
        max_bins: at most so many points along each axis.
        ax: axes of matplotlib to draw into.
        force_first, force_last: blocks in every choice of a cache, as :func:`moba_decode` takes them.
        window: of a cache, as :func:`moba_decode` takes it; the blocks that it reaches into count as chosen.

    Returns:
        The figure, a new one unless ``ax`` is given.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, or an argument that ``source`` needs or cannot have.
        IndexError: a head, batch entry or call that there is not.
    """
    checks.check_count("max_bins", max_bins)
    if isinstance(source, RoutingRecord):
        if not -len(source) <= call < len(source):
            raise IndexError(f"call must be below {len(source)}, the choices of the record, got {call}")
        source = source[call]
    elif isinstance(source, BaseCache):
        source, first_query = _choice_of_cache(source, query, top_k, batch, (force_first, force_last), window)
    if not isinstance(source, BlockRouting):
        raise TypeError(
            f"source must be a topgather.BlockRouting, RoutingRecord, MobaCache or PagedMobaCache, got "
            f"{type(source).__name__}"
        )
    if source.block_indices.ndim == 4:
        num_entries = source.block_indices.size(0)
        if not 0 <= batch < num_entries:
            raise IndexError(f"batch must be below {num_entries}, the batch size, got {batch}")
        source = BlockRouting(source.block_indices[batch : batch + 1], source.block_size)
    maps, extent = _maps(source, first_query, cu_seqlens, max_bins)
    num_heads = maps.size(0)
    if head is not None and not 0 <= head < num_heads:
        raise IndexError(f"head must be below {num_heads}, the heads of the choice, got {head}")
    if ax is not None or head is not None or num_heads == 1:
        if ax is None:
            ax = _new_figure(6.0, 5.0).add_subplot()
        name = f"head {head}" if head is not None else f"mean of {num_heads} heads" if num_heads > 1 else "all heads"
        picture = _draw_map(ax, maps.mean(0) if head is None else maps[head], extent, name)
        figure = _figure_of(ax)
        figure.colorbar(picture, ax=ax, label="share chosen")
        return figure
    shown = min(num_heads, MAX_PANELS)
    columns = min(4, shown)
    rows = -(-shown // columns)
    figure = _new_figure(3.2 * columns + 0.8, 3.0 * rows)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(shown)]
    top = float(maps[:shown].max())
    for i, panel in enumerate(panels):
        picture = _draw_map(panel, maps[i], extent, f"head {i}", top)
        panel.label_outer()
    figure.colorbar(picture, ax=panels, label="share chosen")
    if shown < num_heads:
        figure.suptitle(f"heads 0 to {shown - 1} of {num_heads}", fontsize=10)
    return figure


def _choice_of_cache(
    cache: BaseCache, query: Tensor | None, top_k: int, batch: int, forced: tuple[int, int], window: int | None
) -> tuple[BlockRouting, int]:
    if query is None:
        raise ValueError("query must be given for a cache: it keeps no choices, query makes one")
    checks.check_tensor("query", query)
    checks.check_count("top_k", top_k)
    checks.check_forced(*forced, top_k)
    checks.check_window(window)
    lengths = cache.lengths
    if not 0 <= batch < len(lengths):
        raise IndexError(f"batch must be below {len(lengths)}, the cache's sequences, got {batch}")
    checks.check_ndim("query", query, 4, "[batch, heads, tokens, head_dim]")
    first_query = lengths[batch] - query.size(2)
    if first_query < 0:
        raise ValueError(f"query must have at most {lengths[batch]} tokens, those of the sequence, got {query.size(2)}")
    num_blocks = max(1, -(-max(lengths) // cache.block_size))
    slots = min(top_k, num_blocks)
    chosen = torch.ops.topgather.moba_decode_route.default(
        query.detach(), cache.centroids, cache.seq_lens, cache.page_table, None, cache.block_size, cache.page_size,
        slots, *forced_within(slots, forced),
    )  # fmt: skip
    if window is not None:
        chosen = _with_window(chosen, first_query, cache.block_size, window)
    return BlockRouting(chosen, cache.block_size), first_query


def _with_window(chosen: Tensor, first_query: int, block_size: int, window: int) -> Tensor:
    """A choice and, where it has them not, the blocks of each query's newest ``window`` keys."""
    position = first_query + torch.arange(chosen.size(2), device=chosen.device)
    first, last = (position - window + 1).clamp(min=0) // block_size, position // block_size
    most = int((last - first).max()) + 1 if position.numel() else 0
    blocks = first[:, None] + torch.arange(most, device=chosen.device)
    blocks = torch.where(blocks <= last[:, None], blocks, -1).to(torch.int32).expand(*chosen.shape[:3], -1)
    is_there = (blocks[..., None] == chosen[..., None, :]).any(-1)
    return torch.cat([chosen, blocks.masked_fill(is_there, -1)], dim=-1)


def _maps(
    choice: BlockRouting, first_query: int, cu_seqlens: Tensor | None, max_bins: int
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """``[H, query bins, key bins]``, the shares, and where the axes begin and end, in tokens: keys, queries."""
    blocks, positions, _, starts = choices_of(choice, first_query, cu_seqlens)
    num_heads, num_queries, _ = blocks.shape
    size = choice.block_size
    if num_queries == 0:
        raise ValueError("source must have queries, got a choice of none")
    # Keys reach as far as queries stand or blocks are named.
    first = starts[:, None] + torch.where(blocks >= 0, blocks, 0) * size
    num_keys = max(int((starts + positions).max()) + 1, int(first.max()) + 1)
    num_blocks = -(-num_keys // size)
    key_bins, query_bins = min(max_bins, num_blocks), min(max_bins, num_queries)
    # In blocks, for packed sequences that start within one the one that they start in.
    key_bin = (first // size) * key_bins // num_blocks
    query_bin = torch.arange(num_queries, device=blocks.device) * query_bins // num_queries
    heads = torch.arange(num_heads, device=blocks.device)[:, None, None]
    cell = (heads * query_bins + query_bin[:, None]) * key_bins + key_bin
    counts = torch.bincount(cell[blocks >= 0], minlength=num_heads * query_bins * key_bins)
    rows = torch.bincount(query_bin, minlength=query_bins)
    columns = torch.bincount(torch.arange(num_blocks, device=blocks.device) * key_bins // num_blocks)
    shares = counts.view(num_heads, query_bins, key_bins) / (rows[:, None] * columns)
    return shares.double().cpu(), (0.0, float(num_blocks * size), float(first_query + num_queries), float(first_query))


def _draw_map(ax: Axes, shares: Tensor, extent: Any, name: str, top: float | None = None) -> Any:
    from matplotlib.colors import PowerNorm

    # By the square root: most of what is chosen besides the own block is chosen seldom.
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(shares.max()) if top is None else top, 1e-9))
    picture = ax.imshow(
        shares.tolist(), extent=extent, aspect="auto", interpolation="nearest", norm=norm, cmap="magma_r"
    )
    ax.set_title(name, fontsize=10)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return picture


# --- rows of a memory -----------------------------------------------------------------------------------------------


def memory_usage(layers: nn.Module | Sequence[nn.Module], *, max_bins: int = 256, ax: Axes | None = None) -> Figure:
    """Draw how evenly memory layers use the rows of their table (arXiv 1907.05242, section 4.5).

    The curve is the use of the rows, the sum of the weights that they were looked up with, by rank, over their mean;
    even use is the line at 1. Without ``ax`` a second panel shows the use by half keys. The title has the rows that
    nobody looked up and the Kullback-Leibler divergence from even use, as ``usage()`` of a layer gives them.

    Args:
        layers: a layer with ``track_usage``, a :class:`topgather.nn.ProductKeyMemory` or
            :class:`topgather.nn.PeerMemory`, several that share a pool, or a model that has them: their counts add up.
            A :class:`topgather.nn.MemoryPool` does not count by itself.
        max_bins: at most so many points of the curve, and along each axis of the second panel.
        ax: axes of matplotlib to draw the curve into.

    Returns:
        The figure, a new one unless ``ax`` is given.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument of the wrong type.
        ValueError: no layer counts, tables differ in size, or nothing was looked up.
    """
    checks.check_count("max_bins", max_bins)
    use, num_keys = _use_of(layers)
    num_rows = use.numel()
    num_dead = int((use == 0).sum())
    entropy = float(torch.special.entr(use / use.sum()).sum())
    divergence = max(0.0, math.log(num_rows) - entropy)
    is_alone = ax is None
    if ax is None:
        figure = _new_figure(10.0, 4.2)
        ax = figure.add_subplot(1, 2, 1)
    figure = _figure_of(ax)
    ranked = use.sort(descending=True).values / use.mean()
    alive = ranked[: num_rows - num_dead]
    ranks = torch.logspace(0, math.log10(len(alive)), max_bins, device="cpu").long().clamp(1, len(alive)).unique()
    ax.plot(ranks.tolist(), alive[ranks - 1].tolist(), label="rows by rank")
    ax.axhline(1.0, color="gray", linestyle="--", label="even use")
    if num_dead > 0:
        ax.axvspan(len(alive), num_rows, color="C3", alpha=0.2, label="never looked up")
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="use over mean use", xlim=(1, max(2, num_rows)))
    ax.set_title(f"{num_dead} of {num_rows} rows unused, KL {divergence:.2f} nats", fontsize=10)
    ax.legend(fontsize=8)
    if not is_alone:
        return figure
    bins = min(max_bins, num_keys)
    bin_of_key = torch.arange(num_keys, device="cpu") * bins // num_keys
    summed = torch.zeros(bins, bins, dtype=torch.float64, device="cpu")
    cell = (bin_of_key[:, None] * bins + bin_of_key).flatten()
    summed.view(-1).index_add_(0, cell, use / use.mean())
    per_bin = torch.bincount(bin_of_key, minlength=bins)
    panel = figure.add_subplot(1, 2, 2)
    shown = summed / (per_bin[:, None] * per_bin)
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, vmin=0.0, vmax=float(shown.max()))
    extent = (0.0, float(num_keys), float(num_keys), 0.0)
    picture = panel.imshow(shown.tolist(), extent=extent, interpolation="nearest", norm=norm, cmap="magma_r")
    panel.set(xlabel="second half key", ylabel="first half key")
    panel.set_title("use by half keys", fontsize=10)
    figure.colorbar(picture, ax=panel, label="use over mean use")
    return figure


def _use_of(layers: nn.Module | Sequence[nn.Module]) -> tuple[Tensor, int]:
    given = [layers] if isinstance(layers, nn.Module) else list(layers)
    found: dict[int, UsageCounters] = {}
    for module in given:
        if not isinstance(module, nn.Module):
            raise TypeError(f"layers must be modules, got {type(module).__name__}")
        found |= {id(one): one for one in module.modules() if isinstance(one, UsageCounters)}
    counting = [layer for layer in found.values() if layer.usage_units is not None]
    if not counting:
        raise ValueError(
            "layers must be or hold a ProductKeyMemory or PeerMemory with track_usage = True; a pool does not count by "
            "itself"
        )
    sizes = {layer.num_keys for layer in counting}
    if len(sizes) > 1:
        raise ValueError(f"layers must have tables of one size, got num_keys of {sorted(sizes)}")
    use = torch.zeros(counting[0].num_keys ** 2, dtype=torch.float64, device="cpu")
    for layer in counting:
        assert layer.usage_weights is not None and layer.usage_units is not None
        use += (layer.usage_weights.double() + layer.usage_units.double() / 2**UNIT_BITS).cpu()
    if not bool(use.any()):
        raise ValueError("layers must have been looked up in, got one whose counts are all 0")
    return use, counting[0].num_keys
