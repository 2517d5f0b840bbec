"""The key convolution over random shapes, layouts and splits: what no list of cases thinks of."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.key_conv.helpers import (
    LAYOUTS,
    OPTIONS,
    KeyConvCase,
    assert_key_conv_close,
    check_key_conv,
    make_inputs,
    run_key_conv,
)

BOUNDED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def key_conv_cases(draw: st.DrawFn) -> KeyConvCase:
    dims = st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128, 530]))
    sizes = (
        draw(st.integers(0, 3)),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 90)),
        draw(dims),
        draw(st.integers(2, 8)),
    )
    options = draw(st.sampled_from([{}, {}, *OPTIONS]))
    if draw(st.booleans()):
        return KeyConvCase(*sizes, lengths=tuple(draw(st.lists(st.integers(0, 40), max_size=6))), **options)
    return KeyConvCase(*sizes, has_state=draw(st.booleans()), **options)


@BOUNDED
@given(
    case=key_conv_cases(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
    wide_weight=st.booleans(),
)
def test_equals_the_oracle(
    case: KeyConvCase,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    wide_weight: bool,
    device: torch.device,
    device_kind: str,
) -> None:
    dtype = widest_dtype(device_kind) if dtype == torch.float64 else dtype
    weight_dtype = torch.float32 if wide_weight and dtype != torch.float64 else None
    check_key_conv(case, dtype, device, layout, seed, weight_dtype)


@BOUNDED
@given(case=key_conv_cases(), data=st.data(), seed=st.integers(0, 2**20))
def test_nonfinite_masks_equal_the_oracle(
    case: KeyConvCase, data: st.DataObject, seed: int, device: torch.device, device_kind: str
) -> None:
    """A number of an input becomes NaN or infinite. One a call: of several, the order of sums would matter."""
    inputs = make_inputs(case, widest_dtype(device_kind), device, seed)
    name = data.draw(st.sampled_from(["key", "weight", "state"] if case.has_state else ["key", "weight"]))
    tensor = getattr(inputs, name).detach().clone()
    if tensor.numel():
        place = data.draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    setattr(inputs, name, tensor.requires_grad_())
    assert_key_conv_close(run_key_conv(inputs), inputs, case)


@BOUNDED
@given(
    pieces=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    head_dim=st.integers(1, 40),
    width=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_split_equals_the_whole(
    pieces: list[int],
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    device_kind: str,
) -> None:
    """The same bits, whatever the calls a sequence is cut into."""
    dtype = widest_dtype(device_kind) if dtype == torch.float64 else dtype
    case = KeyConvCase(num_tokens=sum(pieces), head_dim=head_dim, width=width, has_state=True)
    inputs = make_inputs(case, dtype, device, seed)
    assert inputs.state is not None
    key, weight, state = inputs.key.detach(), inputs.weight.detach(), inputs.state.detach()
    whole, last_state = tg.key_conv(key, weight, state=state)
    outs = []
    for piece in key.split(pieces, dim=2):
        out, state = tg.key_conv(piece, weight, state=state)
        outs.append(out)
    assert_bitwise_equal("out", torch.cat(outs, dim=2), whole)
    assert_bitwise_equal("state", state, last_state)
