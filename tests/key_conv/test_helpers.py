"""The checks of the key convolution are checked: right data passes, planted wrong data fails."""

import pytest
import torch
from torch import Tensor

from tests.common.tensors import DTYPES
from tests.key_conv.helpers import LAYOUTS, Inputs, KeyConvCase, assert_key_conv_close, make_inputs, reference_key_conv

CPU = torch.device("cpu")
CASES = [KeyConvCase(has_state=True), KeyConvCase(lengths=(9, 0, 20), width=5)]
# The least relative error of the largest element that must not pass.
NOTICED = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}


def right_results(inputs: Inputs) -> dict[str, Tensor]:
    """The oracle's, rounded once."""
    return {name: tensor.to(inputs.key.dtype) for name, tensor in reference_key_conv(inputs).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_accepts_the_reference(case: KeyConvCase, layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, CPU, 0, layout)
    assert_key_conv_close(right_results(inputs), inputs, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["out", "d_key", "d_weight", "d_state"])
def test_check_rejects(name: str, dtype: torch.dtype) -> None:
    """One element too large, one NaN, one of the other sign, rows in another order, another dtype."""
    case = CASES[0]
    inputs = make_inputs(case, dtype, CPU)
    right = right_results(inputs)
    largest = tuple(torch.unravel_index(right[name].abs().argmax(), right[name].shape))
    for factor in (1 + NOTICED[dtype], torch.nan, -1):
        wrong = right[name].clone()
        wrong[largest] *= factor
        with pytest.raises(AssertionError, match=name):
            assert_key_conv_close(right | {name: wrong}, inputs, case)
    for wrong in (right[name].flip(-2), right[name].to(torch.complex64)):
        with pytest.raises(AssertionError, match=name):
            assert_key_conv_close(right | {name: wrong}, inputs, case)
    with pytest.raises(AssertionError, match="results"):
        assert_key_conv_close({key: value for key, value in right.items() if key != name}, inputs, case)
