"""Caps of scores and attention sinks, in training and in decoding, against the oracle and by their own rules."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import assert_bitwise_equal, random_tensor
from tests.common.tolerances import accumulation_dtype
from topgather import reference

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Errors against the oracle, of a result's largest magnitude. Scores reach 20: an error of a score in its last bits is
# one of a weight, ten times as large; 16-bit results and gradients are rounded, and so are weights on matrix units.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "both": {"softcap": 1.5, "has_sinks": True},
}
HEADS, KV_HEADS, TOKENS, DIM, BLOCK, TOP_K = 4, 2, 45, 16, 8, 3


def make(dtype: torch.dtype, device: torch.device, has_sinks: bool, batch: int = 2) -> list[Tensor]:
    """Query (three times as large, for scores worth capping), key, value, and sinks where there are any."""
    shapes = ((batch, HEADS, TOKENS, DIM), *((batch, KV_HEADS, TOKENS, DIM),) * 2)
    tensors = [random_tensor(shape, dtype, device, seed) for seed, shape in enumerate(shapes)]
    tensors[0] = tensors[0] * 3
    if has_sinks:
        tensors.append(random_tensor((HEADS,), accumulation_dtype(dtype), device, 7) + 1)
    return [tensor.detach().requires_grad_() for tensor in tensors]


def sinks_of(tensors: list[Tensor]) -> Tensor | None:
    return tensors[3] if len(tensors) > 3 else None


def assert_near(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double().cpu() - expected.cpu()).abs().max()
    assert error <= BOUNDS[dtype] * expected.abs().max().clamp(min=1), f"{name}: error {error:.2e}"


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_reference(dtype: torch.dtype, options: dict[str, Any], is_causal: bool, device: torch.device) -> None:
    """Results and gradients of everything, of a loss on both results."""
    softcap, has_sinks = options.get("softcap"), options.get("has_sinks", False)
    tensors = make(dtype, device, has_sinks)
    routing = tg.moba_route(tensors[0], tensors[1], BLOCK, TOP_K, is_causal)
    results = tg.moba_attention(
        *tensors[:3], BLOCK, is_causal=is_causal, return_lse=True, routing=routing, softcap=softcap,
        sinks=sinks_of(tensors),
    )  # fmt: skip
    incoming = [random_tensor(tuple(r.shape), r.dtype, device, 9) for r in results]
    gradients = torch.autograd.grad(results, tensors, incoming)
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = reference.moba_attention(
        *leaves[:3], routing.block_indices, BLOCK, is_causal, None, softcap, sinks_of(leaves)
    )
    expected_gradients = torch.autograd.grad(expected, leaves, [tensor.double() for tensor in incoming])
    for name, actual, wanted in zip(("out", "lse"), results, expected, strict=True):
        assert_near(name, actual, wanted, dtype)
    for name, actual, wanted in zip(("query", "key", "value", "sinks"), gradients, expected_gradients, strict=False):
        assert_near(f"gradient of {name}", actual, wanted, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_equals_each_sequence_alone(options: dict[str, Any], device: torch.device) -> None:
    tensors = make(torch.float32, device, options.get("has_sinks", False), batch=1)
    packed = [tensor[0].transpose(0, 1) for tensor in tensors[:3]]
    starts = [0, 17, 17, TOKENS]
    boundaries = torch.tensor(starts, device=device)
    given = {"softcap": options.get("softcap"), "sinks": sinks_of(tensors)}
    out = tg.moba_attention_varlen(*packed, boundaries, boundaries, TOKENS, TOKENS, BLOCK, TOP_K, **given)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[-1])
    expected = torch.zeros_like(gradient)
    for start, end in pairwise(starts):
        alone = tg.moba_attention(*(t[:, :, start:end] for t in tensors[:3]), BLOCK, TOP_K, **given)
        torch.testing.assert_close(out[start:end], alone[0].transpose(0, 1), rtol=0, atol=2e-6)
        expected += torch.autograd.grad(alone.square().sum(), tensors[-1])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("losses", ["both", "out", "lse"])
def test_gradcheck(losses: str, packed: bool) -> None:
    """Numerical gradients of every input, sinks among them, of either result or both."""
    tensors = [torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    if packed:
        tensors = [tensor[0].transpose(0, 1).detach().contiguous().requires_grad_() for tensor in tensors]
        boundaries = torch.tensor([0, 4, 11])
        sequences: tuple[Any, ...] = (boundaries, boundaries, 7, 7)
        routing = tg.moba_route_varlen(*tensors[:2], *sequences, 3, 2)
    else:
        sequences = ()
        routing = tg.moba_route(*tensors[:2], 3, 2)

    def attend(*inputs: Tensor) -> Any:
        function = tg.moba_attention_varlen if packed else tg.moba_attention
        out, lse = function(
            *inputs[:3], *sequences, 3, routing=routing, softcap=1.3, sinks=inputs[3], return_lse=True
        )  # fmt: skip
        return {"both": (out, lse), "out": out, "lse": lse}[losses]

    assert torch.autograd.gradcheck(attend, (*tensors, sinks))


def test_lse_does_not_count_the_sink(device: torch.device) -> None:
    tensors = make(torch.float32, device, True)
    without = tg.moba_attention(*tensors[:3], BLOCK, TOP_K, return_lse=True)
    with_sinks = tg.moba_attention(*tensors[:3], BLOCK, TOP_K, return_lse=True, sinks=tensors[3])
    assert_bitwise_equal("lse", with_sinks[1], without[1])
    assert not torch.equal(with_sinks[0], without[0])


def test_a_sink_of_minus_infinity_is_none(device: torch.device) -> None:
    tensors = make(torch.float32, device, False)
    sinks = torch.full((HEADS,), -torch.inf, device=device)
    expected = tg.moba_attention(*tensors, BLOCK, TOP_K)
    assert_bitwise_equal("out", tg.moba_attention(*tensors, BLOCK, TOP_K, sinks=sinks), expected)


@pytest.mark.parametrize("num_keys", [0, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_of_a_sink_of_minus_infinity_where_a_query_sees_no_key(
    packed: bool, num_keys: int, device: torch.device
) -> None:
    """Five queries, the last of which stand on the keys; the first see none. Another head's sink is finite."""
    query, key, value = (random_tensor((1, 2, n, 4), torch.float32, device, n) for n in (5, num_keys, num_keys))
    sinks = torch.tensor([-torch.inf, 0.5], device=device)
    oracle = [tensor.double().requires_grad_() for tensor in (query, key, value, sinks)]
    routing = tg.moba_route(query, key, 2, 2)
    if packed:
        query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, sinks)]
    if packed:
        bounds = [torch.tensor([0, n], device=device) for n in (5, num_keys)]
        out = tg.moba_attention_varlen(*leaves[:3], *bounds, 5, num_keys, 2, 2, sinks=sinks).transpose(0, 1)[None]
    else:
        out = tg.moba_attention(*leaves[:3], 2, 2, sinks=sinks)
    expected, _ = reference.moba_attention(*oracle[:3], routing.block_indices, 2, sinks=oracle[3])
    actual = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), oracle)
    assert actual[3][0] == wanted[3][0] == 0
    for name, gradient, double in zip(("query", "key", "value", "sinks"), actual, wanted, strict=True):
        double = double[0].transpose(0, 1) if packed and name != "sinks" else double
        assert double.isfinite().all() and gradient.shape == double.shape
        if double.numel() > 0:
            assert_near(f"gradient of {name}", gradient, double, torch.float32)


def test_a_cap_bounds_infinite_scores(device: torch.device) -> None:
    """Where an infinite score would make NaN of a row, a capped one is a large number; NaN stays NaN."""
    query, key, value = (tensor.detach().clone() for tensor in make(torch.float32, device, False))
    key[0, :, 3, 0] = torch.inf
    query[:, :, 40] = torch.nan
    out = tg.moba_attention(query, key, value, BLOCK, 100, softcap=2.0)
    assert out[:, :, 40].isnan().all() and out[:, :, :40].isfinite().all() and out[:, :, 41:].isfinite().all()


def test_rows_whose_keys_all_score_minus_infinity(device: torch.device) -> None:
    """0 / 0 without a sink, and with one nothing of the sum is the keys'."""
    query, key, value = (torch.ones(1, 1, 4, 16, device=device) for _ in range(3))
    key[..., 0] = -torch.inf
    assert tg.moba_attention(query, key, value, 4, 1).isnan().all()
    out, lse = tg.moba_attention(query, key, value, 4, 1, sinks=torch.zeros(1, device=device), return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_decoding_gives_the_rows_of_attention(
    dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    """One token, some, and a chunk long enough for the other kernels."""
    softcap, has_sinks = options.get("softcap"), options.get("has_sinks", False)
    tensors = [tensor.detach() for tensor in make(dtype, device, has_sinks)]
    given = {"softcap": softcap, "sinks": sinks_of(tensors), "return_lse": True}
    query, key, value = (torch.cat([tensor, tensor], dim=2) for tensor in tensors[:3])
    expected = tg.moba_attention(query, key, value, BLOCK, TOP_K, **given)
    cache = tg.MobaCache(2, KV_HEADS, DIM, block_size=BLOCK, max_seq_len=100, dtype=dtype, device=device)
    first = 0
    for count in (70, 1, 19):
        part = slice(first, first + count)
        cache.append(key[:, :, part], value[:, :, part])
        out, lse = tg.moba_decode(query[:, :, part], cache, TOP_K, **given)
        assert_near("out", out, expected[0][:, :, part].double(), dtype)
        assert_near("lse", lse, expected[1][:, :, part].double(), dtype)
        first += count


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"softcap": float("inf")}, ValueError, "softcap must be positive and finite"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive"),
        ({"softcap": "2"}, TypeError, "softcap must be a float"),
        ({"softcap": True}, TypeError, "softcap must be a float"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \[4\]"),
        ({"sinks": torch.zeros(1, 4)}, ValueError, r"sinks must have shape \[4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks must have the dtype of query"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a torch.Tensor"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], exception: type[Exception], named: str) -> None:
    tensors = [tensor.detach() for tensor in make(torch.float32, torch.device("cpu"), False)]
    with pytest.raises(exception, match=named):
        tg.moba_attention(*tensors, BLOCK, TOP_K, **options)
    cache = tg.MobaCache(2, KV_HEADS, DIM, block_size=BLOCK, max_seq_len=100)
    cache.append(*tensors[1:])
    with pytest.raises(exception, match=named):
        tg.moba_decode(tensors[0], cache, TOP_K, **options)
