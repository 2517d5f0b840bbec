"""Layers over images: self-attention inside grids or windows of tokens, and the fusion of feature maps into a mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .._common import checks
from .._common.library import larger, smaller
from ..ops import grid_attention, window_attention
from ..ops.grid import GRID, WINDOW, Pair, axis_of, grid_step
from ._init import reset_modules
from ._one_graph import LayerNorm, PatchConv2d, is_exporting
from ._tables import check_number

CHANNELS_FIRST, CHANNELS_LAST = LAYOUTS = ("channels_first", "channels_last")


class SparseSelfAttention2d(nn.Module):
    """Multi-head self-attention inside groups of an image's tokens, with its two projections (SparseViT, arXiv
    2412.14598, section 3.2; grid and window attention of MaxViT, arXiv 2204.01697, section 3.3).

    One projection makes queries, keys and values, which attention reads where they lie. Any rows and columns will do:
    where sizes do not divide, groups just have fewer tokens. Exactly one of ``grid_size``, ``stride`` and
    ``window_size`` says what a group is.

    Args:
        dim: channels of the input and the output.
        num_heads: heads, a divisor of ``dim``.
        grid_size: most tokens of a strided group, ``(rows, columns)``, or an int for a square: see
            :func:`topgather.grid_attention`.
        stride: instead, the distance between a group's tokens. 1 is global attention.
        window_size: instead, the tokens of a contiguous group: see :func:`topgather.window_attention`.
        qkv_bias: whether the projection to queries, keys and values adds a bias.
        bias: whether the output projection adds a bias.
        relative_position_bias: whether a table adds to each score what the distance between the two tokens, in steps
            of their group, deserves (Swin, arXiv 2103.14030, section 3.2). Needs ``grid_size`` or ``window_size``, for
            with a ``stride`` groups grow with the image.
        layout: ``"channels_first"``, ``[B, dim, H, W]``, or ``"channels_last"``, ``[B, H, W, dim]``, of input and
            output. The layer computes with channels last; a tensor of channels first in torch's memory format
            ``channels_last`` needs no copy.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Attributes:
        relative_position_table: ``[num_heads, 2 * rows - 1, 2 * columns - 1]``, or None: the bias by the key's row and
            column in the group less the query's, plus ``rows - 1`` and ``columns - 1``. At first normal with a standard
            deviation of 0.02.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, ``num_heads`` that does not divide ``dim``, an unknown ``layout``, none or several
            of the three sizes, or a relative bias with a ``stride``.
    """

    relative_position_table: nn.Parameter | None

    # The class of the projections, which says how they are drawn.
    _linear: type[nn.Linear] = nn.Linear

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Pair | None = None,
        stride: Pair | None = None,
        window_size: Pair | None = None,
        qkv_bias: bool = True,
        bias: bool = True,
        relative_position_bias: bool = False,
        layout: str = CHANNELS_FIRST,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim)
        checks.check_count("num_heads", num_heads)
        if dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, {dim}, got {num_heads}")
        sizes = {"grid_size": grid_size, "stride": stride, "window_size": window_size}
        given = {name: checks.check_pair(name, size) for name, size in sizes.items() if size is not None}
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(sizes)} must be given, got {', '.join(given) or 'none'}")
        checks.check_flag("qkv_bias", qkv_bias)
        checks.check_flag("bias", bias)
        checks.check_flag("relative_position_bias", relative_position_bias)
        if relative_position_bias and stride is not None:
            raise ValueError("relative_position_bias needs grid_size or window_size, for with a stride groups may grow")
        if not isinstance(layout, str):
            raise TypeError(f"layout must be a str, got {layout!r} of type {type(layout).__name__}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")

        self.dim = dim
        self.num_heads = num_heads
        self.grid_size = given.get("grid_size")
        self.stride = given.get("stride")
        self.window_size = given.get("window_size")
        self.layout = layout
        self.qkv_proj = self._linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = self._linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.relative_position_table = None
        if relative_position_bias:
            ((name, size),) = given.items()
            self.relative_position_table = nn.Parameter(_make_table(name, size, num_heads, device, dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        if self.relative_position_table is not None:
            nn.init.normal_(self.relative_position_table, std=0.02)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_own()
        reset_modules(self.qkv_proj, self.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each group of ``x``, ``[B, dim, H, W]`` or ``[B, H, W, dim]``; returns the same shape.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: ``x`` has not the shape that ``layout`` says.
        """
        checks.check_tensor("x", x)
        is_first = self.layout == CHANNELS_FIRST
        checks.check_ndim("x", x, 4, "[batch, dim, rows, columns]" if is_first else "[batch, rows, columns, dim]")
        checks.check_size("x", x, 1 if is_first else 3, self.dim, "dim of the layer")
        checks.check_floating("x", x)
        if is_first:
            x = x.permute(0, 2, 3, 1)
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.dim // self.num_heads))
        query, key, value = (part.permute(0, 3, 1, 2, 4) for part in qkv.unbind(3))
        bias = self._relative_position_bias(x.size(1), x.size(2))
        if self.window_size is not None:
            out = window_attention(query, key, value, self.window_size, bias=bias)
        else:
            out = grid_attention(query, key, value, grid_size=self.grid_size, stride=self.stride, bias=bias)
        # The op lays its output out as the query is, so the heads of a token already lie side by side.
        projected: Tensor = self.out_proj(out.permute(0, 2, 3, 1, 4).flatten(3))
        return projected.permute(0, 3, 1, 2) if is_first else projected

    def _relative_position_bias(self, num_rows: int, num_columns: int) -> Tensor | None:
        """The table as ``[heads, G, G]``, for the groups of an image of this size."""
        table = self.relative_position_table
        if table is None:
            return None
        if self.window_size is not None:
            partition, most, steps = WINDOW, self.window_size, self.window_size
        else:
            assert self.grid_size is not None
            partition, most = GRID, self.grid_size
            steps = grid_step(num_rows, most[0]), grid_step(num_columns, most[1])
        rows = axis_of(partition, num_rows, steps[0]).max_tokens
        columns = axis_of(partition, num_columns, steps[1]).max_tokens
        if torch.compiler.is_compiling():
            return _relative_bias_of_any_size(table, most, rows, columns)
        # Entry k of window s is table[s + k]: the window of query q begins at most - 1 - q, so that key k is at its
        # distance k - q. No gather, so the gradient is a sum in a fixed order.
        bias = table.unfold(1, most[0], 1).narrow(1, most[0] - rows, rows).narrow(3, 0, rows).flip(1)
        bias = bias.unfold(2, most[1], 1).narrow(2, most[1] - columns, columns).narrow(4, 0, columns).flip(2)
        return bias.flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        sizes = {"grid_size": self.grid_size, "stride": self.stride, "window_size": self.window_size}
        given = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
        return f"dim={self.dim}, num_heads={self.num_heads}, {given}, layout={self.layout}"


def _make_table(
    name: str, size: tuple[int, int], num_heads: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> Tensor:
    """A table of relative positions for groups of ``size``, not filled in; ``name`` is the option that says so."""
    shape = (num_heads, 2 * size[0] - 1, 2 * size[1] - 1)
    try:
        return torch.empty(shape, device=device, dtype=dtype)
    except torch.OutOfMemoryError:  # the type by which programs know that they may try again with less
        raise
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{name} must be such that relative_position_bias has a table that fits memory: {size} makes it "
            f"{list(shape)}, {math.prod(shape)} numbers"
        ) from error


def _relative_bias_of_any_size(table: Tensor, most: tuple[int, int], rows: int, columns: int) -> Tensor:
    """What ``SparseSelfAttention2d._relative_position_bias`` makes, in a form that one graph can have for all sizes.

    The bias of the largest group, of which the tokens that there are are chosen: each once, so that the gradient is
    still a sum in a fixed order.
    """
    bias = table.unfold(1, most[0], 1).flip(1).unfold(2, most[1], 1).flip(2).flatten(3).flatten(1, 2)
    tokens = torch.arange(rows * columns, device=table.device)
    tokens = tokens // columns * most[1] + tokens % columns
    return bias.index_select(1, tokens).index_select(2, tokens)


class LearnableFeatureFusion(nn.Module):
    """Feature maps of several sizes, weighted by channel, summed and read out as a mask (the learnable multi-scale
    supervision of SparseViT, arXiv 2412.14598, section 3.3).

    Each map is brought to ``dim`` channels by a 1 x 1 convolution where it has others, enlarged bilinearly to the
    largest map, and multiplied by a learnt weight for each channel. The sum is normalised over channels, and a last
    1 x 1 convolution makes the mask's logits.

    Args:
        in_channels: channels of each map, in the order in which they are passed.
        dim: channels of the sum.
        out_channels: channels of the mask.
        init_value: first value of the weights, small as those of layer scale (arXiv 2103.17239).
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Attributes:
        gammas: ``[len(in_channels), dim]``, the weights.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, or no maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        out_channels: int = 1,
        init_value: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = check_counts("in_channels", in_channels)
        checks.check_count("dim", dim)
        checks.check_count("out_channels", out_channels)
        check_number("init_value", init_value)
        self.dim = dim
        self.out_channels = out_channels
        self.init_value = float(init_value)
        self.projections = nn.ModuleList(
            nn.Identity() if channels == dim else PatchConv2d(channels, dim, 1, device=device, dtype=dtype)
            for channels in self.in_channels
        )
        shape = (len(self.in_channels), dim)
        self.gammas = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.norm = LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.out_proj = PatchConv2d(dim, out_channels, 1, device=device, dtype=dtype)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.constant_(self.gammas, self.init_value)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_own()
        reset_modules(*self.children())

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse ``maps``, each ``[B, channels, H, W]`` of its own size, into logits ``[B, out_channels, H, W]`` of the
        largest.

        Where a map's side is the largest one divided by a whole number and rounded up, as strided convolutions leave
        it, it is enlarged by that number and cropped, so that everything stays in its place; else it is resized.

        Raises:
            TypeError: ``maps`` is not a sequence of tensors of floating-point numbers.
            ValueError: their number, shapes or batch sizes are wrong, or a map is empty.
        """
        if not isinstance(maps, (list, tuple)):
            raise TypeError(f"maps must be a list or tuple of tensors, got {type(maps).__name__}")
        if len(maps) != len(self.in_channels):
            raise ValueError(f"maps must be {len(self.in_channels)} tensors, got {len(maps)}")
        for index, (one, channels) in enumerate(zip(maps, self.in_channels, strict=True)):
            name = f"maps[{index}]"
            checks.check_tensor(name, one)
            checks.check_ndim(name, one, 4, "[batch, channels, rows, columns]")
            checks.check_size(name, one, 0, maps[0].size(0), "batch of maps[0]")
            checks.check_size(name, one, 1, channels, "its in_channels")
            checks.check_floating(name, one)
            if one.size(2) < 1 or one.size(3) < 1:
                raise ValueError(f"{name} must have at least one row and column, got shape {tuple(one.shape)}")
        num_rows, num_columns = _largest([one.size(2) for one in maps]), _largest([one.size(3) for one in maps])
        total = None
        for one, projection, gamma in zip(maps, self.projections, self.gammas, strict=True):
            enlarged = _enlarge(projection(one), num_rows, num_columns)
            weighted = enlarged * gamma[:, None, None]
            total = weighted if total is None else total + weighted
        assert total is not None
        normed: Tensor = self.norm(total.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits: Tensor = self.out_proj(normed)
        return logits

    def extra_repr(self) -> str:
        """The layer's options, as ``print`` shows them."""
        return f"in_channels={self.in_channels}, dim={self.dim}, out_channels={self.out_channels}"


# An exported graph serves all sizes, and a compiled one should: every comparison of two sizes would halve those that a
# graph is good for. What a comparison would decide is computed there instead, and only in tensors, for torch compares
# sizes of its own accord.


def _largest(sides: list[int]) -> int:
    if is_exporting():
        # In this form torch sees that it is at least 1.
        exported: int = 1 + functools.reduce(larger, [side - 1 for side in sides])
        return exported
    largest = sides[0]
    for side in sides[1:]:
        if side > largest:  # the one comparison of compiled graphs: maps keep their order of size
            largest = side
    return largest


def _is_same(side: int, other: int) -> bool:
    if torch.compiler.is_dynamo_compiling() and torch.__version__ < "2.8":
        return side == other  # a guard, for there Dynamo does not trace the other
    return statically_known_true(side == other) if torch.compiler.is_compiling() else side == other


def _enlarged_side(side: int, target: int) -> int:
    """``side`` times a whole number where ``side`` is ``target`` divided by it and rounded up; else ``target``."""
    factor = -(-target // side)
    missing = side - -(-target // factor)  # never below 0
    if not torch.compiler.is_compiling():
        return factor * side if missing == 0 else target
    return target + (1 - smaller(missing, 1)) * (factor * side - target)


def _enlarge(x: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """``x [B, channels, rows, columns]`` at the size of a larger map; see ``LearnableFeatureFusion.forward``."""
    if _is_same(x.size(2), num_rows) and _is_same(x.size(3), num_columns):
        return x
    sides = _enlarged_side(x.size(2), num_rows), _enlarged_side(x.size(3), num_columns)
    return resize(x, sides, num_rows, num_columns)


def resize(x: Tensor, sides: tuple[int, int], num_rows: int, num_columns: int) -> Tensor:
    """The first rows and columns of ``x [B, channels, rows, columns]`` resized to ``sides``, bilinearly."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, size=sides, mode="bilinear", align_corners=False)[:, :, :num_rows, :num_columns]
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    for dim, side, count in ((2, sides[0], num_rows), (3, sides[1], num_columns)):
        centers = torch.arange(count, dtype=x.dtype, device=x.device) + 0.5
        places = (centers * x.size(dim) / side - 0.5).clamp(min=0)
        last = torch.full((), x.size(dim) - 1, device=x.device)
        before = torch.minimum(places.long(), last)
        after = torch.minimum(before + 1, last)
        weight = (places - before).view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, before) * (1 - weight) + x.index_select(dim, after) * weight
    return x.to(dtype)


def check_counts(name: str, values: Sequence[int], length: int | None = None, least: int = 1) -> tuple[int, ...]:
    """``values`` as a tuple; raise unless they are ints of at least ``least``, one or more, or ``length`` of them."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of ints, got {type(values).__name__}")
    if len(values) != length if length is not None else len(values) == 0:
        raise ValueError(f"{name} must have {length or 'at least 1'} entries, got {len(values)}")
    for index, value in enumerate(values):
        checks.check_count(f"{name}[{index}]", value, least)
    return tuple(values)
