"""The key convolution against the oracle: results, every gradient, packed sequences, and state across calls."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.key_conv.helpers import (
    LAYOUTS,
    Inputs,
    KeyConvCase,
    assert_key_conv_close,
    check_key_conv,
    convolve,
    make_inputs,
    run_key_conv,
    with_options,
)
from topgather import reference

pytestmark = pytest.mark.sanitize

WIDTHS = range(2, 9)
CASES = [
    *(KeyConvCase(width=width, has_state=has_state) for width in WIDTHS for has_state in (False, True)),
    *(KeyConvCase(batch=1, head_dim=dim, width=4) for dim in (1, 3, 8, 17, 33, 64, 130)),
    KeyConvCase(batch=3, num_heads=5, num_tokens=11, head_dim=24, width=5, has_state=True),
    KeyConvCase(batch=1, num_heads=1, num_tokens=300, head_dim=8, width=8),
    # Wider than one task's panel of channels, and than one thread block's.
    KeyConvCase(batch=1, num_heads=9, num_tokens=70, head_dim=72, width=3),
    KeyConvCase(batch=1, num_heads=1, num_tokens=67, head_dim=600, width=6, has_state=True),
    # More tokens than a task takes.
    KeyConvCase(batch=2, num_heads=1, num_tokens=700, head_dim=130, width=4, has_state=True),
]
# Fewer tokens than the taps reach back, one among them.
SHORT = [
    KeyConvCase(num_tokens=num_tokens, width=width, has_state=has_state)
    for num_tokens in (1, 2, 5)
    for width in (3, 8)
    for has_state in (False, True)
]
PACKED = [
    KeyConvCase(lengths=(5, 0, 9, 1, 1, 30, 2, 0), width=3),
    KeyConvCase(lengths=(0, 0, 40, 3), width=8, head_dim=5),
    KeyConvCase(lengths=(1,) * 20, width=2, num_heads=3),
    KeyConvCase(lengths=(90, 150, 7, 80, 33), width=5, num_heads=8, head_dim=64),
    KeyConvCase(lengths=(64, 64, 128), width=4, head_dim=8),
]
OPTIONAL = with_options(
    [
        *(KeyConvCase(num_tokens=40, width=width, has_state=True) for width in (2, 4, 5, 8)),
        KeyConvCase(batch=1, head_dim=17, width=3),
        KeyConvCase(batch=1, num_heads=9, num_tokens=300, head_dim=72, width=3),
        KeyConvCase(num_tokens=2, width=8, has_state=True),
        PACKED[0],
        PACKED[1],
        PACKED[3],
    ]
)
EMPTY = [
    KeyConvCase(num_tokens=0),
    KeyConvCase(num_tokens=0, has_state=True),
    KeyConvCase(batch=0, has_state=True),
    KeyConvCase(num_heads=0),
    KeyConvCase(lengths=()),
    KeyConvCase(lengths=(0, 0)),
    KeyConvCase(num_tokens=0, has_bias=True),
    KeyConvCase(num_heads=0, has_bias=True),
    KeyConvCase(lengths=(), has_bias=True, activation=None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + SHORT + PACKED + OPTIONAL, ids=str)
def test_against_reference(case: KeyConvCase, dtype: torch.dtype, device: torch.device) -> None:
    check_key_conv(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        KeyConvCase(width=5, has_state=True),
        KeyConvCase(head_dim=7),
        KeyConvCase(lengths=(9, 4, 20)),
        KeyConvCase(width=5, has_state=True, has_bias=True, activation=None),
        KeyConvCase(lengths=(9, 4, 20), has_bias=True),
    ],
    ids=str,
)
def test_layouts(case: KeyConvCase, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    check_key_conv(case, dtype, device, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_side_by_side(dtype: torch.dtype, device: torch.device) -> None:
    """The transposed view of a projection: no copy, the same bits, and out and gradients are laid out as it is."""
    case = KeyConvCase(num_heads=3, num_tokens=150, head_dim=24, width=4, has_state=True)
    inputs = make_inputs(case, dtype, device)
    expected = run_key_conv(inputs)
    key = inputs.key.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    result = run_key_conv(replace(inputs, key=key))
    for name in ("out", "d_key"):
        assert result[name].stride() == key.stride()
        assert_bitwise_equal(name, result[name], expected[name])
    assert_key_conv_close(result, replace(inputs, key=key), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    check_key_conv(KeyConvCase(has_state=True), dtype, device, weight_dtype=torch.float32)
    check_key_conv(KeyConvCase(has_bias=True), dtype, device, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.usefixtures("deterministic")
def test_empty(case: KeyConvCase, dtype: torch.dtype, device: torch.device) -> None:
    """No tokens: the gradient of the weight, and of the state, is zeros."""
    check_key_conv(case, dtype, device)


def test_equals_a_convolution_of_torch(device: torch.device, device_kind: str) -> None:
    """causal-conv1d's convention: weight[..., W - 1] belongs to the current token, as in a padded F.conv1d."""
    case = KeyConvCase(num_heads=3, num_tokens=50, head_dim=12, width=4)
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    key, weight = inputs.key.detach().double(), inputs.weight.detach().double()
    channels = key.transpose(2, 3).flatten(1, 2)
    padded = F.pad(channels, (case.width - 1, 0))
    sums = F.conv1d(padded, weight.flatten(0, 1)[:, None], groups=channels.size(1)).view(key.mT.shape).mT
    expected = key + F.silu(sums)
    torch.testing.assert_close(convolve(inputs).detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.key_conv(key, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", None])
def test_equals_causal_conv1d_beside_its_keys(activation: str | None, device: torch.device, device_kind: str) -> None:
    """Bias and activation as ``causal_conv1d_fn`` has them, whose result is added to the keys here."""
    case = KeyConvCase(num_heads=3, num_tokens=50, head_dim=12, width=4, has_bias=True, activation=activation)
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    assert inputs.bias is not None
    key, weight, bias = (tensor.detach().double() for tensor in (inputs.key, inputs.weight, inputs.bias))
    channels = key.transpose(2, 3).flatten(1, 2)
    sums = F.conv1d(channels, weight.flatten(0, 1)[:, None], bias.flatten(), padding=case.width - 1, groups=36)
    convolved = sums[..., : case.num_tokens].view(key.mT.shape).mT
    expected = key + (convolved if activation is None else F.silu(convolved))
    torch.testing.assert_close(convolve(inputs).detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [KeyConvCase(width=5, has_state=True), PACKED[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_zeros_is_none(case: KeyConvCase, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_inputs(case, dtype, device)
    expected = run_key_conv(inputs)
    zeros = torch.zeros(case.num_heads, case.head_dim, dtype=dtype, device=device, requires_grad=True)
    result = run_key_conv(replace(inputs, bias=zeros))
    assert result.pop("d_bias").abs().max() > 0
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-2 if tensor.element_size() == 2 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("case", with_options([KeyConvCase(num_tokens=23, width=4, has_state=True)]), ids=str)
def test_state_with_options_gives_the_bits_of_one_call(case: KeyConvCase, device: torch.device) -> None:
    inputs = make_inputs(case, torch.float32, device)
    options = {"bias": inputs.bias, "activation": inputs.activation}
    state, parts = inputs.state, []
    for part in inputs.key.split([1, 2, 9, 11], dim=2):
        out, state = tg.key_conv(part, inputs.weight, state=state, **options)
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=2), convolve(inputs))


def test_a_weight_of_zeros_changes_nothing_and_learns(device: torch.device) -> None:
    inputs = make_inputs(KeyConvCase(), torch.float32, device)
    inputs.weight = torch.zeros_like(inputs.weight).requires_grad_()
    result = run_key_conv(inputs)
    assert torch.equal(result["out"], inputs.key.detach())
    assert_bitwise_equal("d_key", result["d_key"], inputs.grad_out)
    assert result["d_weight"].abs().min() > 0


# --- packed sequences and state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_each_sequence_alone(dtype: torch.dtype, device: torch.device) -> None:
    """The same bits."""
    case = KeyConvCase(lengths=(5, 0, 90, 1, 33, 2), width=5, num_heads=3, head_dim=24)
    inputs = make_inputs(case, dtype, device)
    result = run_key_conv(inputs)
    start = 0
    for length in case.lengths or ():
        part = slice(start, start + length)
        alone = Inputs(
            inputs.key.detach()[part].transpose(0, 1)[None].requires_grad_(),
            inputs.weight,
            inputs.grad_out[part].transpose(0, 1)[None],
        )
        for name, tensor in run_key_conv(alone).items():
            if name != "d_weight":
                assert_bitwise_equal(name, tensor[0].transpose(0, 1), result[name][part])
        start += length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 5, 8])
@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (20, 17), (1, 0, 30, 2, 4), (3, 1, 1, 0, 32)], ids=str)
def test_any_split_of_a_sequence_equals_the_whole(
    pieces: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The same bits, with the state handed on from call to call; it is what went before, unchanged."""
    case = KeyConvCase(width=width, has_state=True)
    inputs = make_inputs(case, dtype, device)
    assert inputs.state is not None
    key, weight, state = inputs.key.detach(), inputs.weight.detach(), inputs.state.detach()
    whole, last_state = tg.key_conv(key, weight, state=state)
    outs = []
    for piece in key.split(list(pieces), dim=2):
        before = state.clone()
        out, new_state = tg.key_conv(piece, weight, state=state)
        assert_bitwise_equal("the state given", state, before)
        outs.append(out)
        state = new_state
    assert_bitwise_equal("out", torch.cat(outs, dim=2), whole)
    assert_bitwise_equal("state", state, last_state)
    assert_bitwise_equal("state", state, torch.cat([inputs.state.detach(), key], dim=2)[:, :, key.size(2) :])


def test_a_state_of_zeros_is_a_start(device: torch.device) -> None:
    inputs = make_inputs(KeyConvCase(width=6), torch.float32, device)
    key, weight = inputs.key.detach(), inputs.weight.detach()
    out, _ = tg.key_conv(key, weight, state=key.new_zeros(2, 2, 5, 16))
    assert_bitwise_equal("out", out, tg.key_conv(key, weight))


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 37])
def test_new_state_is_a_tensor_of_its_own(num_tokens: int, device: torch.device) -> None:
    inputs = make_inputs(KeyConvCase(num_tokens=num_tokens, width=5, has_state=True), torch.float32, device)
    key, state = inputs.key.detach(), inputs.state.detach()  # type: ignore[union-attr]
    _, new_state = tg.key_conv(key, inputs.weight.detach(), state=state)
    expected = new_state.clone()
    assert new_state.is_contiguous()
    key.zero_()
    state.zero_()
    assert_bitwise_equal("state", new_state, expected)


def test_gradients_through_states(device: torch.device, device_kind: str) -> None:
    """A sequence cut in three, differentiated through the states handed on, equals the whole to rounding."""
    case = KeyConvCase(num_tokens=12, width=5, has_state=True)
    inputs = make_inputs(case, widest_dtype(device_kind), device)
    expected = run_key_conv(inputs)
    outs, state = [], inputs.state
    for piece in inputs.key.split([2, 1, 9], dim=2):
        assert state is not None
        out, state = tg.key_conv(piece, inputs.weight, state=state)
        outs.append(out)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(torch.cat(outs, dim=2), tuple(leaves.values()), inputs.grad_out)
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_the_new_state_is_differentiable(device: torch.device) -> None:
    inputs = make_inputs(KeyConvCase(num_tokens=3, width=6, has_state=True), torch.float32, device)
    _, new_state = tg.key_conv(inputs.key, inputs.weight, state=inputs.state)
    grad_key, grad_state = torch.autograd.grad(new_state.sum(), (inputs.key, inputs.state))
    assert (grad_key == 1).all()
    assert (grad_state[:, :, 3:] == 1).all() and (grad_state[:, :, :3] == 0).all()


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [3, 8])
def test_a_key_that_is_not_finite_reaches_exactly_who_sees_it(
    width: int, number: float, dtype: torch.dtype, device: torch.device
) -> None:
    case = KeyConvCase(num_tokens=30, width=width)
    inputs = make_inputs(case, dtype, device)
    key = inputs.key.detach().clone()
    key[1, 0, 11, 3] = number
    inputs.key = key.requires_grad_()
    result = run_key_conv(inputs)
    assert_key_conv_close(result, inputs, case)
    touched = ~result["out"].isfinite()
    expected = torch.zeros_like(touched)
    expected[1, 0, 11 : 11 + width, 3] = True
    # An infinity whose sum is -inf weighs nothing but is none the less there: -inf * 0.
    assert not (touched & ~expected).any()
    assert touched[1, 0, 11, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["weight", "state", "grad_out"])
def test_other_inputs_that_are_not_finite(name: str, number: float, dtype: torch.dtype, device: torch.device) -> None:
    case = KeyConvCase(num_tokens=30, width=4, has_state=True)
    inputs = make_inputs(case, dtype, device)
    tensor = getattr(inputs, name).detach().clone()
    tensor[(1, 3, 1) if name == "weight" else (1, 0, 1, 3)] = number
    setattr(inputs, name, tensor.requires_grad_(name != "grad_out"))
    assert_key_conv_close(run_key_conv(inputs), inputs, case)


def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone(device: torch.device) -> None:
    case = KeyConvCase(lengths=(10, 20, 12), width=8)
    inputs = make_inputs(case, torch.float32, device)
    expected = run_key_conv(inputs)
    key = inputs.key.detach().clone()
    key[10:30] = torch.nan
    result = run_key_conv(replace(inputs, key=key.requires_grad_()))
    for name in ("out", "d_key"):
        assert result[name][10:30].isnan().all()
        for part in (slice(0, 10), slice(30, 42)):
            assert_bitwise_equal(name, result[name][part], expected[name][part])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        KeyConvCase(batch=1, num_tokens=6, head_dim=2, width=3),
        KeyConvCase(batch=2, num_tokens=5, head_dim=1, width=8, has_state=True),
        KeyConvCase(num_heads=1, head_dim=3, width=2, lengths=(3, 0, 1, 4)),
        KeyConvCase(batch=1, num_tokens=0, head_dim=2, has_state=True),
    ],
    ids=str,
)
def test_numerical_gradients(case: KeyConvCase) -> None:
    inputs = make_inputs(case, torch.float64, torch.device("cpu"))

    def function(key: Tensor, weight: Tensor, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if state is None:
            return tg.key_conv(key, weight, inputs.cu_seqlens)
        return tg.key_conv(key, weight, state=state)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves().values()))


@pytest.mark.parametrize("name", ["key", "weight", "state"])
def test_double_backward_is_refused(name: str, device: torch.device, device_kind: str) -> None:
    inputs = make_inputs(KeyConvCase(has_state=True), widest_dtype(device_kind), device)
    expected = run_key_conv(inputs)
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(convolve(inputs), tuple(leaves.values()), inputs.grad_out, create_graph=True)
    for of_leaf, gradient in zip(leaves, gradients, strict=True):
        assert_bitwise_equal(of_leaf, gradient.detach(), expected[of_leaf])
    gradient = gradients[list(leaves).index(f"d_{name}")]
    with pytest.raises(RuntimeError, match="key_conv has no double backward"):
        torch.autograd.grad(gradient.square().sum(), inputs.key)


@pytest.mark.parametrize(
    "asked",
    [("key",), ("weight",), ("state",), ("bias",), ("weight", "state"), ("weight", "bias"), ("key", "bias")],
    ids="-".join,
)
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradients_of_some_inputs(asked: tuple[str, ...], activation: str | None, device: torch.device) -> None:
    inputs = make_inputs(KeyConvCase(has_state=True, has_bias=True, activation=activation), torch.float32, device)
    expected = run_key_conv(inputs)
    for name in {"key", "weight", "state", "bias"} - set(asked):
        setattr(inputs, name, getattr(inputs, name).detach())
    out = convolve(inputs)
    gradients = torch.autograd.grad(out, [getattr(inputs, name) for name in asked], inputs.grad_out)
    for name, gradient in zip(asked, gradients, strict=True):
        assert_bitwise_equal(name, gradient, expected[f"d_{name}"])


def test_random_problems(device: torch.device, device_kind: str) -> None:
    """What stands in for Hypothesis on the emulator."""
    generator = torch.Generator().manual_seed(0)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    for seed in range(12):
        case = KeyConvCase(draw(1, 3), draw(1, 3), draw(1, 60), draw(1, 40), draw(2, 8), has_state=bool(draw(0, 1)))
        if seed % 3 == 0:
            case = replace(case, lengths=tuple(draw(0, 12) for _ in range(draw(1, 6))), has_state=False)
        check_key_conv(case, (torch.float32, torch.bfloat16)[seed % 2], device, LAYOUTS[draw(0, 3)], seed)


def test_it_is_what_it_says_in_float64(device: torch.device, device_kind: str) -> None:
    """One number by hand: keys 1, 2, 3 of one channel, taps 0.5 on the current token and 0.25 on the one before."""
    key = torch.tensor([1.0, 2.0, 3.0], dtype=widest_dtype(device_kind), device=device).view(1, 1, 3, 1)
    weight = torch.tensor([0.25, 0.5], dtype=key.dtype, device=device).view(1, 1, 2)
    sums = torch.tensor([0.5, 0.25 + 1.0, 0.5 + 1.5], dtype=torch.float64)
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + sums / (1 + torch.exp(-sums))
    torch.testing.assert_close(tg.key_conv(key, weight).flatten().double().cpu(), expected, rtol=1e-6, atol=0)


def test_large_sums(device: torch.device) -> None:
    """SiLU of sums far from 0: the sum itself, or nothing."""
    key = random_tensor((1, 1, 20, 8), torch.float32, device, 0) * 1e3
    weight = torch.full((1, 8, 3), 10.0, device=device)
    out = tg.key_conv(key, weight)
    expected = reference.key_conv(key, weight)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-2)
    huge = tg.key_conv(torch.full((1, 1, 4, 8), -1e30, device=device), weight)
    assert_bitwise_equal("out", huge, torch.full((1, 1, 4, 8), -1e30, device=device))
