"""Block attention against the float64 oracle on the same support: out, lse, d_query, d_key, d_value."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import topgather as tg
from tests.block_attention.helpers import (
    LAYOUTS,
    AttentionCase,
    AttentionResult,
    assert_attention_close,
    attention_magnitudes,
    check_attention,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal, assert_close
from tests.common.tolerances import TOLERANCES, accumulation_dtype

pytestmark = pytest.mark.sanitize

CASES = [
    AttentionCase(),
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=200, head_dim=32, top_k=4),
    AttentionCase(num_heads=8, num_kv_heads=1, query_len=130, head_dim=64, block_size=32, top_k=3),
    AttentionCase(num_heads=3, num_kv_heads=3, query_len=111, head_dim=24, block_size=9, top_k=5),
    AttentionCase(query_len=300, head_dim=128, block_size=128, top_k=2),
    AttentionCase(query_len=520, head_dim=64, block_size=64, top_k=8, num_heads=1),
    AttentionCase(query_len=1100, head_dim=16, block_size=8, top_k=6, num_heads=1),
]
HEAD_DIMS = [AttentionCase(query_len=150, head_dim=head_dim, top_k=3) for head_dim in (1, 2, 3, 7, 17, 80, 96, 256)]
VALUE_DIMS = [
    AttentionCase(query_len=150, num_heads=4, num_kv_heads=2, head_dim=head_dim, value_dim=value_dim, top_k=3)
    for head_dim, value_dim in ((64, 32), (16, 1), (1, 16), (48, 80), (192, 128), (3, 5))
]
BLOCK_SIZES = [
    AttentionCase(query_len=length, block_size=block_size, top_k=top_k)
    for length, block_size, top_k in (
        (90, 1, 8),
        (90, 2, 5),
        (150, 3, 7),
        (200, 31, 3),
        (200, 33, 3),
        (400, 100, 2),
        (500, 129, 3),
        (700, 256, 2),
        (1100, 512, 2),
        (100, 512, 1),
    )
]
LENGTHS = [
    AttentionCase(num_heads=4, num_kv_heads=2, query_len=query_len, key_len=key_len, top_k=3)
    for query_len, key_len in (
        (1, 200),
        (37, 200),
        (200, 201),
        (200, 37),
        (65, 64),
        (1, 1),
        (2, 1),
        (1, 2),
        (17, 16),
    )
]
SCALES = [AttentionCase(query_len=150, top_k=3, scale=scale) for scale in (0.0, -0.25, 1.0, 4.0, -3.0, 1e-30)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES + HEAD_DIMS + VALUE_DIMS + BLOCK_SIZES + LENGTHS + SCALES, ids=str)
def test_against_reference(case: AttentionCase, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    check_attention(replace(case, is_causal=is_causal), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(num_heads=2, num_kv_heads=1, query_len=2100, head_dim=8, block_size=128, top_k=8),
        AttentionCase(batch=3, num_heads=1, query_len=2100, key_len=900, head_dim=4, block_size=64, top_k=3),
        AttentionCase(num_heads=1, query_len=1300, key_len=2600, head_dim=4, block_size=700, top_k=2),
    ],
    ids=str,
)
def test_long_enough_to_be_split(
    case: AttentionCase, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Several thousand queries: a kernel works on them in several pieces, some of which see no key at all."""
    check_attention(replace(case, is_causal=is_causal), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(num_heads=1, query_len=3, key_len=70_000, head_dim=2, block_size=1, top_k=9),
        AttentionCase(num_heads=1, query_len=70_000, key_len=5, head_dim=2, block_size=3, is_causal=False),
        AttentionCase(num_heads=1, query_len=5, key_len=70_000, head_dim=4, block_size=66_000),
        AttentionCase(batch=70, num_heads=33, num_kv_heads=11, query_len=9, head_dim=2, block_size=4),
        AttentionCase(batch=3000, num_heads=11, query_len=3, head_dim=2, block_size=2),
    ],
    ids=str,
)
def test_counts_past_16_bits(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
    """More blocks, more queries of one block, more keys of one block, or more heads than usual."""
    check_attention(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_layouts_against_reference(head_dim: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    case = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=140, head_dim=head_dim, top_k=3)
    check_attention(case, dtype, device, layout)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_layout(dtype: torch.dtype, device: torch.device) -> None:
    """grad_out arrives transposed, expanded (from a sum) or with a stride in its last dimension."""
    case = AttentionCase(batch=2, query_len=70)
    inputs = make_inputs(case, dtype, device)
    grad_out, grad_lse = make_gradients(case, dtype, device, 0)
    ones = torch.ones((), dtype=dtype, device=device).expand(grad_out.shape)
    block_indices = tg.moba_route(inputs[0], inputs[1], case.block_size, case.top_k).block_indices
    for other in (
        grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        grad_out.transpose(2, 3).contiguous().transpose(2, 3),
        ones,
    ):
        other_lse = grad_lse.transpose(0, 2).contiguous().transpose(0, 2)
        result = run_attention(*inputs, other, other_lse, case)
        assert_attention_close(result, inputs, (other, other_lse), block_indices, case)
        contiguous = run_attention(*inputs, other.contiguous(), grad_lse, case)
        for name, tensor in result.tensors().items():
            assert_bitwise_equal(name, tensor, contiguous.tensors()[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("query_len", "key_len"), [(150, 150), (40, 150)])
def test_enough_blocks_equals_dense_attention(
    query_len: int, key_len: int, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = AttentionCase(
        batch=2,
        num_heads=4,
        num_kv_heads=2,
        query_len=query_len,
        key_len=key_len,
        head_dim=32,
        top_k=10,
        is_causal=is_causal,
    )
    inputs = make_inputs(case, dtype, device)
    grad_out, grad_lse = make_gradients(case, dtype, device, 0)
    grad_lse.zero_()
    result = run_attention(*inputs, grad_out, grad_lse, case)

    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = torch.ones(query_len, key_len, dtype=torch.bool, device=device)
    mask = mask.tril(key_len - query_len) if is_causal else mask
    dense = scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    gradients = torch.autograd.grad(dense, leaves, grad_out.double())
    all_blocks = torch.arange(10, device=device).expand(2, 4, query_len, 10)
    expected = dict(zip(("out", "d_query", "d_key", "d_value"), (dense.detach(), *gradients), strict=True))
    assert_close_to_dense(result.tensors(), expected, inputs, (grad_out, grad_lse), all_blocks, case)


def assert_close_to_dense(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    block_indices: Tensor,
    case: AttentionCase,
) -> None:
    """The results named in ``expected``, which another implementation made in float64, up to the table's tolerance."""
    magnitudes = attention_magnitudes(*inputs, *gradients, block_indices, case)
    length = case.head_dim * 2 + case.keys + 2 * case.query_len
    for name, tensor in expected.items():
        tolerance, magnitude = TOLERANCES["moba_attention", name], magnitudes.by_name[name]
        assert_close(name, actual[name], tensor, magnitude, tolerance, inputs[0].dtype, length, magnitudes.score_factor)


def test_top_k_one_is_own_block_attention(device: torch.device, device_kind: str) -> None:
    case = AttentionCase(query_len=64, top_k=1)
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    out = tg.moba_attention(*(tensor.detach() for tensor in inputs), block_size=16, top_k=1)
    blocks = (tensor.detach().double().unflatten(2, (4, 16)) for tensor in inputs)
    own = scaled_dot_product_attention(*blocks, is_causal=True).flatten(2, 3)
    own_block = (torch.arange(64, device=device) // 16)[:, None].expand(1, 2, 64, 1)
    gradients = make_gradients(case, inputs[0].dtype, device, 0)
    assert_close_to_dense({"out": out}, {"out": own}, inputs, gradients, own_block, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_empty(
    batch: int, query_len: int, key_len: int, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = AttentionCase(
        batch, 4, 2, query_len, key_len, head_dim=6, value_dim=5, block_size=3, top_k=2, is_causal=is_causal
    )
    result = check_attention(case, dtype, device)
    assert result.out.shape == (batch, 4, query_len, 5)
    if key_len == 0:
        assert (result.out == 0).all() and (result.lse == -torch.inf).all() and (result.d_query == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_before_the_first_key_are_zero(dtype: torch.dtype, device: torch.device) -> None:
    """Nq > Nk, causal: out 0, lse -inf and exactly zero gradients, even with a gradient of lse coming in."""
    case = AttentionCase(query_len=50, key_len=20)
    result = check_attention(case, dtype, device)
    assert (result.out[:, :, :30] == 0).all() and (result.d_query[:, :, :30] == 0).all()
    assert (result.lse[:, :, :30] == -torch.inf).all() and result.lse[:, :, 30:].isfinite().all()


def test_value_of_no_columns_still_has_an_lse(device: torch.device) -> None:
    case = AttentionCase(query_len=20, head_dim=4, value_dim=0, block_size=4)
    check_attention(case, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype, device: torch.device) -> None:
    """Scores to 1e4 and beyond: the softmax is nearly one-hot and everything stays finite."""
    case = AttentionCase(query_len=100, scale=300.0, top_k=3)
    result = check_attention(case, dtype, device)
    assert all(tensor.isfinite().all() for tensor in (result.out, result.lse, result.d_value))


def nonfinite_inputs(kind: str, dtype: torch.dtype, device: torch.device) -> tuple[AttentionCase, list[Tensor]]:
    """Four heads with ``kind`` planted in one tensor of the first two; heads 2 and 3 stay clean."""
    case = AttentionCase(batch=1, num_heads=4, num_kv_heads=2, query_len=70, head_dim=8, block_size=8, top_k=3)
    inputs = [tensor.detach().clone() for tensor in make_inputs(case, dtype, device)]
    which, value = kind.split("_")
    tensor = inputs[["query", "key", "value"].index(which)]
    planted = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[value]
    tensor[0, 0, 37, 3] = planted
    tensor[0, 0, 5, 0] = planted
    return case, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", [f"{which}_{v}" for which in ("query", "key", "value") for v in ("nan", "inf", "-inf")]
)
def test_nonfinite_inputs_reach_exactly_the_queries_that_see_them(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """NaN and inf masks equal dense attention over the keys seen; a key not seen has no influence."""
    case, tensors = nonfinite_inputs(kind, dtype, device)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    inputs = (leaves[0], leaves[1], leaves[2])
    gradients = make_gradients(case, dtype, device, 0)
    block_indices = tg.moba_route(inputs[0], inputs[1], case.block_size, case.top_k).block_indices
    result = run_attention(*inputs, *gradients, case)
    assert_attention_close(result, inputs, gradients, block_indices, case)
    assert result.out[:, 2:].isfinite().all() and result.d_key[:, 1:].isfinite().all()


def test_all_scores_minus_infinity_is_nan_as_softmax_is(device: torch.device) -> None:
    case = AttentionCase(num_heads=1, query_len=12, head_dim=1, block_size=4, top_k=1)
    query = torch.ones(1, 1, 12, 1, device=device, requires_grad=True)
    key = torch.ones(1, 1, 12, 1, device=device)
    key[0, 0, 4:8] = -torch.inf
    key[0, 0, 8] = -torch.inf
    inputs = (query, key.requires_grad_(), torch.ones(1, 1, 12, 1, device=device, requires_grad=True))
    gradients = make_gradients(case, torch.float32, device, 0)
    block_indices = tg.moba_route(query, key, 4, 1).block_indices
    result = run_attention(*inputs, *gradients, case)
    assert_attention_close(result, inputs, gradients, block_indices, case)
    assert result.out[0, 0, 4:9].isnan().all()
    assert result.out[0, 0, :4].isfinite().all() and result.out[0, 0, 9:].isfinite().all()
    assert (result.lse[0, 0, 4:9] == -torch.inf).all()


def test_all_nan_stays_in_bounds(device: torch.device) -> None:
    case = AttentionCase(batch=2, query_len=100, top_k=3)
    nan = torch.full((2, 2, 100, 16), float("nan"), device=device, requires_grad=True)
    result = run_attention(nan, nan, nan, *make_gradients(case, torch.float32, device, 0), case)
    assert result.out.isnan().all() and result.d_query.isnan().all()


def random_routing(case: AttentionCase, device: torch.device, seed: int) -> "tg.BlockRouting":
    """Blocks in random order, -1 anywhere, rows with none, blocks after the query's own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.num_heads, case.query_len)
    order = torch.rand(*shape, case.num_blocks, generator=generator).argsort(dim=-1)[..., : case.top_k]
    is_unused = torch.rand(*order.shape, generator=generator) < 0.3
    is_unused |= torch.rand(*shape, 1, generator=generator) < 0.1
    block_indices = torch.where(is_unused, -1, order).to(torch.int32).to(device)
    return tg.BlockRouting(block_indices, case.block_size)


def run_routed(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, routing: "tg.BlockRouting"
) -> AttentionResult:
    inputs = make_inputs(case, dtype, device)
    gradients = make_gradients(case, dtype, device, 0)
    result = run_attention(*inputs, *gradients, case, routing)
    assert_attention_close(result, inputs, gradients, routing.block_indices, case)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=100, block_size=8, top_k=5),
        AttentionCase(query_len=30, key_len=100, block_size=7, top_k=6),
        AttentionCase(query_len=100, key_len=30, block_size=7, top_k=3),
        AttentionCase(query_len=40, block_size=1, top_k=12),
    ],
    ids=str,
)
def test_users_own_routing(case: AttentionCase, is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(case, is_causal=is_causal)
    run_routed(case, dtype, device, random_routing(case, device, 0))


def test_causal_mask_holds_under_any_routing(device: torch.device, device_kind: str) -> None:
    """Every block chosen by every query: causal attention, because later tokens contribute nothing."""
    case = AttentionCase(query_len=50, block_size=8, top_k=7)
    dtype = widest_dtype(device_kind)
    every = torch.arange(7, dtype=torch.int32, device=device).flip(0).expand(1, 2, 50, 7).contiguous()
    result = run_routed(case, dtype, device, tg.BlockRouting(every, 8))
    inputs, gradients = make_inputs(case, dtype, device), make_gradients(case, dtype, device, 0)
    dense = scaled_dot_product_attention(*(tensor.detach().double() for tensor in inputs), is_causal=True)
    assert_close_to_dense(result.tensors(), {"out": dense}, inputs, gradients, every, case)


def test_routing_of_unused_slots_alone(device: torch.device) -> None:
    case = AttentionCase(query_len=20, block_size=8)
    unused = torch.full((1, 2, 20, 3), -1, dtype=torch.int32, device=device)
    result = run_routed(case, torch.float32, device, tg.BlockRouting(unused, 8))
    assert (result.out == 0).all() and (result.lse == -torch.inf).all()
    assert all((tensor == 0).all() for tensor in (result.d_query, result.d_key, result.d_value))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("slots", ["strided", "expanded"])
def test_routing_of_any_strides(slots: str, device: torch.device) -> None:
    """block_indices need not be contiguous: a view gives the bits of its copy."""
    case = AttentionCase(query_len=40, block_size=8, top_k=2)
    routing = random_routing(case, device, 1).block_indices
    if slots == "strided":
        view = routing.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        view = routing[:, :1].expand(-1, 2, -1, -1)
    assert not view.is_contiguous()
    copied = run_routed(case, torch.float32, device, tg.BlockRouting(view.contiguous(), 8))
    viewed = run_routed(case, torch.float32, device, tg.BlockRouting(view, 8))
    for name, tensor in viewed.tensors().items():
        assert_bitwise_equal(name, tensor, copied.tensors()[name])


def test_lse_is_the_natural_log(device: torch.device) -> None:
    """Scores all zero: lse is the log of the number of keys seen."""
    query = torch.zeros(1, 1, 8, 4, device=device)
    _, lse = tg.moba_attention(query, query, query, block_size=8, top_k=1, return_lse=True)
    torch.testing.assert_close(lse[0, 0].cpu(), torch.arange(1.0, 9.0).log(), rtol=1e-6, atol=1e-6)


def test_default_scale_and_block_size(device: torch.device) -> None:
    """block_size defaults to 128, scale to D ** -0.5, is_causal to True; only out comes back."""
    query, key, value = make_inputs(AttentionCase(query_len=300), torch.float32, device)
    out = tg.moba_attention(query, key, value, top_k=2)
    assert isinstance(out, Tensor)
    stated, lse = tg.moba_attention(query, key, value, 128, 2, True, 0.25, True)
    assert_bitwise_equal("out", out, stated)
    assert lse.dtype == accumulation_dtype(torch.float32)
    routing = tg.moba_route(query, key)
    assert (routing.block_size, routing.top_k) == (128, 8)
    assert_bitwise_equal("centroids", tg.block_centroids(key), tg.block_centroids(key, block_size=128))
    assert_bitwise_equal(
        "integer scale",
        tg.moba_attention(query, key, value, top_k=2, scale=1),
        tg.moba_attention(query, key, value, top_k=2, scale=1.0),
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_out_is_laid_out_as_query_is(layout: str, device: torch.device) -> None:
    """So that joining the heads of a projection's transposed view costs no copy."""
    case = AttentionCase(batch=2, num_heads=4, query_len=50, value_dim=8)
    out = tg.moba_attention(*make_inputs(case, torch.float32, device, 0, layout), block_size=16, top_k=2)
    assert (out.transpose(1, 2) if layout == "transposed" else out).is_contiguous()


def test_inputs_are_left_alone(device: torch.device) -> None:
    case = AttentionCase(query_len=50)
    inputs = make_inputs(case, torch.float32, device)
    copies = [tensor.detach().clone() for tensor in inputs]
    run_attention(*inputs, *make_gradients(case, torch.float32, device, 0), case)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)
