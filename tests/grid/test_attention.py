"""Grid and window attention against the oracle: results, every gradient, and what a group is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.grid.helpers import (
    GRID,
    LAYOUTS,
    PARTITIONS,
    WINDOW,
    GridCase,
    Inputs,
    assert_grid_close,
    assert_lse_close,
    attend,
    check_grid,
    make_inputs,
    reference_grid,
    run_grid,
)

pytestmark = pytest.mark.sanitize

# Rows, columns and steps of the image: odd, prime, steps that divide and that do not, groups larger than the image.
IMAGES = [
    (8, 8, (4, 4)),
    (7, 6, (3, 2)),
    (11, 13, (4, 5)),
    (13, 5, (13, 2)),
    (5, 9, (8, 4)),
    (6, 4, (100, 2**31 - 1)),
    (9, 10, (2, 7)),
    (1, 17, (1, 3)),
    (1, 12, (4, 4)),
    (19, 1, (5, 1)),
    (12, 1, (3, 3)),
    (1, 1, (1, 1)),
    (3, 4, (1, 1)),
]
CASES = [
    GridCase(rows=rows, columns=columns, step=step, partition=partition, has_bias=has_bias)
    for rows, columns, step in IMAGES
    for partition in PARTITIONS
    for has_bias in (False, True)
]
HEAD_DIMS = [
    GridCase(head_dim=head_dim, partition=partition, has_bias=True)
    for head_dim in (1, 8, 33, 64, 128)
    for partition in PARTITIONS
]
# Groups of more than a tile of queries, of keys, and of queries that a task takes; the last is a stage of 32 x 32.
LARGE_GROUPS = [
    GridCase(batch=1, rows=9, columns=8, step=(1, 1), head_dim=8),
    GridCase(batch=1, rows=26, columns=31, step=(2, 2), head_dim=33, has_bias=True),
    GridCase(batch=1, num_heads=1, rows=17, columns=25, step=(14, 20), partition="window", has_bias=True),
    GridCase(batch=1, num_heads=1, rows=33, columns=9, step=(1, 1), head_dim=64, has_bias=True),
    # Groups of 64 numbers of which a block in the middle has no token.
    GridCase(batch=1, num_heads=1, rows=2, columns=38, step=(2, 32), head_dim=72, partition="window", has_bias=True),
    # Of 192 numbers, of which whole blocks of 32 have none.
    GridCase(batch=1, num_heads=1, rows=3, columns=70, step=(3, 64), head_dim=24, partition="window", has_bias=True),
    GridCase(batch=1, num_heads=1, rows=32, columns=32, step=(1, 1), head_dim=8),
    # Rows of more than 64 channels, groups of four sizes.
    GridCase(batch=1, num_heads=2, rows=19, columns=15, step=(2, 2), head_dim=72, has_bias=True),
]
# So many groups that a thread takes several at a time, some of them short.
MANY_GROUPS = [
    GridCase(num_heads=3, rows=30, columns=31, step=(11, 7), head_dim=8, has_bias=True),
    GridCase(num_heads=3, rows=31, columns=23, step=(2, 3), head_dim=9, partition="window", has_bias=True),
    GridCase(num_heads=3, rows=31, columns=23, step=(2, 3), head_dim=16, partition="window"),
]
HEADS = [GridCase(batch=batch, num_heads=heads, has_bias=True) for batch, heads in ((1, 1), (3, 5), (5, 1))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + HEAD_DIMS + HEADS + MANY_GROUPS, ids=str)
def test_against_reference(case: GridCase, dtype: torch.dtype, device: torch.device) -> None:
    check_grid(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE_GROUPS, ids=str)
def test_large_groups(case: GridCase, dtype: torch.dtype, device: torch.device) -> None:
    check_grid(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("scale", [0.0, 1, -0.7, 3.0])
def test_scale(scale: float, partition: str, dtype: torch.dtype, device: torch.device) -> None:
    check_grid(GridCase(partition=partition, scale=scale, has_bias=True), dtype, device)


def test_scale_is_that_of_attention_by_default(device: torch.device) -> None:
    inputs = make_inputs(GridCase(head_dim=64), torch.float32, device)
    assert_bitwise_equal("out", attend(inputs, GridCase()).detach(), attend(inputs, GridCase(scale=0.125)).detach())


def attend_with_lse(inputs: Inputs, case: GridCase) -> tuple[Tensor, Tensor]:
    images = (tensor.detach() for tensor in (inputs.query, inputs.key, inputs.value))
    bias = None if inputs.bias is None else inputs.bias.detach()
    out, lse, _ = torch.ops.topgather.grid_attention(*images, bias, case.partition, *case.step, case.scale)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("partition", "step"), [(GRID, (3, 2)), (GRID, (5, 3)), (WINDOW, (3, 2)), (WINDOW, (7, 6))]
)  # groups of 30, 12, 6 and 42 tokens
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_lse(has_bias: bool, partition: str, step: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """The op's second result, which the backward pass starts from."""
    case = GridCase(rows=13, columns=11, step=step, partition=partition, has_bias=has_bias, scale=0.25)
    inputs = make_inputs(case, dtype, device)
    out, lse = attend_with_lse(inputs, case)
    assert_lse_close(lse, inputs, case)
    assert_bitwise_equal("out", out, attend(inputs, case).detach())
    if has_bias:
        assert inputs.bias is not None
        bias = inputs.bias.detach().clone()
        bias[1, 4] = -torch.inf  # a token that sees none
        inputs.bias = bias
        assert_lse_close(attend_with_lse(inputs, case)[1], inputs, case)


# --- what a group is --------------------------------------------------------------------------------------------------


def group_and_number(size: int, step: int, partition: str) -> tuple[Tensor, Tensor, int]:
    """Along an axis: each token's group, its number in the group, and the most numbers of a group."""
    token = torch.arange(size)
    if partition == "grid":
        return token % step, token // step, -(-size // step)
    return token // step, token % step, min(size, step)


def dense_attention(inputs: Inputs, case: GridCase) -> Tensor:
    """Attention among all tokens, those of other groups masked out, bias looked up for every pair."""
    row_group, row_number, _ = group_and_number(case.rows, case.step[0], case.partition)
    column_group, column_number, most_columns = group_and_number(case.columns, case.step[1], case.partition)
    group = (row_group[:, None] * case.columns + column_group).flatten()
    number = (row_number[:, None] * most_columns + column_number).flatten()
    mask = torch.where(group[:, None] == group, 0.0, -torch.inf).to(inputs.query)
    if inputs.bias is not None:
        mask = mask + inputs.bias[:, number[:, None], number[None, :]]
    images = (tensor.flatten(2, 3) for tensor in (inputs.query, inputs.key, inputs.value))
    out = scaled_dot_product_attention(*images, attn_mask=mask)
    return out.unflatten(2, (case.rows, case.columns))


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("rows", "columns", "step"), IMAGES)
def test_equals_masked_dense_attention(
    rows: int,
    columns: int,
    step: tuple[int, int],
    partition: str,
    has_bias: bool,
    device: torch.device,
    device_kind: str,
) -> None:
    """Another implementation, which knows groups by the coordinates of single tokens; gradients included."""
    dtype = widest_dtype(device_kind)
    case = GridCase(rows=rows, columns=columns, step=step, partition=partition, has_bias=has_bias)
    inputs = make_inputs(case, dtype, device)
    leaves = tuple(inputs.leaves().values())
    expected = dense_attention(inputs, case)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    gradients = torch.autograd.grad(expected, leaves, inputs.grad_out)
    for actual, wanted in zip(run_grid(inputs, case).values(), (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_group_is_dense_attention(dtype: torch.dtype, device: torch.device) -> None:
    """Stride 1, or a window as large as the image: the same bits, and those of one long row."""
    case = GridCase(rows=7, columns=11, step=(1, 1), has_bias=True)
    inputs = make_inputs(case, dtype, device)
    expected = run_grid(inputs, case)
    assert_grid_close(expected, inputs, case)
    for step in ((7, 11), (50, 12)):
        actual = run_grid(inputs, replace(case, partition="window", step=step))
        for name, tensor in actual.items():
            assert_bitwise_equal(name, tensor, expected[name])
    images = (t.detach().reshape(2, 2, 1, 77, 16).requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    row = Inputs(*images, inputs.grad_out.reshape(2, 2, 1, 77, 16), inputs.bias)
    for name, tensor in run_grid(row, GridCase(rows=1, columns=77, step=(1, 1), has_bias=True)).items():
        assert_bitwise_equal(name, tensor.reshape(expected[name].shape), expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_a_grid_is_windows_of_permuted_tokens(has_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Row i * stride + a moves to a * (H / stride) + i. A token's results stay the same bits."""
    case = GridCase(rows=12, columns=10, step=(3, 2), has_bias=has_bias)
    inputs = make_inputs(case, dtype, device)
    rows = torch.arange(12, device=device).view(4, 3).T.flatten()
    columns = torch.arange(10, device=device).view(5, 2).T.flatten()

    def permuted(tensor: Tensor) -> Tensor:
        return tensor.detach()[:, :, rows][:, :, :, columns]

    images = (permuted(t).requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    windows = Inputs(*images, permuted(inputs.grad_out), inputs.bias)
    actual = run_grid(windows, replace(case, partition="window", step=(4, 5)))
    expected = run_grid(inputs, case)
    for name, tensor in actual.items():
        wanted = expected[name] if name == "d_bias" else permuted(expected[name])
        assert_bitwise_equal(name, tensor, wanted)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (7, 5), (13, 11), (1, 9), (3, 40)])
@pytest.mark.parametrize("grid_size", [1, 3, (2, 4), (4, 2), 8, (100, 100), [5, 1]], ids=str)
def test_grid_size_is_another_way_to_say_stride(
    grid_size: int | tuple[int, int], rows: int, columns: int, device: torch.device
) -> None:
    inputs = make_inputs(GridCase(batch=1, rows=rows, columns=columns, head_dim=4), torch.float32, device)
    images = (inputs.query, inputs.key, inputs.value)
    most_rows, most_columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    stride = (-(-rows // most_rows), -(-columns // most_columns))
    out = tg.grid_attention(*images, grid_size=grid_size)  # type: ignore[arg-type]
    assert_bitwise_equal("out", out.detach(), tg.grid_attention(*images, stride=stride).detach())
    assert -(-rows // stride[0]) <= most_rows and -(-columns // stride[1]) <= most_columns


def test_an_int_means_a_square(device: torch.device) -> None:
    inputs = make_inputs(GridCase(batch=1, head_dim=4), torch.float32, device)
    images = (inputs.query.detach(), inputs.key.detach(), inputs.value.detach())
    assert_bitwise_equal("out", tg.grid_attention(*images, stride=2), tg.grid_attention(*images, stride=(2, 2)))
    assert_bitwise_equal("out", tg.grid_attention(*images, 3), tg.grid_attention(*images, (3, 3)))
    assert_bitwise_equal("out", tg.window_attention(*images, 3), tg.window_attention(*images, (3, 3)))


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_is_its_value(partition: str, dtype: torch.dtype, device: torch.device) -> None:
    """Its weight is 1 whatever its score; gradients of query, key and bias are zero but for rounding."""
    step = (9, 9) if partition == "grid" else (1, 1)
    case = GridCase(partition=partition, step=step, has_bias=True)
    inputs = make_inputs(case, dtype, device)
    result = run_grid(inputs, case)
    assert_grid_close(result, inputs, case)
    torch.testing.assert_close(result["out"], inputs.value.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result["d_value"], inputs.grad_out, rtol=1e-5, atol=0)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("head_dim", [5, 32])
def test_layouts(head_dim: int, partition: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Views of a fused projection, of a larger tensor, at odd addresses, one image for all; grad_out likewise."""
    check_grid(GridCase(head_dim=head_dim, partition=partition, has_bias=True), dtype, device, layout)


def tokens_first(tensor: Tensor) -> bool:
    return tensor.permute(0, 2, 3, 1, 4).is_contiguous()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_output_and_gradients_are_laid_out_as_inputs(partition: str, device: torch.device) -> None:
    case = GridCase(partition=partition)
    for layout, is_laid_out in (("contiguous", Tensor.is_contiguous), ("fused", tokens_first)):
        for name, tensor in run_grid(make_inputs(case, torch.float32, device, 0, layout), case).items():
            assert is_laid_out(tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_views_of_a_fused_projection_are_not_copied(partition: str, dtype: torch.dtype, device: torch.device) -> None:
    """No torch op inside forward or backward that moves data; the output reshapes to [B, H, W, heads * D] for free."""
    case = GridCase(partition=partition, head_dim=16)
    inputs = make_inputs(case, dtype, device, 0, "fused")
    leaves = tuple(inputs.leaves().values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = attend(inputs, case)
        torch.autograd.grad(out, leaves, inputs.grad_out)
    names = {event.name for event in profile.events()}
    assert any("grid_attention" in name.lower() for name in names)
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy", "aten::fill_"}
    flat = out.permute(0, 2, 3, 1, 4).flatten(3)
    assert flat.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_layout(dtype: torch.dtype, device: torch.device) -> None:
    """grad_out arrives expanded (from a sum) or with a stride in its last dimension: the bits of its copy."""
    case = GridCase(head_dim=24, has_bias=True)
    inputs = make_inputs(case, dtype, device)
    shape = case.shape()
    one = torch.full((), 0.5, dtype=dtype, device=device)
    for grad_out in (
        one.expand(shape),
        inputs.grad_out[..., :1].expand(shape),
        inputs.grad_out[:1, :, :1].expand(shape),
        inputs.grad_out.transpose(-1, -2).contiguous().transpose(-1, -2),
        inputs.grad_out.flip(-1),
    ):
        inputs.grad_out = grad_out
        strided = run_grid(inputs, case)
        assert_grid_close(strided, inputs, case)
        inputs.grad_out = grad_out.contiguous()
        for name, tensor in run_grid(inputs, case).items():
            assert_bitwise_equal(name, strided[name], tensor)


def test_gradients_of_a_sum(device: torch.device) -> None:
    inputs = make_inputs(GridCase(has_bias=True), torch.float32, device)
    leaves = tuple(inputs.leaves().values())
    gradients = torch.autograd.grad(attend(inputs, GridCase()).sum(), leaves)
    inputs.grad_out = torch.ones_like(inputs.grad_out)
    expected = run_grid(inputs, GridCase())
    for (name, wanted), actual in zip(list(expected.items())[1:], gradients, strict=True):
        assert_bitwise_equal(name, actual, wanted)


def test_each_input_in_another_layout(device: torch.device) -> None:
    case = GridCase(has_bias=True)
    parts = [make_inputs(case, torch.bfloat16, device, 0, layout) for layout in ("transposed", "offset", "padded")]
    inputs = Inputs(parts[0].query, parts[1].key, parts[2].value, parts[0].grad_out, parts[0].bias)
    assert_grid_close(run_grid(inputs, case), inputs, case)


@pytest.mark.parametrize("needed", [("query",), ("key",), ("value",), ("bias",), ("query", "bias"), ("key", "value")])
def test_subsets_of_gradients(needed: tuple[str, ...], device: torch.device) -> None:
    """The same bits, whatever else is differentiated."""
    case = GridCase(has_bias=True)
    inputs = make_inputs(case, torch.float32, device)
    expected = run_grid(inputs, case)
    for name, tensor in inputs.leaves().items():
        tensor.requires_grad_(name[2:] in needed)
    leaves = [getattr(inputs, name) for name in needed]
    for name, gradient in zip(needed, torch.autograd.grad(attend(inputs, case), leaves, inputs.grad_out), strict=True):
        assert_bitwise_equal(name, gradient, expected[f"d_{name}"])


def test_one_tensor_for_all_three(device: torch.device) -> None:
    inputs = make_inputs(GridCase(), torch.float32, device)
    expected = run_grid(Inputs(inputs.query, inputs.query, inputs.query, inputs.grad_out), GridCase())
    out = tg.grid_attention(inputs.query, inputs.query, inputs.query, stride=(3, 2))
    (gradient,) = torch.autograd.grad(out, inputs.query, inputs.grad_out)
    assert_bitwise_equal("out", out.detach(), expected["out"])
    torch.testing.assert_close(gradient, expected["d_query"])


def test_inputs_are_left_alone(device: torch.device) -> None:
    inputs = make_inputs(GridCase(has_bias=True), torch.float32, device)
    tensors = (*inputs.leaves().values(), inputs.grad_out)
    copies = [tensor.detach().clone() for tensor in tensors]
    run_grid(inputs, GridCase())
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    "case",
    [
        GridCase(batch=0),
        GridCase(num_heads=0),
        GridCase(rows=0),
        GridCase(columns=0),
        GridCase(rows=0, columns=0),
        GridCase(batch=0, num_heads=0, rows=0, columns=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_empty(has_bias: bool, case: GridCase, partition: str, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(case, partition=partition, has_bias=has_bias)
    inputs = make_inputs(case, dtype, device)
    result = run_grid(inputs, case)
    assert result["out"].shape == case.shape()
    for name, leaf in inputs.leaves().items():
        assert result[name].shape == leaf.shape and result[name].dtype == leaf.dtype
        assert (result[name] == 0).all(), name
    grid_size = tg.grid_attention(inputs.query, inputs.key, inputs.value, grid_size=2)
    assert grid_size.shape == case.shape()


# --- bias -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_float32_bias_of_16_bit_inputs(partition: str, dtype: torch.dtype, device: torch.device) -> None:
    """It is not rounded on its way in, nor its gradient on the way out."""
    case = GridCase(partition=partition, has_bias=True)
    result = check_grid(case, dtype, device, bias_dtype=torch.float32)
    assert result["d_bias"].dtype == torch.float32
    assert (result["d_bias"] != result["d_bias"].to(dtype).float()).any()
    # Of few bits, it gives the same whichever dtype brings it.
    inputs = make_inputs(case, dtype, device)
    assert inputs.bias is not None
    narrow = run_grid(inputs, case)
    inputs.bias = inputs.bias.detach().float().requires_grad_()
    for name, tensor in run_grid(inputs, case).items():
        assert_bitwise_equal(name, tensor.to(dtype), narrow[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [(3, 2), (1, 1), (5, 3)])
def test_bias_of_minus_infinity_hides_tokens(step: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """As a mask: hidden keys count for nothing, and where all are hidden the result is NaN, as of a plain softmax."""
    case = GridCase(rows=15, columns=10, step=step, has_bias=True)
    inputs = make_inputs(case, dtype, device)
    assert inputs.bias is not None
    bias = inputs.bias.detach().clone()
    is_hidden = random_tensor(tuple(bias.shape), torch.float32, device, 9) > 0.3
    is_hidden |= torch.arange(bias.shape[-1], device=device) < min(bias.shape[-1] - 2, 130)
    is_hidden.diagonal(dim1=1, dim2=2).fill_(False)
    inputs.bias = torch.where(is_hidden, -torch.inf, bias).to(dtype).requires_grad_()
    result = run_grid(inputs, case)
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert (result["d_bias"][is_hidden] == 0).all()
    assert_grid_close(result, inputs, case)
    bias = inputs.bias.detach().clone()
    bias[1, 4] = -torch.inf
    inputs.bias = bias.requires_grad_()
    result = run_grid(inputs, case)
    assert_grid_close(result, inputs, case)
    assert result["out"][:, 1].isnan().any() and result["out"][:, 0].isfinite().all()


def test_a_large_bias_does_not_overflow(device: torch.device) -> None:
    """Weights depend on differences of scores alone."""
    inputs = make_inputs(GridCase(has_bias=True), torch.float32, device)
    assert inputs.bias is not None
    expected = attend(inputs, GridCase())
    for shift in (4096.0, -4096.0):
        inputs.bias = (inputs.bias.detach() * 0 + shift).requires_grad_()
        plain = attend(Inputs(inputs.query, inputs.key, inputs.value, inputs.grad_out), GridCase())
        torch.testing.assert_close(attend(inputs, GridCase()), plain, rtol=5e-3, atol=5e-3)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [GridCase(rows=11), GridCase(1, 1, rows=9, columns=13, step=(1, 1))], ids=str)
def test_scores_far_below_those_of_absent_tokens(case: GridCase, dtype: torch.dtype, device: torch.device) -> None:
    """Groups leave room in their last tile: weights of tokens that are not there must stay 0, not exp(0 - lse)."""
    inputs = make_inputs(case, dtype, device)
    inputs.query = (inputs.query.detach() * 0.125 + 8).requires_grad_()
    inputs.key = (inputs.key.detach() * 0.125 - 8).requires_grad_()
    assert_grid_close(run_grid(inputs, case), inputs, case)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_reaches_exactly_its_group(
    number: float, name: str, partition: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = GridCase(rows=11, columns=9, partition=partition, step=(3, 4))
    inputs = make_inputs(case, dtype, device)
    expected = run_grid(inputs, case)
    tensor = getattr(inputs, name).detach().clone()
    tensor[1, 0, 5, 6, 3] = number
    setattr(inputs, name, tensor.requires_grad_(name != "grad_out"))
    actual = run_grid(inputs, case)
    if name == "grad_out" and number == number:
        # A sum over keys of opposite infinities is NaN to the oracle; its equal, the product with out, is not.
        for result, tensor in reference_grid(inputs, case).items():
            assert torch.equal(actual[result].isfinite(), tensor.isfinite()), result
    else:
        assert_grid_close(actual, inputs, case)
    row_group = group_and_number(case.rows, 3, partition)[0]
    column_group = group_and_number(case.columns, 4, partition)[0]
    inside = (row_group == row_group[5])[:, None] & (column_group == column_group[6])
    outside = torch.ones(case.shape()[:-1], dtype=torch.bool, device=device)
    outside[1, 0] = ~inside.to(device)
    for result, tensor in actual.items():
        assert_bitwise_equal(result, tensor[outside], expected[result][outside])
    if name == "key" and number != number:
        assert actual["out"][~outside].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_bias_that_is_not_finite(number: float, dtype: torch.dtype, device: torch.device) -> None:
    """It reaches the queries it is added for, in every group that has them, and no other."""
    case = GridCase(rows=11, columns=9, step=(3, 4), has_bias=True)
    inputs = make_inputs(case, dtype, device)
    assert inputs.bias is not None
    bias = inputs.bias.detach().clone()
    bias[1, 5, 2] = number
    inputs.bias = bias.requires_grad_()
    result = run_grid(inputs, case)
    assert_grid_close(result, inputs, case)
    # Number 5 is row 1 and column 2 of a group of at most 4 x 3 tokens.
    assert result["out"][:, 1, 3:6, 8].isnan().all()
    result["out"][:, 1, 3:6, 8] = 0
    assert result["out"].isfinite().all()


def test_many_keys_that_are_not_finite(device: torch.device) -> None:
    """In the first and in later tiles of keys."""
    case = GridCase(batch=1, num_heads=1, rows=15, columns=20, step=(1, 1), head_dim=8, has_bias=True)
    for place, number in (((0, 0), torch.nan), ((14, 19), torch.nan), ((7, 3), torch.inf), ((14, 0), -torch.inf)):
        inputs = make_inputs(case, torch.float32, device)
        value = inputs.value.detach().clone()
        value[0, 0, place[0], place[1], 5] = number
        inputs.value = value.requires_grad_()
        assert_grid_close(run_grid(inputs, case), inputs, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(dtype: torch.dtype, device: torch.device) -> None:
    """Weights that underflow, and scores far beyond what an exponential holds."""
    case = GridCase(rows=9, columns=16, step=(1, 1), scale=40.0)
    inputs = make_inputs(case, dtype, device)
    result = run_grid(inputs, case)
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert_grid_close(result, inputs, case)
