"""An image's results do not depend on what else is in the call."""

from dataclasses import replace

import pytest
import torch

from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.grid.helpers import GridCase, Inputs, make_inputs, run_grid

pytestmark = pytest.mark.sanitize

SMALL = GridCase(rows=13, columns=11, step=(4, 3), head_dim=24, has_bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Alone, or heads in another order: the same bits for its tokens. A bias sums over images, so it has none here."""
    case = replace(SMALL, batch=3, num_heads=3, has_bias=False)
    inputs = make_inputs(case, dtype, device)
    expected = run_grid(inputs, case)
    images = (inputs.query, inputs.key, inputs.value)
    alone = Inputs(*(t.detach()[1:2].requires_grad_() for t in images), inputs.grad_out[1:2])
    for name, tensor in run_grid(alone, replace(case, batch=1)).items():
        assert_bitwise_equal(name, tensor, expected[name][1:2])
    flipped = Inputs(*(t.detach().flip(1).requires_grad_() for t in images), inputs.grad_out.flip(1))
    for name, tensor in run_grid(flipped, case).items():
        assert_bitwise_equal(name, tensor, expected[name].flip(1))
