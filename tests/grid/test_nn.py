"""nn.SparseSelfAttention2d, nn.LearnableFeatureFusion and models.SparseViT, against their definitions."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import topgather as tg
from tests.common.devices import widest_dtype
from topgather.nn._one_graph import BatchNorm2d

SMALL: dict[str, Any] = {
    "depths": (1, 1, 3, 2),
    "dims": (4, 6, 16, 24),
    "head_dim": 8,
    "rates": ((4, 1), (2, 1)),
    "base_size": 64,
    "patch_sizes": (2, 2, 2, 2),
    "mlp_ratio": 2.0,
    "fusion_dim": 24,
    "init_value": 0.5,
}


def small_model(**options: Any) -> "tg.models.SparseViT":
    torch.manual_seed(0)
    model = tg.models.SparseViT(**{**SMALL, **options})
    # Statistics that are not those of a fresh layer, so that a test would see them taken from the wrong place.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


# --- attention --------------------------------------------------------------------------------------------------------


def attention_by_hand(layer: "tg.nn.SparseSelfAttention2d", x: Tensor) -> Tensor:
    """The layer's definition in float64, pair of tokens by pair of tokens where there is a relative bias."""
    x = x.double()
    if layer.layout == "channels_first":
        x = x.permute(0, 2, 3, 1)
    _, rows, columns, dim = x.shape
    weight = layer.qkv_proj.weight.double()
    bias = 0 if layer.qkv_proj.bias is None else layer.qkv_proj.bias.double()
    parts = (x @ weight.T + bias).split(dim, dim=-1)
    query, key, value = (part.unflatten(-1, (layer.num_heads, -1)).permute(0, 3, 1, 2, 4) for part in parts)
    if layer.window_size is not None:
        size = layer.window_size
        attend, step = tg.reference.window_attention, size
        most = min(rows, size[0]), min(columns, size[1])
    else:
        attend, size = tg.reference.grid_attention, layer.grid_size
        step = layer.stride or (-(-rows // size[0]), -(-columns // size[1]))
        most = -(-rows // step[0]), -(-columns // step[1])
    table, position_bias = layer.relative_position_table, None
    if table is not None:
        places = [(i, j) for i in range(most[0]) for j in range(most[1])]
        position_bias = torch.stack(
            [
                torch.stack([table.double()[:, ki - qi + size[0] - 1, kj - qj + size[1] - 1] for ki, kj in places], -1)
                for qi, qj in places
            ],
            dim=1,
        )
    out = attend(query, key, value, step, position_bias).permute(0, 2, 3, 1, 4).flatten(3)
    out = out @ layer.out_proj.weight.double().T
    if layer.out_proj.bias is not None:
        out = out + layer.out_proj.bias.double()
    return out.permute(0, 3, 1, 2) if layer.layout == "channels_first" else out


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (1, 11), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"grid_size": 3},
        {"grid_size": (2, 3), "relative_position_bias": True, "layout": "channels_last"},
        {"stride": (2, 1), "qkv_bias": False, "layout": "channels_last"},
        {"stride": 1, "bias": False},
        {"window_size": (3, 4), "relative_position_bias": True},
    ],
    ids=str,
)
def test_attention_equals_its_definition(
    options: dict[str, Any], shape: tuple[int, int], device: torch.device, device_kind: str
) -> None:
    dtype = widest_dtype(device_kind)
    layer = tg.nn.SparseSelfAttention2d(16, 2, **options, device=device, dtype=dtype)
    is_first = layer.layout == "channels_first"
    x = torch.randn(2, 16, *shape) if is_first else torch.randn(2, *shape, 16)
    x = x.to(device, dtype).requires_grad_()
    out, expected = layer(x), attention_by_hand(layer, x).to(dtype)
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    for left, right in zip(
        torch.autograd.grad((out * direction).sum(), wanted),
        torch.autograd.grad((expected * direction).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_layouts_agree() -> None:
    first = tg.nn.SparseSelfAttention2d(16, 2, grid_size=2)
    last = tg.nn.SparseSelfAttention2d(16, 2, grid_size=2, layout="channels_last")
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 16, 5, 4)
    assert torch.equal(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(first(x.to(memory_format=torch.channels_last)), first(x))


def test_the_op_reads_the_projection_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values are views of one projection, and no one copies them or the output."""
    seen: list[tuple[Tensor, ...]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = tg.grid_attention(query, key, value, **options)
        seen.append((query, key, value, out))
        return out

    monkeypatch.setattr("topgather.nn.grid.grid_attention", spy)
    layer = tg.nn.SparseSelfAttention2d(16, 2, grid_size=2)
    layer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args))
    layer(torch.randn(2, 16, 5, 4))
    (query, key, value, out), (joined,) = seen
    storages = {part.untyped_storage().data_ptr() for part in (query, key, value)}
    assert len(storages) == 1 and query.stride() == key.stride() == value.stride()
    assert [part.storage_offset() for part in (query, key, value)] == [0, 16, 32]
    assert joined.data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((16, 3, 4), ValueError, "num_heads must divide dim, 16, got 3"),
        ((0, 1, 4), ValueError, "dim must be between 1"),
        ((16, 2.0, 4), TypeError, "num_heads must be an int"),
        ((16, 2), ValueError, "exactly one of grid_size, stride, window_size must be given, got none"),
        ((16, 2, 4, 4), ValueError, "got grid_size, stride"),
        ((16, 2, 0), ValueError, "grid_size must be between 1"),
        ((16, 2, (1, 2, 3)), ValueError, "grid_size must be an int or a pair"),
        ((16, 2, None, 4, None, True, True, True), ValueError, "relative_position_bias needs grid_size or window_size"),
        ((16, 2, 4, None, None, 1), TypeError, "qkv_bias must be a bool"),
        ((16, 2, 4, None, None, True, True, False, "nchw"), ValueError, "layout must be one of channels_first"),
        ((16, 2, 4, None, None, True, True, False, 1), TypeError, "layout must be a str"),
    ],
)
def test_bad_attention(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tg.nn.SparseSelfAttention2d(*arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("option", ["grid_size", "window_size"])
def test_a_table_that_fits_no_memory_is_refused_in_words(option: str, device: str) -> None:
    options: dict[str, Any] = {option: (2**31 - 1, 2**31 - 1), "device": device}
    with pytest.raises(ValueError, match=rf"{option} must be such that.*\(2147483647, 2147483647\) makes it"):
        tg.nn.SparseSelfAttention2d(16, 2, relative_position_bias=True, **options)
    tg.nn.SparseSelfAttention2d(16, 2, **options)


def test_bad_images() -> None:
    layer = tg.nn.SparseSelfAttention2d(16, 2, grid_size=2)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"x must have 4 dimensions \[batch, dim, rows, columns\]"):
        layer(torch.randn(16, 4, 4))
    with pytest.raises(ValueError, match="size 16 in dimension 1"):
        layer(torch.randn(1, 4, 4, 16))


# --- fusion -----------------------------------------------------------------------------------------------------------


def sample_by_hand(x: Tensor, num_rows: int, num_columns: int, sides: tuple[int, int]) -> Tensor:
    """``x [B, C, H, W]`` at ``num_rows x num_columns`` places of an image of ``sides`` pixels, bilinearly."""
    for dim, length, side in ((2, num_rows, sides[0]), (3, num_columns, sides[1])):
        place = (torch.arange(length, dtype=torch.float64, device=x.device) + 0.5) * x.size(dim) / side - 0.5
        place = place.clamp(min=0)
        below = place.floor().long().clamp(max=x.size(dim) - 1)
        above = (below + 1).clamp(max=x.size(dim) - 1)
        share = (place - below).view(-1, 1) if dim == 2 else place - below
        x = x.index_select(dim, below) * (1 - share) + x.index_select(dim, above) * share
    return x


def fusion_by_hand(layer: "tg.nn.LearnableFeatureFusion", maps: list[Tensor], sides: list[tuple[int, int]]) -> Tensor:
    """The definition in float64; ``sides`` are those of the image that each map covers."""
    rows, columns = (max(one.size(dim) for one in maps) for dim in (2, 3))
    total = torch.zeros(())
    for one, projection, gamma, reach in zip(maps, layer.projections, layer.gammas, sides, strict=True):
        one = one.double()
        if isinstance(projection, nn.Conv2d):
            weight, bias = projection.weight.double(), projection.bias.double()
            one = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], one) + bias[:, None, None]
        total = total + gamma.double()[:, None, None] * sample_by_hand(one, rows, columns, reach)
    centred = total - total.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    normed = normed * layer.norm.weight.double()[:, None, None] + layer.norm.bias.double()[:, None, None]
    weight, bias = layer.out_proj.weight.double(), layer.out_proj.bias.double()
    return torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], normed) + bias[:, None, None]


@pytest.mark.parametrize(
    ("sizes", "sides"),
    [
        ([(6, 4), (3, 2), (1, 1)], [(6, 4), (6, 4), (6, 4)]),
        ([(5, 7), (3, 4), (2, 2)], [(5, 7), (6, 8), (6, 8)]),  # halves rounded up: cropped
        ([(2, 3), (7, 5), (6, 5)], [(8, 6), (7, 5), (7, 5)]),  # in any order; one that is no whole part is resized
    ],
    ids=str,
)
def test_fusion_equals_its_definition(sizes: list[tuple[int, int]], sides: list[tuple[int, int]]) -> None:
    layer = tg.nn.LearnableFeatureFusion([3, 8, 5], 8, 2, init_value=0.3, dtype=torch.float64)
    nn.init.normal_(layer.gammas)
    maps = [
        torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
        for channels, size in zip([3, 8, 5], sizes, strict=True)
    ]
    assert isinstance(layer.projections[1], nn.Identity)
    out, expected = layer(maps), fusion_by_hand(layer, maps, sides)
    torch.testing.assert_close(out, expected)
    wanted = [*maps, *layer.parameters()]
    for left, right in zip(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_the_issues_fusion() -> None:
    layer = tg.nn.LearnableFeatureFusion(in_channels=[320] * 4 + [512] * 2, dim=512, out_channels=1)
    assert layer.gammas.shape == (6, 512) and bool((layer.gammas == 1e-6).all())
    maps = [torch.randn(1, channels, 4, 4) for channels in [320] * 4] + [torch.randn(1, 512, 2, 2)] * 2
    assert layer(maps).shape == (1, 1, 4, 4)


def test_bad_fusion() -> None:
    for arguments, error, message in [
        (((), 8), ValueError, "in_channels must have at least 1 entries"),
        ((8, 8), TypeError, "in_channels must be a list or tuple of ints"),
        (([8, 0], 8), ValueError, "in_channels[1] must be between 1"),
        (([8], 8, 1, "1"), TypeError, "init_value must be a float"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            tg.nn.LearnableFeatureFusion(*arguments)
    layer = tg.nn.LearnableFeatureFusion([4, 8], 8)
    maps = [torch.randn(2, 4, 3, 3), torch.randn(2, 8, 2, 2)]
    for wrong, error, message in [
        (torch.randn(2, 2, 4, 3), TypeError, "maps must be a list or tuple"),
        (maps[:1], ValueError, "maps must be 2 tensors, got 1"),
        ([maps[0], None], TypeError, "maps[1] must be a torch.Tensor"),
        ([maps[0], maps[1][0]], ValueError, "maps[1] must have 4 dimensions"),
        ([maps[0], maps[1][:1]], ValueError, "maps[1] must have size 2 in dimension 0"),
        (maps[::-1], ValueError, "maps[0] must have size 4 in dimension 1"),
        ([maps[0], maps[1][:, :, :0]], ValueError, "maps[1] must have at least one row"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            layer(wrong)


# --- the model --------------------------------------------------------------------------------------------------------


def published_shapes(
    depths: tuple[int, ...], dims: tuple[int, ...], num_rates: tuple[int, int], patches: tuple[int, ...], ratio: float
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, those of its unused parameters included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True), 1):
        in_channels = (3, *dims)[stage - 1]
        layer(f"encoder_net.patch_embed{stage}.proj", dim, in_channels, patches[stage - 1], patches[stage - 1])
        layer(f"encoder_net.patch_embed{stage}.norm", dim)
        layer(f"encoder_net.norm{stage}", dim)
        hidden = int(ratio * dim)
        for index in range(depth):
            name = f"encoder_net.blocks{stage}.{index}"
            layer(f"{name}.pos_embed", dim, 1, 3, 3)
            layer(f"{name}.norm1", dim)
            layer(f"{name}.norm2", dim)
            if stage <= 2:
                for norm in ("norm1", "norm2"):
                    shapes[f"{name}.{norm}.running_mean"] = shapes[f"{name}.{norm}.running_var"] = (dim,)
                    shapes[f"{name}.{norm}.num_batches_tracked"] = ()
                layer(f"{name}.conv1", dim, dim, 1, 1)
                layer(f"{name}.conv2", dim, dim, 1, 1)
                layer(f"{name}.attn", dim, 1, 5, 5)
                layer(f"{name}.mlp.fc1", hidden, dim, 1, 1)
                layer(f"{name}.mlp.fc2", dim, hidden, 1, 1)
            else:
                shapes[f"{name}.gamma_1"] = shapes[f"{name}.gamma_2"] = (dim,)
                layer(f"{name}.attn.qkv", 3 * dim, dim)
                layer(f"{name}.attn.proj", dim, dim)
                layer(f"{name}.mlp.fc1", hidden, dim)
                layer(f"{name}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
                layer(f"{name}.mlp.fc2", dim, hidden)
    for index in range(sum(num_rates)):
        shapes[f"lmu.gamma{index + 1}"] = (dims[3],)
        if index < num_rates[0]:
            layer(f"lmu.conv_layer{index + 1}", dims[3], dims[2], 1, 1)
    layer("lmu.norm", dims[3])
    layer("lmu.conv_last", 1, dims[3], 1, 1)
    return shapes


def published_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(shape, dtype=torch.float64)
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            state[name] = torch.randn(shape, dtype=torch.float64) / fan_in**0.5
    return state


SMALL_SHAPES = published_shapes(SMALL["depths"], SMALL["dims"], (2, 2), SMALL["patch_sizes"], SMALL["mlp_ratio"])
GRID_SIZES = {3: [2, 2, 8], 4: [2, 4]}
"""Tokens on a side of the groups of each block of SMALL: 64 / 8 tokens at rates 4, 4, 1 and 64 / 16 at 2, 1."""


def published_forward(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """The released model's definition, by its names, in float64: evaluation, image sides that patches divide."""

    def part(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, *part(name), **options)

    def norm(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        weight, bias = part(name)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias

    def batch_norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        weight, bias = part(name)
        return ((x.movedim(1, -1) - mean) / (var + 1e-5).sqrt() * weight + bias).movedim(-1, 1)

    def linear(name: str, x: Tensor) -> Tensor:
        weight, bias = part(name)
        return x @ weight.T + bias

    maps: list[Tensor] = []
    x = image.double()
    for stage in range(1, 5):
        embed = f"encoder_net.patch_embed{stage}"
        x = norm(f"{embed}.norm", conv(f"{embed}.proj", x, stride=2).movedim(1, -1), eps=1e-5).movedim(-1, 1)
        for index in range(SMALL["depths"][stage - 1]):
            name = f"encoder_net.blocks{stage}.{index}"
            if stage <= 2:
                dim = x.size(1)
                x = x + conv(f"{name}.pos_embed", x, padding=1, groups=dim)
                mixed = conv(f"{name}.conv1", batch_norm(f"{name}.norm1", x))
                x = x + conv(f"{name}.conv2", conv(f"{name}.attn", mixed, padding=2, groups=dim))
                hidden = F.gelu(conv(f"{name}.mlp.fc1", batch_norm(f"{name}.norm2", x)))
                x = x + conv(f"{name}.mlp.fc2", hidden)
                continue
            tokens = x.movedim(1, -1)
            rows, columns, dim = tokens.shape[1:]
            qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", tokens)).unflatten(-1, (3, dim // 8, 8))
            query, key, value = qkv.permute(3, 0, 4, 1, 2, 5)
            size = GRID_SIZES[stage][index]
            stride = (-(-rows // size), -(-columns // size))
            out = tg.reference.grid_attention(query, key, value, stride).permute(0, 2, 3, 1, 4).flatten(3)
            tokens = tokens + state[f"{name}.gamma_1"] * linear(f"{name}.attn.proj", out)
            hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens)).movedim(-1, 1)
            hidden = conv(f"{name}.mlp.dwconv.dwconv", hidden, padding=1, groups=hidden.size(1)).movedim(1, -1)
            tokens = tokens + state[f"{name}.gamma_2"] * linear(f"{name}.mlp.fc2", F.gelu(hidden))
            x = tokens.movedim(-1, 1)
            if (stage, index) in [(3, 1), (4, 0)]:
                maps.append(x)
            elif (stage, index) in [(3, 2), (4, 1)]:
                maps.append(norm(f"encoder_net.norm{stage}", tokens).movedim(-1, 1))
    rows, columns = maps[0].shape[2:]
    total = torch.zeros((), dtype=torch.float64)
    for number, one in enumerate(maps, 1):
        if number <= 2:
            one = conv(f"lmu.conv_layer{number}", one)
        one = sample_by_hand(one, rows, columns, (rows, columns))
        total = total + state[f"lmu.gamma{number}"][:, None, None] * one
    mask = conv("lmu.conv_last", norm("lmu.norm", total.movedim(1, -1)).movedim(-1, 1))
    return sample_by_hand(mask, *image.shape[2:], image.shape[2:])


@pytest.mark.parametrize("size", [(64, 64), (96, 32)], ids=str)
def test_model_equals_the_published_one(size: tuple[int, int]) -> None:
    state = published_state(SMALL_SHAPES)
    model = small_model(dtype=torch.float64).eval()
    model.load_reference_state_dict({"epoch": torch.ones(1)} | {f"model.{k}": v for k, v in state.items()}, "model.")
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(image), published_forward(state, image))


def test_every_published_name_loads() -> None:
    """At the released sizes: each parameter is given a value, by names and shapes of the released checkpoint."""
    shapes = published_shapes((5, 8, 20, 7), (64, 128, 320, 512), (4, 2), (4, 2, 2, 2), 4.0)
    with torch.device("meta"):
        model = tg.models.SparseViT()
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        model.load_reference_state_dict(state)
    used = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    is_unused = re.compile(r"encoder_net\.(norm[12]|blocks[34]\.\d+\.pos_embed)\.")
    num_used = sum(number for name, number in used.items() if not is_unused.match(name))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == num_used
    assert model.fusion.in_channels == (320,) * 4 + (512,) * 2
    sizes = [[block.attention.grid_size for block in stage] for stage in model.stages[2:]]
    assert sizes == [[(4, 4)] * 5 + [(8, 8)] * 5 + [(16, 16)] * 5 + [(32, 32)] * 5, [(8, 8)] * 4 + [(16, 16)] * 3]


def test_published_parameters_that_do_not_fit() -> None:
    state = published_state(SMALL_SHAPES)
    model = small_model(dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    for name in ("lmu.gamma3", "encoder_net.blocks3.1.attn.qkv.weight", "encoder_net.norm4.bias"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=f"missing {re.escape(name)}"):
            model.load_reference_state_dict(rest)
    with pytest.raises(ValueError, match=r"unknown lmu\.gamma5"):
        model.load_reference_state_dict(state | {"lmu.gamma5": torch.ones(24)})
    with pytest.raises(ValueError, match=r"must have shape \(24,\), got \(23,\)"):
        model.load_reference_state_dict(state | {"lmu.gamma1": torch.ones(23)})
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        model.load_reference_state_dict([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    is_needed = re.compile(r".*num_batches_tracked|.*blocks[34]\.\d\.pos_embed.*|encoder_net\.norm[12].*")
    model.load_reference_state_dict({name: value for name, value in state.items() if not is_needed.match(name)})


@pytest.mark.parametrize("size", [(1, 1), (17, 40), (37, 3), (64, 65)], ids=str)
@pytest.mark.parametrize("base_size", [64, None])
def test_any_image_size(base_size: int | None, size: tuple[int, int]) -> None:
    model = small_model(base_size=base_size, dtype=torch.float64).eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    out = model(image)
    assert out.shape == (2, 1, *size) and bool(out.isfinite().all())
    torch.testing.assert_close(model(image[1:]), out[1:])
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_maps_of_an_odd_size() -> None:
    maps = small_model().eval().features(torch.randn(1, 3, 65, 40))
    assert [tuple(one.shape) for one in maps] == [(1, 16, 9, 5)] * 2 + [(1, 24, 5, 3)] * 2


def test_a_token_stays_where_its_pixels_are() -> None:
    """Where patches reach over the edge, the rest of the mask is that of the image with those pixels black."""
    model = small_model(base_size=None, rates=((1,), (1,)), dtype=torch.float64).eval()
    image = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    maps = [torch.randn_like(one) for one in model.features(image)]
    logits = model.fusion(maps)
    enlarged = sample_by_hand(logits, 24, 24, (24, 24))[:, :, :20, :20]
    model.features = lambda x: maps
    torch.testing.assert_close(model(image), enlarged)


def test_attention_macs() -> None:
    """The figures of the paper's table, to the digits given, and a count by hand."""
    with torch.device("meta"):
        model = tg.models.SparseViT()
    figures = {(512, False): 4.7, (512, True): 13.9, (1024, False): 18.9}
    for (size, is_global), expected in figures.items():
        assert round(model.attention_macs(size, is_global) / 1e9, 1) == expected
    assert round(model.attention_macs((1024, 1024), is_global=True) / 1e9) == 222
    assert round(tg.models.SparseViT(base_size=None, device="meta").attention_macs(512) / 1e9, 1) == 4.7


@pytest.mark.parametrize("size", [(37, 50), (64, 64), (1, 9)], ids=str)
@pytest.mark.parametrize("base_size", [64, None])
def test_attention_macs_by_group(base_size: int | None, size: tuple[int, int]) -> None:
    model = small_model(base_size=base_size)
    expected = {False: 0, True: 0}
    for patch, stage, dim in ((8, 2, 16), (16, 3, 24)):
        rows, columns = (-(-side // patch) for side in size)
        for block in model.stages[stage]:
            layer = block.attention
            stride = layer.stride or (-(-rows // layer.grid_size[0]), -(-columns // layer.grid_size[1]))
            groups = tg.reference.grid.grid_groups(rows, columns, stride)
            expected[False] += sum(2 * dim * (len(row) * len(column)) ** 2 for row, column in groups)
            expected[True] += 2 * dim * (rows * columns) ** 2
    assert model.attention_macs(size) == expected[False]
    assert model.attention_macs(size, is_global=True) == expected[True]


def test_drop_path() -> None:
    """Branches are left out for whole images in training, never in evaluation; the first block keeps them."""
    model = small_model(drop_path_rate=0.9)
    rates = [block.drop_path_rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.15 * index for index in range(7)])
    x = torch.randn(64, 3, 16, 16)
    assert torch.equal(model.eval()(x), model(x))
    block = model.stages[3][1].train()
    assert block.drop_path_rate == pytest.approx(0.9)
    tokens = torch.randn(64, 3, 3, 24)
    is_same = (block(tokens) == tokens).flatten(1).all(dim=1)
    assert 30 <= int(is_same.sum()) < 64
    nn.init.zeros_(block.mlp_gamma)
    added = block(tokens) - tokens
    whole = block.eval()(tokens) - tokens
    is_kept = added.flatten(1).abs().sum(dim=1) > 0
    torch.testing.assert_close(added[is_kept], 10 * whole[is_kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depths": (1, 1, 1)}, ValueError, "depths must have 4 entries, got 3"),
        ({"depths": (0, 1, 3, 2)}, ValueError, "depths[0] must be between 1"),
        ({"depths": (1, 1, 1, 2)}, ValueError, "depths must be at least the number of rates"),
        ({"dims": (4, 6, 16, 20)}, ValueError, "head_dim must divide the last two dims"),
        ({"rates": ((1,),)}, ValueError, "rates must be those of the third and of the fourth stage"),
        ({"rates": ((1,), ())}, ValueError, "rates[1] must have at least 1 entries"),
        ({"rates": ((0,), (1,))}, ValueError, "rates[0][0] must be between 1"),
        ({"base_size": 48}, ValueError, "base_size must be a multiple of 32, stage 3 at rate 4"),
        ({"base_size": "64"}, TypeError, "base_size must be an int"),
        ({"patch_sizes": (2, 2)}, ValueError, "patch_sizes must have 4 entries"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio must be above 0"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate must be at least 0 and below 1"),
        ({"drop_path_rate": None}, TypeError, "drop_path_rate must be a float"),
        ({"qkv_bias": 1}, TypeError, "qkv_bias must be a bool"),
        ({"out_channels": 0}, ValueError, "out_channels must be between 1"),
    ],
)
def test_bad_model(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        small_model(**options)


def test_bad_model_input() -> None:
    model = small_model()
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        model(None)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        model(torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match="size 3 in dimension 1"):
        model(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least one row and column"):
        model(torch.randn(1, 3, 0, 8))
    with pytest.raises(ValueError, match="image_size must be between 1"):
        model.attention_macs(0)


# --- how torch uses layers --------------------------------------------------------------------------------------------


def attention() -> nn.Module:
    torch.manual_seed(0)
    return tg.nn.SparseSelfAttention2d(3, 1, grid_size=4, relative_position_bias=True)


def tiny_model() -> nn.Module:
    """A block of each kind, so that it compiles soon; the same in training every time."""
    return small_model(depths=(1, 1, 2, 1), rates=((4, 1), (2,)), drop_path_rate=0.0)


MAKERS = pytest.mark.parametrize("make", [attention, tiny_model])
Make = Callable[[], nn.Module]


@MAKERS
def test_compile(make: Make) -> None:
    torch._dynamo.reset()
    module = make().double().eval()
    x = torch.randn(1, 3, 20, 17, dtype=torch.float64, requires_grad=True)
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    expected = module(x)
    torch.testing.assert_close(out, expected)
    wanted = [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


@MAKERS
def test_autocast(make: Make) -> None:
    module = make()
    x = torch.randn(2, 3, 32, 24, requires_grad=True)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in module.parameters())


@MAKERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(make: Make, dtype: torch.dtype) -> None:
    out = make().to(dtype)(torch.randn(2, 3, 16, 16, dtype=dtype))
    assert out.dtype == dtype and bool(out.isfinite().all())


@MAKERS
def test_copies_and_state(make: Make) -> None:
    module = make().eval()
    x = torch.randn(2, 3, 9, 10)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    other = make().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_reprs() -> None:
    text = repr(small_model())
    assert "rates=((4, 1), (2, 1)), base_size=(64, 64)" in text
    assert "dim=16, num_heads=2, grid_size=(2, 2), layout=channels_last" in text
    assert "in_channels=(16, 16, 24, 24), dim=24, out_channels=1" in text


def test_it_learns() -> None:
    """A bright square is found in a few steps."""
    model = small_model(drop_path_rate=0.0)
    images, masks = torch.randn(4, 3, 32, 32) * 0.1, torch.zeros(4, 1, 32, 32)
    for index, (row, column) in enumerate([(0, 0), (16, 0), (0, 16), (16, 16)]):
        images[index, :, row : row + 16, column : column + 16] += 1
        masks[index, :, row : row + 16, column : column + 16] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_batch_norm_without_momentum() -> None:
    """A momentum of None, which ``torch.optim.swa_utils.update_bn`` sets for a while, is a cumulative average."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_mean, theirs.running_mean) and ours.momentum is None
    ours.momentum = 0.3
    update_bn([torch.randn(2, 3, 4, 4)], ours)
    assert ours.momentum == 0.3 and "eps=1e-05, momentum=0.3" in repr(ours)
