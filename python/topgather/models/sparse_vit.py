"""SparseViT: where was this image manipulated (arXiv 2412.14598)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import checks
from ..nn._init import TruncatedNormalLinear, reset_modules
from ..nn._one_graph import BatchNorm2d, LayerNorm, PatchConv2d, constant_float, is_exporting
from ..nn._tables import check_number, copy_reference, parameter_to_load
from ..nn.grid import CHANNELS_LAST, LearnableFeatureFusion, SparseSelfAttention2d, check_counts, resize
from ..ops.grid import GRID, Pair, axis_of


class SparseViT(nn.Module):
    """Localises manipulated regions of images: ``[B, in_channels, H, W]`` to a mask's logits ``[B, out_channels, H,
    W]``, for any H and W (SparseViT, arXiv 2412.14598, section 3).

    Four stages, each at the size that its patch embedding leaves. The first two have convolutional blocks (of
    UniFormer, arXiv 2201.09450), the last two self-attention inside strided grids of tokens, sparse in a stage's first
    blocks, for traces of manipulation that have no meaning to look for, and denser in its later ones.
    :class:`topgather.nn.LearnableFeatureFusion` makes the mask of maps of both: one at the end of each rate, the last
    of a stage normalised. It is enlarged bilinearly to the image. The loss, binary cross-entropy with logits in the
    paper, is left to the caller.

    The defaults are the released model's: 50 million parameters, images of 512 x 512.

    Args:
        in_channels: channels of an image.
        depths: blocks of each of the four stages.
        dims: channels of each.
        head_dim: channels of an attention head, a divisor of the last two ``dims``.
        rates: of sparsity, in the third and the fourth stage: the stride of their grids, for images of ``base_size``.
            Blocks are spread evenly over a stage's rates, and the first of them get one more where that does not work
            out. With ``((1,), (1,))`` attention is global.
        base_size: size of image, ``(rows, columns)``, or an int for a square, for which ``rates`` are meant. A group
            has so many tokens as a rate makes of it in images of other sizes too, so the cost for a pixel stays the
            same. None makes ``rates`` strides in images of any size.
        patch_sizes: side of the patches that each stage's embedding joins; ``base_size`` must be a multiple of the
            product of them all.
        mlp_ratio: hidden channels of a block's perceptron, as a multiple of the block's.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        fusion_dim: channels in which maps are summed.
        out_channels: channels of the mask.
        drop_path_rate: probability with which the last block's branches are left out for an image in training
            (arXiv 1603.09382), growing evenly from 0 in the first block.
        init_value: first value of layer scale, in the blocks of attention and the fusion.
        device: where the parameters are created; torch's default if None.
        dtype: of the parameters; torch's default if None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1 or of the wrong number of entries, more rates than blocks, ``head_dim`` that does not
            divide, a ``base_size`` that patches or rates do not divide, or a probability out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depths: Sequence[int] = (5, 8, 20, 7),
        dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        rates: Sequence[Sequence[int]] = ((8, 4, 2, 1), (2, 1)),
        base_size: Pair | None = 512,
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        fusion_dim: int = 512,
        out_channels: int = 1,
        drop_path_rate: float = 0.2,
        init_value: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_count("in_channels", in_channels)
        depths = check_counts("depths", depths, 4)
        dims = check_counts("dims", dims, 4)
        patch_sizes = check_counts("patch_sizes", patch_sizes, 4)
        checks.check_count("head_dim", head_dim)
        for dim in dims[2:]:
            if dim % head_dim != 0:
                raise ValueError(f"head_dim must divide the last two dims, {dims[2:]}, got {head_dim}")
        if not isinstance(rates, (list, tuple)) or len(rates) != 2:
            raise ValueError(f"rates must be those of the third and of the fourth stage, got {rates!r}")
        rates = tuple(check_counts(f"rates[{index}]", rates[index]) for index in range(2))
        for stage_rates, depth in zip(rates, depths[2:], strict=True):
            if len(stage_rates) > depth:
                raise ValueError(f"depths must be at least the number of rates of a stage, {stage_rates}, got {depth}")
        for name, number in (("mlp_ratio", mlp_ratio), ("drop_path_rate", drop_path_rate), ("init_value", init_value)):
            check_number(name, number)
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, got {mlp_ratio}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        checks.check_flag("qkv_bias", qkv_bias)
        checks.check_count("fusion_dim", fusion_dim)
        checks.check_count("out_channels", out_channels)

        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.patch_sizes = patch_sizes
        self.rates = rates
        self.base_size = None if base_size is None else checks.check_pair("base_size", base_size)
        drop_rates = [drop_path_rate * index / max(sum(depths) - 1, 1) for index in range(sum(depths))]
        self.embeddings = nn.ModuleList(
            PatchEmbedding(channels, dim, patch, **place)
            for channels, dim, patch in zip((in_channels, *dims), dims, patch_sizes, strict=False)
        )
        self.stages = nn.ModuleList()
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            stage_drop_rates = [drop_rates.pop(0) for _ in range(depth)]
            hidden_dim = max(int(dim * mlp_ratio), 1)
            blocks: list[ConvBlock] | list[SparseAttentionBlock]
            if stage < 2:
                blocks = [ConvBlock(dim, hidden_dim, rate, **place) for rate in stage_drop_rates]
            else:
                sizes = [self._group_size(stage, rate) for rate in _spread(rates[stage - 2], depth)]
                blocks = [
                    SparseAttentionBlock(
                        dim, dim // head_dim, hidden_dim, size, qkv_bias, init_value, drop_rate, **place
                    )
                    for size, drop_rate in zip(sizes, stage_drop_rates, strict=True)
                ]
            self.stages.append(nn.ModuleList(blocks))
        self.norms = nn.ModuleList(LayerNorm(dim, eps=1e-6, **place) for dim in dims[2:])
        map_channels = [dim for dim, stage_rates in zip(dims[2:], rates, strict=True) for _ in stage_rates]
        self.fusion = LearnableFeatureFusion(map_channels, fusion_dim, out_channels, init_value, **place)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_modules(*self.children())

    def _stages(self) -> list[tuple[PatchEmbedding, list[ConvBlock | SparseAttentionBlock]]]:
        stages: Any = zip(self.embeddings, self.stages, strict=True)
        return [(embedding, list(blocks)) for embedding, blocks in stages]

    def _group_size(self, stage: int, rate: int) -> dict[str, Any]:
        """What a block of attention is told of its groups."""
        if self.base_size is None:
            return {"stride": (rate, rate)}
        step = rate * math.prod(self.patch_sizes[: stage + 1])
        rows, columns = self.base_size
        if rows % step != 0 or columns % step != 0:
            raise ValueError(
                f"base_size must be a multiple of {step}, stage {stage + 1} at rate {rate}, got {(rows, columns)}"
            )
        return {"grid_size": (rows // step, columns // step)}

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps of ``x [B, in_channels, H, W]`` that are fused, ``[B, dim, rows, columns]`` each: of the third stage
        at the end of each rate, then of the fourth. The last of a stage is normalised over channels.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: ``x`` has not the shape ``[B, in_channels, H, W]``, or no pixels.
        """
        checks.check_tensor("x", x)
        checks.check_ndim("x", x, 4, "[batch, in_channels, rows, columns]")
        checks.check_size("x", x, 1, self.in_channels, "in_channels of the model")
        checks.check_floating("x", x)
        if x.size(2) < 1 or x.size(3) < 1:
            raise ValueError(f"x must have at least one row and column, got shape {tuple(x.shape)}")
        maps: list[Tensor] = []
        for stage, (embedding, blocks) in enumerate(self._stages()):
            x = embedding(x)
            if stage < 2:
                for block in blocks:
                    x = block(x)
                continue
            last_of_rate = _last_of_rate(self.rates[stage - 2], len(blocks))
            tokens = x.permute(0, 2, 3, 1)
            for index, block in enumerate(blocks):
                tokens = block(tokens)
                if index in last_of_rate[:-1]:
                    maps.append(tokens.permute(0, 3, 1, 2))
            maps.append(self.norms[stage - 2](tokens).permute(0, 3, 1, 2))
            x = tokens.permute(0, 3, 1, 2)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, out_channels, H, W]`` of the mask of ``x [B, in_channels, H, W]``.

        Raises:
            TypeError: ``x`` is not a tensor of floating-point numbers.
            ValueError: ``x`` has not the shape ``[B, in_channels, H, W]``, or no pixels.
        """
        mask: Tensor = self.fusion(self.features(x))
        # Whole tokens first, some of which reach over the image's edge: so a token stays where its pixels are.
        patch = math.prod(self.patch_sizes[:3])
        return resize(mask, (patch * mask.size(2), patch * mask.size(3)), x.size(2), x.size(3))

    def attention_macs(self, image_size: Pair, is_global: bool = False) -> int:
        """Multiplications of one image's attention matrix products, those of queries with keys and of weights with
        values; projections are not among them.

        Args:
            image_size: rows and columns of the image in pixels, or an int for a square.
            is_global: count them as if each token attended to all of its stage.

        Returns:
            The number of multiply-accumulates of a forward pass, 4.7e9 for the defaults at 512 x 512.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a size below 1.
        """
        sides = checks.check_pair("image_size", image_size)
        checks.check_flag("is_global", is_global)
        total = 0
        for embedding, blocks in self._stages():
            sides = -(-sides[0] // embedding.patch_size), -(-sides[1] // embedding.patch_size)
            for block in blocks:
                if isinstance(block, SparseAttentionBlock):
                    total += 2 * block.attention.dim * _num_pairs(block.attention, sides, is_global)
        return total

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy in the parameters of the model published with arXiv 2412.14598, by their names there.

        The published checkpoint holds them under its entry ``"model"``:

        ========================================================  =====================================================
        name                                                      here
        ========================================================  =====================================================
        ``encoder_net.patch_embed{1..4}.proj, norm``              ``embeddings``
        ``encoder_net.blocks{1, 2}.{i}.pos_embed, norm1, conv1,   ``stages``, convolutional
        attn, conv2, norm2, mlp.fc1, mlp.fc2``
        ``encoder_net.blocks{3, 4}.{i}.norm1, attn.qkv,           ``stages``, with attention
        attn.proj, gamma_1, norm2, mlp.fc1, mlp.dwconv.dwconv,
        mlp.fc2, gamma_2``
        ``encoder_net.norm{3, 4}``                                ``norms``
        ``lmu.conv_layer{1..}, gamma{1..}, norm, conv_last``      ``fusion``
        ========================================================  =====================================================

        Entries of ``encoder_net.norm{1, 2}`` and ``encoder_net.blocks{3, 4}.{i}.pos_embed``, which the published model
        has without using them, are passed over.

        Args:
            state_dict: tensors by name.
            prefix: what stands before the names above, a final dot included. Other entries are passed over.

        Raises:
            TypeError: ``state_dict`` is not a mapping to tensors or ``prefix`` not a str.
            ValueError: names are missing or unknown (all are listed), or a shape is wrong. Nothing is copied then.
        """
        published: dict[str, str] = {"fusion.norm": "lmu.norm", "fusion.out_proj": "lmu.conv_last"}
        unused: list[str] = []
        for stage, (_, blocks) in enumerate(self._stages()):
            number = stage + 1
            published[f"embeddings.{stage}"] = f"encoder_net.patch_embed{number}"
            for index, block in enumerate(blocks):
                name = f"encoder_net.blocks{number}.{index}"
                published |= {f"stages.{stage}.{index}.{own}": f"{name}.{part}" for own, part in block.PUBLISHED_NAMES}
                if stage >= 2:
                    unused += [f"{name}.pos_embed.weight", f"{name}.pos_embed.bias"]
            if stage < 2:
                unused += [f"encoder_net.norm{number}.weight", f"encoder_net.norm{number}.bias"]
            else:
                published[f"norms.{stage - 2}"] = f"encoder_net.norm{number}"
        targets: dict[str, Tensor] = {}
        for index, gamma in enumerate(parameter_to_load(self.fusion, "gammas")):
            published[f"fusion.projections.{index}"] = f"lmu.conv_layer{index + 1}"
            targets[f"lmu.gamma{index + 1}"] = gamma
        for own, name in published.items():
            if own.endswith("gamma"):
                block_name, _, gamma_name = own.rpartition(".")
                targets[name] = parameter_to_load(self.get_submodule(block_name), gamma_name)
            else:
                parts = self.get_submodule(own).state_dict(keep_vars=True)
                targets |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        counters = [name for name in targets if name.endswith("num_batches_tracked")]
        copy_reference(targets, state_dict, prefix, may_miss=counters, unused=unused)

    def extra_repr(self) -> str:
        """The model's options, as ``print`` shows them."""
        return f"rates={self.rates}, base_size={self.base_size}, patch_sizes={self.patch_sizes}"


class PatchEmbedding(nn.Module):
    """Joins patches of pixels or tokens into tokens, ``[B, in_channels, H, W]`` to ``[B, dim, H / patch, W / patch]``,
    rounded up: what is missing of patches at the edge counts as 0.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv2d(in_channels, dim, patch_size, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-(-side // self.patch_size) * self.patch_size - side for side in x.shape[2:]]
        # A compiled graph pads by nothing too, so that it serves images of any size. An exported one pads by the most
        # that could be missing: the convolution leaves out what is no whole patch, and sizes stay simple.
        if is_exporting():
            missing = [self.patch_size - 1] * 2
        if torch.compiler.is_compiling() or any(missing):
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        normed: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """A transformer block of convolutions, over ``[B, dim, H, W]``: tokens are mixed by a depthwise one of 5 x 5."""

    PUBLISHED_NAMES = (
        ("position_conv", "pos_embed"),
        ("mixer_norm", "norm1"),
        ("mixer_in", "conv1"),
        ("mixer_conv", "attn"),
        ("mixer_out", "conv2"),
        ("mlp_norm", "norm2"),
        ("mlp_in", "mlp.fc1"),
        ("mlp_out", "mlp.fc2"),
    )

    drop_path_rate = constant_float("drop_path_rate")

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop_path_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.drop_path_rate = drop_path_rate
        self.position_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **place)
        self.mixer_norm = BatchNorm2d(dim, **place)
        self.mixer_in = PatchConv2d(dim, dim, 1, **place)
        self.mixer_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **place)
        self.mixer_out = PatchConv2d(dim, dim, 1, **place)
        self.mlp_norm = BatchNorm2d(dim, **place)
        self.mlp_in = PatchConv2d(dim, hidden_dim, 1, **place)
        self.mlp_out = PatchConv2d(hidden_dim, dim, 1, **place)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position_conv(x)
        mixed = self.mixer_out(self.mixer_conv(self.mixer_in(self.mixer_norm(x))))
        x = x + drop_path(mixed, self.drop_path_rate, self.training)
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + drop_path(self.mlp_out(hidden), self.drop_path_rate, self.training)


class _SparseAttention(SparseSelfAttention2d):
    """With projections drawn as the model's others."""

    _linear = TruncatedNormalLinear


class SparseAttentionBlock(nn.Module):
    """A transformer block over ``[B, H, W, dim]``: attention inside grids, a perceptron with a depthwise convolution of
    3 x 3 between its layers, and layer scale on both.
    """

    PUBLISHED_NAMES = (
        ("attention_norm", "norm1"),
        ("attention.qkv_proj", "attn.qkv"),
        ("attention.out_proj", "attn.proj"),
        ("attention_gamma", "gamma_1"),
        ("mlp_norm", "norm2"),
        ("mlp_in", "mlp.fc1"),
        ("mlp_conv", "mlp.dwconv.dwconv"),
        ("mlp_out", "mlp.fc2"),
        ("mlp_gamma", "gamma_2"),
    )

    drop_path_rate = constant_float("drop_path_rate")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        group_size: Mapping[str, Any],
        qkv_bias: bool,
        init_value: float,
        drop_path_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.drop_path_rate = drop_path_rate
        self.attention_norm = LayerNorm(dim, eps=1e-6, **place)
        self.attention = _SparseAttention(
            dim, num_heads, **group_size, qkv_bias=qkv_bias, layout=CHANNELS_LAST, **place
        )
        self.attention_gamma = nn.Parameter(torch.empty(dim, **place))
        self.mlp_norm = LayerNorm(dim, eps=1e-6, **place)
        self.mlp_in = TruncatedNormalLinear(dim, hidden_dim, **place)
        self.mlp_conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **place)
        self.mlp_out = TruncatedNormalLinear(hidden_dim, dim, **place)
        self.mlp_gamma = nn.Parameter(torch.empty(dim, **place))
        self.init_value = float(init_value)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.constant_(self.attention_gamma, self.init_value)
        nn.init.constant_(self.mlp_gamma, self.init_value)

    def reset_parameters(self) -> None:
        self._reset_own()
        reset_modules(*self.children())

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention_gamma * self.attention(self.attention_norm(x))
        x = x + drop_path(attended, self.drop_path_rate, self.training)
        hidden = self.mlp_conv(self.mlp_in(self.mlp_norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = self.mlp_gamma * self.mlp_out(F.gelu(hidden))
        return x + drop_path(out, self.drop_path_rate, self.training)


def drop_path(branch: Tensor, rate: float, is_training: bool) -> Tensor:
    """``branch`` left out for some images of a batch in training, the others scaled so that its mean stays."""
    if not is_training or rate == 0:
        return branch
    is_kept = branch.new_empty(branch.size(0), 1, 1, 1).bernoulli_(1 - rate)
    return branch * is_kept / (1 - rate)


def _spread(rates: Sequence[int], depth: int) -> list[int]:
    """The rate of each of ``depth`` blocks, spread evenly, the first rates having one more where need be."""
    each, more = divmod(depth, len(rates))
    return [rate for index, rate in enumerate(rates) for _ in range(each + (index < more))]


def _last_of_rate(rates: Sequence[int], depth: int) -> list[int]:
    """The last block of each rate."""
    number_of = _spread(range(len(rates)), depth)
    return [index for index in range(depth) if index + 1 == depth or number_of[index + 1] != number_of[index]]


def _num_pairs(attention: SparseSelfAttention2d, sides: tuple[int, int], is_global: bool) -> int:
    """Pairs of tokens that attend to each other, in a grid of ``sides`` tokens."""
    if is_global:
        steps = (1, 1)
    elif attention.stride is not None:
        steps = attention.stride
    else:
        assert attention.grid_size is not None
        steps = -(-sides[0] // attention.grid_size[0]), -(-sides[1] // attention.grid_size[1])
    # A group is a pair of a row group and a column group, so its pairs of tokens are a product as well.
    pairs = 1
    for side, step in zip(sides, steps, strict=True):
        num_groups = axis_of(GRID, side, step).num_groups
        pairs *= sum(len(range(group, side, step)) ** 2 for group in range(num_groups))
    return pairs
