"""nn.MobaAttention: the layer is its projections around the op."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import topgather as tg
from tests.common.devices import widest_dtype


def heads(projected: Tensor, num_heads: int) -> Tensor:
    return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def by_hand(layer: "tg.nn.MobaAttention", x: Tensor) -> Tensor:
    """The layer's definition, with dense SDPA in place of the op."""
    query = heads(layer.query_proj(x), layer.num_heads)
    key = heads(layer.key_proj(x), layer.num_kv_heads)
    value = heads(layer.value_proj(x), layer.num_kv_heads)
    out = scaled_dot_product_attention(query, key, value, is_causal=layer.is_causal, enable_gqa=True)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_dense_attention_where_all_blocks_are_chosen(
    bias: bool,
    head_dim: int | None,
    num_kv_heads: int | None,
    is_causal: bool,
    device: torch.device,
    device_kind: str,
) -> None:
    dtype = widest_dtype(device_kind)
    layer = tg.nn.MobaAttention(
        24,
        4,
        num_kv_heads,
        head_dim,
        block_size=8,
        top_k=5,
        bias=bias,
        is_causal=is_causal,
        device=device,
        dtype=dtype,
    )
    x = torch.randn(2, 33, 24, dtype=dtype, device=device, requires_grad=True)
    out, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(out, expected)
    wanted = [x, *layer.parameters()]
    for left, right in zip(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_fewer_blocks_go_through_the_op(device: torch.device) -> None:
    layer = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, device=device)
    x = torch.randn(2, 60, 24, device=device)
    query, key, value = (
        heads(proj(x), num) for proj, num in ((layer.query_proj, 4), (layer.key_proj, 2), (layer.value_proj, 2))
    )
    out = tg.moba_attention(query, key, value, block_size=8, top_k=2)
    torch.testing.assert_close(layer(x), layer.out_proj(out.transpose(1, 2).flatten(2)))
    assert not torch.allclose(layer(x), by_hand(layer, x), atol=1e-3)


def test_position_embedding_acts_before_the_blocks_are_chosen(device: torch.device) -> None:
    class Negate(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            assert query.shape == (1, 4, 50, 6) and key.shape == (1, 2, 50, 6)
            return -query, key

    plain = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, device=device)
    turned = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, position_embedding=Negate(), device=device)
    turned.load_state_dict(plain.state_dict())
    x = torch.randn(1, 50, 24, device=device)
    before = turned(x)
    assert not torch.allclose(before, plain(x), atol=1e-3)
    with torch.no_grad():
        plain.query_proj.weight.neg_()
    torch.testing.assert_close(before, plain(x))
    assert any(isinstance(module, Negate) for module in turned.modules())


def test_key_convolution_acts_before_the_blocks_are_chosen(device: torch.device) -> None:
    """After the position embedding, on the keys alone; what it makes is routed by and attended to."""

    def shift(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key + 0.5

    layer = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, position_embedding=shift, kernel_size=5, device=device)
    with torch.no_grad():
        layer.key_conv_weight.normal_()
    x = torch.randn(2, 60, 24, device=device)
    query, key, value = (
        heads(proj(x), num) for proj, num in ((layer.query_proj, 4), (layer.key_proj, 2), (layer.value_proj, 2))
    )
    convolved = tg.key_conv(key + 0.5, layer.key_conv_weight)
    out = tg.moba_attention(query, convolved, value, block_size=8, top_k=2)
    torch.testing.assert_close(layer(x), layer.out_proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kernel_size", [2, 3, 8])
def test_a_fresh_key_convolution_changes_nothing_and_learns(kernel_size: int, device: torch.device) -> None:
    layer = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, kernel_size=kernel_size, device=device)
    assert layer.key_conv_weight.shape == (2, 6, kernel_size)
    plain = tg.nn.MobaAttention(24, 4, 2, block_size=8, top_k=2, device=device)
    missing = plain.load_state_dict(layer.state_dict(), strict=False)
    assert missing.unexpected_keys == ["key_conv_weight"]
    x = torch.randn(2, 60, 24, device=device)
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.key_conv_weight.grad is not None and (layer.key_conv_weight.grad != 0).all()
    assert f"kernel_size={kernel_size}" in repr(layer) and "kernel_size" not in repr(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device, dtype=dtype)
    x = torch.randn(1, 40, 16, device=device, dtype=dtype)
    assert layer(x).dtype == dtype and layer(x).shape == x.shape
    converted = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device).to(dtype)
    assert converted(x).dtype == dtype


def test_autocast(device: torch.device) -> None:
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device)
    x = torch.randn(1, 40, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (2, 0), (1, 1), (3, 7)])
def test_empty_and_short(batch: int, length: int, device: torch.device) -> None:
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device)
    x = torch.randn(batch, length, 16, device=device, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()


def test_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device)
    x = torch.randn(2, 40, 16, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_copies_and_state(device: torch.device) -> None:
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device)
    x = torch.randn(1, 40, 16, device=device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    other = tg.nn.MobaAttention(16, 2, block_size=8, top_k=2, device=device)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert "block_size=8" in repr(layer) and "top_k=2" in repr(layer)


def test_it_learns(device: torch.device) -> None:
    """A few steps lower a loss that only attention to an earlier token can lower."""
    layer = tg.nn.MobaAttention(16, 2, block_size=4, top_k=3, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    x = torch.randn(4, 32, 16, device=device)
    target = torch.roll(x, 1, dims=1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target)[:, 1:].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "exception", "named"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"dim": 16.0}, TypeError, "dim"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": True}, TypeError, "num_heads"),
        ({"num_heads": 3}, ValueError, "num_heads"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"head_dim": 0}, ValueError, "head_dim"),
        ({"head_dim": "8"}, TypeError, "head_dim"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": 8.0}, TypeError, "block_size"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": None}, TypeError, "top_k"),
        ({"bias": 1}, TypeError, "bias"),
        ({"is_causal": None}, TypeError, "is_causal"),
        ({"position_embedding": 3}, TypeError, "position_embedding"),
        ({"kernel_size": 1}, ValueError, "kernel_size"),
        ({"kernel_size": 9}, ValueError, "kernel_size"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size"),
        ({"kernel_size": True}, TypeError, "kernel_size"),
    ],
    ids=str,
)
def test_bad_options_are_refused(arguments: dict[str, Any], exception: type[Exception], named: str) -> None:
    with pytest.raises(exception, match=rf"\b{named}\b"):
        tg.nn.MobaAttention(**{"dim": 16, "num_heads": 4, **arguments})


@pytest.mark.parametrize(
    ("x", "exception"),
    [
        (torch.zeros(2, 16), ValueError),
        (torch.zeros(2, 3, 4, 16), ValueError),
        (torch.zeros(2, 3, 15), ValueError),
        ([[0.0]], TypeError),
    ],
    ids=["2d", "4d", "channels", "list"],
)
def test_bad_x_is_refused(x: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match=r"\bx\b"):
        tg.nn.MobaAttention(16, 2, block_size=8, top_k=2)(x)
