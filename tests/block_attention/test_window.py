"""A sliding window of tokens joined to the choice of blocks: the union is attended to once."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import topgather as tg
from tests.block_attention.test_softcap_and_sinks import DTYPES, assert_near
from tests.common.tensors import assert_bitwise_equal, random_tensor
from tests.common.tolerances import accumulation_dtype
from tests.decoding.helpers import DecodeCase, filled_cache
from topgather import reference

pytestmark = pytest.mark.sanitize

HEADS, KV_HEADS, DIM = 4, 2, 16
# Queries, keys, block_size, window: within a block, one token, whole blocks, a token more, more than all, several steps
# of keys a block, blocks that are not on chip as a whole.
CASES = [
    (45, 45, 8, 5),
    (45, 45, 8, 1),
    (45, 45, 8, 16),
    (20, 60, 8, 17),
    (60, 30, 8, 100),
    (150, 150, 70, 90),
    (20, 430, 200, 300),
]


def make(
    case: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and sinks, and a choice a key head: any blocks, later ones and unused slots among them."""
    num_queries, num_keys, block_size, _ = case
    shapes = ((2, HEADS, num_queries, DIM), *((2, KV_HEADS, num_keys, DIM),) * 2)
    tensors = [random_tensor(shape, dtype, device, seed + i) for i, shape in enumerate(shapes)]
    tensors.append(random_tensor((HEADS,), accumulation_dtype(dtype), device, seed + 7))
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_keys // block_size)
    choice = torch.rand((2, KV_HEADS, num_queries, num_blocks), generator=generator).argsort(-1)[..., :3].int()
    choice[torch.rand(choice.shape, generator=generator) < 0.4] = -1
    return [tensor.detach().requires_grad_() for tensor in tensors], choice.to(device)


def check(case: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, **options: Any) -> None:
    """Results and gradients of everything, of a loss on both results, against the oracle."""
    tensors, choice = make(case, dtype, device)
    block_size, window = case[2:]
    results = tg.moba_attention(
        *tensors[:3], block_size, return_lse=True, routing=tg.BlockRouting(choice, block_size), sinks=tensors[3],
        window=window, **options,
    )  # fmt: skip
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    softcap = options.get("softcap")
    expected = reference.moba_attention(
        *leaves[:3], choice.cpu(), block_size, softcap=softcap, sinks=leaves[3], window=window
    )
    sees_any = expected[1] > -torch.inf
    for name, actual, wanted in zip(("out", "lse"), results, expected, strict=True):
        assert ((actual == -torch.inf).cpu() == (wanted == -torch.inf)).all(), name
        assert_near(name, actual[sees_any.to(device)], wanted[sees_any], dtype)
    incoming = [random_tensor(tuple(r.shape), r.dtype, device, 9) for r in results]
    gradients = torch.autograd.grad(results, tensors, incoming)
    wanted_gradients = torch.autograd.grad(expected, leaves, [tensor.double().cpu() for tensor in incoming])
    for name, actual, wanted in zip(("query", "key", "value", "sinks"), gradients, wanted_gradients, strict=True):
        assert_near(f"gradient of {name}", actual, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(case, dtype, device, deterministic=case[2] == 8, softcap=2.0 if case[3] % 2 else None)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_queries=st.integers(1, 50),
    num_keys=st.integers(1, 60),
    block_size=st.integers(1, 40),
    window=st.integers(1, 65),
)
def test_any_window(num_queries: int, num_keys: int, block_size: int, window: int, device: torch.device) -> None:
    check((num_queries, num_keys, block_size, window), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_values_before_the_window_do_not_matter(
    case: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Infinite and NaN, forward and backward: what a query does not see has no influence on its row."""
    (query, key, value, _), choice = make(case, dtype, device)
    block_size, window = case[2:]
    choice[:] = -1  # the window alone, all of whose first blocks are edges
    routing = tg.BlockRouting(choice, block_size)
    results = [tg.moba_attention(query, key, value, block_size, routing=routing, window=window)]
    bad_key, bad_value = key.detach().clone(), value.detach().clone()
    bad_value[:, :, 3], bad_key[:, :, 4] = torch.inf, torch.nan
    bad_key.requires_grad_(), bad_value.requires_grad_()
    results.append(tg.moba_attention(query, bad_key, bad_value, block_size, routing=routing, window=window))
    gradients = [
        torch.autograd.grad(result.float().square().sum(), (query, *leaves))
        for result, leaves in zip(results, [(key, value), (bad_key, bad_value)], strict=True)
    ]
    first_free = 4 + window
    assert results[1][:, :, first_free:].isfinite().all() and results[1][:, :, 3:first_free].isnan().any()
    for name, good, bad, first in (
        ("out", *results, first_free),
        ("gradient of query", gradients[0][0], gradients[1][0], first_free),
        ("gradient of key", gradients[0][1], gradients[1][1], first_free),
        ("gradient of value", gradients[0][2], gradients[1][2], first_free),
    ):
        assert_near(name, bad[:, :, first:], good[:, :, first:].detach().double().cpu(), dtype)


def test_a_window_of_everything_is_dense_attention(device: torch.device) -> None:
    (query, key, value, _), choice = make(CASES[0], torch.float32, device)
    routing = tg.BlockRouting(choice, 8)
    out = tg.moba_attention(query, key, value, 8, routing=routing, window=2**31 - 1)
    assert_near("out", out, tg.moba_attention(query, key, value, 8).detach().double().cpu(), torch.float32)


@pytest.mark.usefixtures("deterministic")
def test_packed_equals_each_sequence_alone(device: torch.device) -> None:
    tensors = [tensor[:1] for tensor in make(CASES[0], torch.float32, device)[0][:3]]
    packed = [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]
    starts = [0, 17, 17, 45]
    bounds = torch.tensor(starts, device=device)
    out = tg.moba_attention_varlen(*packed, bounds, bounds, 28, 28, 8, 2, window=13)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    expected, sums = [], [torch.zeros_like(tensor) for tensor in tensors]
    for start, end in pairwise(starts):
        alone = tg.moba_attention(*(t[:, :, start:end] for t in tensors), 8, 2, window=13)
        expected.append(alone[0].transpose(0, 1))
        for total, gradient in zip(sums, torch.autograd.grad(alone.square().sum(), tensors), strict=True):
            total += gradient
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=2e-6)
    for actual, wanted in zip(gradients, sums, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradcheck(packed: bool) -> None:
    tensors = [torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    sequences: tuple[Any, ...] = ()
    if packed:
        tensors = [tensor[0].transpose(0, 1).detach().contiguous().requires_grad_() for tensor in tensors]
        boundaries = torch.tensor([0, 4, 11])
        sequences = (boundaries, boundaries, 7, 7)
    route = tg.moba_route_varlen if packed else tg.moba_route
    routing = route(*tensors[:2], *sequences, 4, 1)

    def attend(*inputs: Tensor) -> Any:
        function: Any = tg.moba_attention_varlen if packed else tg.moba_attention
        options = {"routing": routing, "softcap": 1.3, "sinks": inputs[3], "return_lse": True, "window": 3}
        return function(*inputs[:3], *sequences, 4, **options)

    assert torch.autograd.gradcheck(attend, (*tensors, sinks))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("window", [5, 30])
def test_decoding_gives_the_rows_of_attention(window: int, dtype: torch.dtype, device: torch.device) -> None:
    """One token, some, and a chunk long enough for the other kernels."""
    tensors = make((45, 45, 8, 1), dtype, device)[0]
    query, key, value = (torch.cat([tensor.detach()] * 2, dim=2) for tensor in tensors[:3])
    given = {"sinks": tensors[3].detach(), "return_lse": True, "window": window}
    expected = tg.moba_attention(query, key, value, 8, 2, **given)
    for kind in (tg.MobaCache, tg.PagedMobaCache):
        cache = kind(2, KV_HEADS, DIM, block_size=8, max_seq_len=100, dtype=dtype, device=device)
        first = 0
        for count in (70, 1, 19):
            part = slice(first, first + count)
            cache.append(key[:, :, part], value[:, :, part])
            out, lse = tg.moba_decode(query[:, :, part], cache, 2, **given)
            assert_near("out", out, expected[0][:, :, part].double().cpu(), dtype)
            assert_near("lse", lse, expected[1][:, :, part].double().cpu(), dtype)
            first += count


@pytest.mark.parametrize("pages", [0, 1])
def test_decoding_against_reference(pages: int, device: torch.device) -> None:
    """Sequences of different lengths, a choice of any blocks, and so many keys that rows are split."""
    for case, window in (
        (DecodeCase(((60, 9), (3, 2)), pages=pages), 11),
        (DecodeCase(((4999,), (1,)), pages=pages), 4900),
    ):
        cache, tokens = filled_cache(case, torch.float32, device)
        counts = torch.tensor(case.steps[-1], dtype=torch.int32, device=device)
        most = max(case.steps[-1])
        query = random_tensor((case.batch, 4, most, 16), torch.float32, device, 5)
        choice = torch.full((case.batch, 1, most, 2), -1, dtype=torch.int32, device=device)
        choice[..., 1] = 0
        out, lse = tg.moba_decode(
            query, cache, routing=tg.BlockRouting(choice, 8), num_tokens=counts, window=window, return_lse=True
        )
        for b, count in enumerate(case.steps[-1]):
            row = slice(b, b + 1)
            rows = (
                query[row, :, :count].cpu(),
                tokens.key[b].cpu(),
                tokens.value[b].cpu(),
                choice[row, :, :count].cpu(),
            )
            wanted = reference.moba_decode(*rows, torch.tensor([case.lengths[b]]), 8, window=window)
            assert_near("out", out[row, :, :count], wanted[0], torch.float32)
            assert_near("lse", lse[row, :, :count], wanted[1], torch.float32)


def test_faults_of_a_choice(device: torch.device, device_kind: str) -> None:
    """Found beside a window as without one."""
    (query, key, value, _), choice = make(CASES[0], torch.float32, device)
    for fault, exception in (([6, -1, -1], IndexError), ([2, -1, 2], ValueError), ([5, 5, -1], ValueError)):
        choice[1, 1, 30] = torch.tensor(fault, dtype=torch.int32)
        routing = tg.BlockRouting(choice, 8)
        if device_kind == "cpu":
            with pytest.raises(exception, match="query head 2, query 30"):
                tg.moba_attention(query, key, value, 8, routing=routing, window=9)
        else:
            out = tg.moba_attention(query, key, value, 8, routing=routing, window=9)
            assert out[1, 2:, 30].isnan().all() and out[1, 2:, :30].isfinite().all() and out[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"window": 0}, ValueError, "window must be between 1"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"window": True}, TypeError, "window must be an int"),
        ({"window": 4, "is_causal": False}, ValueError, "window must be None without is_causal"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], exception: type[Exception], named: str) -> None:
    query, key, value = (tensor.detach() for tensor in make(CASES[0], torch.float32, torch.device("cpu"))[0][:3])
    with pytest.raises(exception, match=named):
        tg.moba_attention(query, key, value, 8, 2, **options)
    if "is_causal" not in options:
        cache = tg.MobaCache(2, KV_HEADS, DIM, block_size=8, max_seq_len=100)
        cache.append(key, value)
        with pytest.raises(exception, match=named):
            tg.moba_decode(query, cache, **options)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    tensors, choice = make((1500, 1500, 64, 100), torch.bfloat16, torch.device("cpu"))
    found = []
    before = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        try:
            out = tg.moba_attention(*tensors[:3], 64, routing=tg.BlockRouting(choice, 64), window=100)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), tensors[:3])))
        finally:
            torch.set_num_threads(before)
    for left, right in zip(*found, strict=True):
        assert_bitwise_equal("threads", left, right)
