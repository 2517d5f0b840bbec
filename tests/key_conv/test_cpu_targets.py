"""Every instruction set this machine has runs the same compact set of the key convolution's cases."""

from typing import Any

import pytest
import torch

import topgather as tg
from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.key_conv.helpers import (
    KeyConvCase,
    assert_key_conv_close,
    check_key_conv,
    make_inputs,
    run_key_conv,
    with_options,
)

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target")]
CPU = torch.device("cpu")

CASES = [
    *(KeyConvCase(width=width, has_state=True) for width in range(2, 9)),
    # Channels that fill any number of vectors, and one less and one more.
    *(KeyConvCase(batch=1, num_heads=1, num_tokens=9, head_dim=n) for n in (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63)),
    KeyConvCase(batch=1, num_heads=9, num_tokens=70, head_dim=72, has_state=True),
    KeyConvCase(batch=1, num_heads=1, num_tokens=40, head_dim=600, width=5),
    KeyConvCase(lengths=(90, 0, 1, 150, 7), width=5, num_heads=8, head_dim=64),
]
OPTIONAL = with_options([*CASES[:7:3], CASES[11], CASES[17], CASES[-3], CASES[-1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + OPTIONAL, ids=str)
def test_against_reference(case: KeyConvCase, dtype: torch.dtype) -> None:
    check_key_conv(case, dtype, CPU)


@pytest.mark.parametrize("layout", ["offset", "padded", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    check_key_conv(CASES[1], dtype, CPU, layout)
    check_key_conv(CASES[-1], dtype, CPU, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["key", "weight", "state", "grad_out"])
@pytest.mark.parametrize("options", [{}, {"has_bias": True, "activation": None}], ids=str)
def test_numbers_that_are_not_finite(options: dict[str, Any], name: str, number: float, dtype: torch.dtype) -> None:
    case = KeyConvCase(num_tokens=30, head_dim=20, width=4, has_state=True, **options)
    inputs = make_inputs(case, dtype, CPU)
    tensor = getattr(inputs, name).detach().clone()
    for channel in (2, 19):  # in a whole vector and in what is left over
        tensor[(1, channel, 1) if name == "weight" else (1, 0, 1, channel)] = number
    setattr(inputs, name, tensor.requires_grad_(name != "grad_out"))
    assert_key_conv_close(run_key_conv(inputs), inputs, case)


@pytest.mark.parametrize("head_dim", [16, 17])
def test_every_number_of_16_bits_passes_through(head_dim: int) -> None:
    """Weights of zeros: what comes out is what went in, as float32 to the dtype rounds it. NaN stay NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        tokens = 2**16 // head_dim
        key = every[: tokens * head_dim].view(1, 1, tokens, head_dim)
        is_finite = key.isfinite()
        alone = torch.where(is_finite, key, 0)
        out = tg.key_conv(alone, torch.zeros(1, head_dim, 2, dtype=dtype))
        assert torch.equal(out, alone)
        other = tg.key_conv(torch.where(is_finite, 0, key), torch.zeros(1, head_dim, 2, dtype=dtype))
        assert other[~is_finite].isnan().all()  # 0 * inf among them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 17])
def test_rounding_to_16_bits(head_dim: int, dtype: torch.dtype) -> None:
    """To nearest, ties to even, over the whole range: doubled keys, halved by no exact factor."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(1, 1, 500, head_dim).uniform_(-30, 14, generator=generator).exp2()
    key = (exponents * torch.randn(exponents.shape, generator=generator)).to(dtype)
    weight = torch.zeros(1, head_dim, 2)
    weight[..., 1] = 1000.0
    # Positive sums this large pass SiLU unchanged: the result is 1001 times the key, rounded once.
    key = key.abs().clamp(min=0.1, max=60.0)
    out = tg.key_conv(key, weight)
    assert_bitwise_equal("out", out, (key.double() * 1001).to(torch.float32).to(dtype))
