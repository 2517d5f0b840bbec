"""Block attention under torch.func: vmap, grad, jvp and what they compose to; dual numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.testing import assert_close

import topgather as tg

Function = Callable[[Tensor], Tensor]


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


KEY, TANGENT = _random(1, 2, 11, 3), _random(1, 2, 11, 3).flip(2)


def centroids(key: Tensor) -> Tensor:
    return tg.block_centroids(key, 4)


def plain_centroids(key: Tensor) -> Tensor:
    return torch.stack([block.mean(2) for block in key.split(4, dim=2)], dim=2)


def loss_of(function: Function) -> Function:
    return lambda key: function(key.sin()).square().sum()


TRANSFORMED: dict[str, Callable[[Function], object]] = {
    "jvp": lambda f: jvp(f, (KEY,), (TANGENT,)),
    "jacfwd": lambda f: jacfwd(f)(KEY),
    "jacrev": lambda f: jacrev(f)(KEY),
    "hessian": lambda f: hessian(loss_of(f))(KEY),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(loss_of(f)))(KEY),
    "jacrev of jacrev": lambda f: jacrev(jacrev(loss_of(f)))(KEY),
    "linearize": lambda f: linearize(loss_of(f), KEY)[1](TANGENT),
    "vmap of jvp": lambda f: vmap(lambda k, t: jvp(loss_of(f), (k,), (t,)), in_dims=1)(KEY[None], TANGENT[None]),
    "jvp of vmap": lambda f: jvp(vmap(f, 1, 1), (KEY[None].contiguous(),), (TANGENT[None].contiguous(),)),
    "jvp of grad": lambda f: jvp(grad(loss_of(f)), (KEY,), (TANGENT,)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_centroids_under_transforms(name: str) -> None:
    assert_close(TRANSFORMED[name](centroids), TRANSFORMED[name](plain_centroids))


def test_centroids_of_dual_numbers() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(KEY.clone().requires_grad_(), TANGENT)
        out = forward_ad.unpack_dual(centroids(dual))
        assert out.tangent is not None
        assert_close(out.tangent, plain_centroids(TANGENT))
    key = KEY.clone().requires_grad_()
    assert gradcheck(centroids, (key,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(lambda key: centroids(key).sin(), (key,))


QUERY = _random(3, 1, 4, 11, 3)
CU_SEQLENS = torch.tensor([0, 4, 11])


def attend(query: Tensor) -> tuple[Tensor, ...]:
    """Dense, with an lse."""
    return tg.moba_attention(query, KEY, KEY, 4, 2, return_lse=True)


def attend_varlen(query: Tensor) -> tuple[Tensor, ...]:
    """The same numbers as packed sequences, which have no batch to fold into."""
    packed, key = query[0].transpose(0, 1), KEY[0].transpose(0, 1)
    return tg.moba_attention_varlen(packed, key, key, CU_SEQLENS, CU_SEQLENS, 7, 7, 4, 2, return_lse=True)


def choose(query: Tensor) -> tuple[Tensor, ...]:
    return (tg.moba_route(query, KEY, 4, 2).block_indices,)


@pytest.mark.parametrize("function", [attend, attend_varlen, choose])
def test_vmap_is_a_loop(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    for actual, *expected in zip(vmap(function)(QUERY), *map(function, QUERY), strict=True):
        assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("function", [attend, attend_varlen])
def test_gradients_of_each_sample(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    def loss(query: Tensor) -> Tensor:
        out, lse = function(query)
        return out.square().sum() + lse.sin().sum()

    query = QUERY.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(loss, query), torch.zeros(())), query)
    assert_close(vmap(grad(loss))(QUERY), expected)
    assert_close(torch.stack([grad(loss)(sample) for sample in QUERY]), expected)


def test_choices_have_no_tangent() -> None:
    (chosen,) = choose(QUERY[0])
    actual, query = jvp(lambda query: (choose(query)[0], query), (QUERY[0],), (QUERY[1],))[0]
    assert torch.equal(actual, chosen) and torch.equal(query, QUERY[0])


def test_attention_has_no_forward_mode() -> None:
    for function in (attend, attend_varlen):
        with pytest.raises(NotImplementedError, match=r"moba_attention has no derivative in forward mode.*reverse"):
            jvp(function, (QUERY[0],), (QUERY[1],))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
            function(forward_ad.make_dual(QUERY[0], QUERY[1]))


def test_attention_has_no_double_backward() -> None:
    query = QUERY[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attend(query)[0].square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="moba_attention has no double backward"):
        gradient.sum().backward()
