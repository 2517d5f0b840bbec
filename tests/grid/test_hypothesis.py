"""Grid and window attention over random shapes and layouts: what no list of cases thinks of."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.grid.helpers import LAYOUTS, PARTITIONS, GridCase, assert_grid_close, check_grid, make_inputs, run_grid

BOUNDED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
STEP = st.one_of(st.integers(1, 9), st.integers(1, 2**31 - 1))


@st.composite
def grid_cases(draw: st.DrawFn) -> GridCase:
    return GridCase(
        batch=draw(st.integers(0, 3)),
        num_heads=draw(st.integers(0, 4)),
        rows=draw(st.integers(0, 17)),
        columns=draw(st.integers(0, 17)),
        head_dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128]))),
        partition=draw(st.sampled_from(PARTITIONS)),
        step=(draw(STEP), draw(STEP)),
        has_bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.3, -1.0])),
    )


def supported(dtype: torch.dtype, device_kind: str) -> torch.dtype:
    """``dtype`` itself, or what the device has in its place."""
    return widest_dtype(device_kind) if dtype == torch.float64 else dtype


@BOUNDED
@given(
    case=grid_cases(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
    wide_bias=st.booleans(),
)
def test_attention_equals_the_oracle(
    case: GridCase,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    wide_bias: bool,
    device: torch.device,
    device_kind: str,
) -> None:
    dtype = supported(dtype, device_kind)
    bias_dtype = torch.float32 if wide_bias and dtype != torch.float64 else None
    check_grid(case, dtype, device, layout, seed, bias_dtype)


@BOUNDED
@given(case=grid_cases(), data=st.data(), seed=st.integers(0, 2**20))
def test_nonfinite_masks_equal_the_oracle(
    case: GridCase, data: st.DataObject, seed: int, device: torch.device, device_kind: str
) -> None:
    """A few numbers of inputs become NaN or infinite. One a call: of several, the order of sums would matter."""
    inputs = make_inputs(case, widest_dtype(device_kind), device, seed)
    name = data.draw(st.sampled_from(["query", "key", "value", "bias"] if case.has_bias else ["query", "key", "value"]))
    tensor = getattr(inputs, name).detach().clone()
    if tensor.numel():
        place = data.draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    setattr(inputs, name, tensor.requires_grad_())
    assert_grid_close(run_grid(inputs, case), inputs, case)


@BOUNDED
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), grid_size=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_grid_size_bounds_the_tokens_of_a_group(
    rows: int, columns: int, grid_size: tuple[int, int], device: torch.device
) -> None:
    """A bias has the sides that follow from the strides, and no other is taken."""
    stride = (-(-rows // grid_size[0]), -(-columns // grid_size[1]))
    most = -(-rows // stride[0]) * -(-columns // stride[1])
    assert most <= grid_size[0] * grid_size[1]
    image = torch.randn(1, 1, rows, columns, 2, device=device)
    bias = torch.randn(1, most, most, device=device)
    out = tg.grid_attention(image, image, image, grid_size, bias=bias)
    assert_bitwise_equal("out", out, tg.grid_attention(image, image, image, stride=stride, bias=bias))
