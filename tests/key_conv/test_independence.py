"""A sequence's results do not depend on what else is in the call."""

import pytest
import torch

from tests.common.tensors import DTYPES, assert_bitwise_equal
from tests.key_conv.helpers import Inputs, KeyConvCase, make_inputs, run_key_conv

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Alone, or heads in another order: the same bits. A weight sums over sequences, so its gradient is left out."""
    case = KeyConvCase(batch=3, num_heads=3, num_tokens=50, head_dim=24, has_state=True)
    inputs = make_inputs(case, dtype, device)
    expected = run_key_conv(inputs)
    assert inputs.state is not None
    key, state = inputs.key.detach(), inputs.state.detach()
    alone = Inputs(key[1:2].requires_grad_(), inputs.weight, inputs.grad_out[1:2], state[1:2].clone().requires_grad_())
    flipped = Inputs(
        key.flip(1).requires_grad_(),
        inputs.weight.detach().flip(0).requires_grad_(),
        inputs.grad_out.flip(1),
        state.flip(1).requires_grad_(),
    )
    for name, tensor in run_key_conv(alone).items():
        if name != "d_weight":
            assert_bitwise_equal(name, tensor, expected[name][1:2])
    for name, tensor in run_key_conv(flipped).items():
        assert_bitwise_equal(name, tensor, expected[name].flip(0 if name == "d_weight" else 1))
