"""Whole layers compiled by inductor as one graph, forward and backward: what the README promises."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import topgather as tg


class Stack(nn.Module):
    """Layers one after the other, with what a model has between them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def memories(sparse_grad: bool) -> list[nn.Module]:
    """Two of one pool, and one of a pool of its own, which is not gated."""
    pools = [tg.nn.MemoryPool(8, 16, sparse_grad=sparse_grad) for _ in range(2)]
    return [tg.nn.ProductKeyMemory(16, pools[i // 2], 2, 4, 8, gated=i < 2) for i in range(3)]


def experts(sparse_grad: bool) -> list[nn.Module]:
    """Two that share their tables, and one of its own."""
    layers = [tg.nn.PeerMemory(16, 8, 2, 4, 8, sparse_grad=sparse_grad) for _ in range(3)]
    layers[1].values_in, layers[1].values_out = layers[0].values_in, layers[0].values_out
    return layers


class Functions(nn.Module):
    """Keys convolved, in one call and in two, and attended to; lse and centroids are results too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, state = tg.key_conv(x, self.weight, state=x[:, :, :2])
        second, _ = tg.key_conv(x * 2, self.weight, state=state)
        out, lse = tg.moba_attention(x.sin(), tg.key_conv(x, self.weight), first, 4, 2, return_lse=True)
        return out * second + lse[..., None] + tg.block_centroids(x, 4).square().sum()


def tokens() -> Tensor:
    return torch.randn(2, 12, 16)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "memories and experts": (lambda: Stack(*memories(False), *experts(False)), tokens),
    "memories, sparse": (lambda: Stack(*memories(True)), tokens),
    "experts, sparse": (lambda: Stack(*experts(True)), tokens),
    "grid and window": (
        lambda: Stack(
            tg.nn.SparseSelfAttention2d(16, 2, grid_size=3, relative_position_bias=True),
            tg.nn.SparseSelfAttention2d(16, 2, window_size=3),
        ),
        lambda: torch.randn(1, 16, 7, 8),
    ),
    "block attention": (lambda: Stack(tg.nn.MobaAttention(16, 2, block_size=4, top_k=2, kernel_size=3)), tokens),
    "functions": (Functions, lambda: torch.randn(1, 2, 12, 8)),
}


def trained(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and all gradients, that of ``x`` among them."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return out.detach(), {"x": x.grad, **gradients}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiled_by_inductor(name: str) -> None:
    """As in eager mode; sparse gradients stay sparse, and marked as coalesced."""
    make, make_input = LAYERS[name]
    layer, x = make(), make_input()
    torch._dynamo.reset()
    expected, wanted = trained(layer, layer, x)
    actual, gradients = trained(torch.compile(layer, fullgraph=True), layer, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        assert gradient.is_sparse == wanted[key].is_sparse == ("sparse" in name and "values" in key)
        assert not gradient.is_sparse or gradient.is_coalesced()
        torch.testing.assert_close(gradient.to_dense(), wanted[key].to_dense(), rtol=1e-3, atol=1e-4)
