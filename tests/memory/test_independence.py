"""A token's results do not depend on its place in the call."""

import pytest
import torch

import topgather as tg
from tests.common.tensors import assert_bitwise_equal
from tests.memory.helpers import LookupCase, make_lookup

pytestmark = pytest.mark.sanitize

SMALL_LOOKUP = LookupCase(num_rows=100, width=20, num_tokens=60, pattern="power_law")


def test_the_order_of_tokens_does_not_change_their_sums(device: torch.device) -> None:
    """A bag is summed in the order of its entries, whichever token it is."""
    lookup = make_lookup(SMALL_LOOKUP, torch.float32, device)
    with torch.no_grad():
        out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights)
        dots = torch.ops.topgather.memory_dot(lookup.values_in, lookup.indices, lookup.x)
        indices, weights, x = (t.roll(7, 0) for t in (lookup.indices, lookup.weights, lookup.x))
        assert_bitwise_equal("out", tg.memory_lookup(lookup.values, indices, weights), out.roll(7, 0))
        rolled = torch.ops.topgather.memory_dot(lookup.values_in, indices, x)
        assert_bitwise_equal("dots", rolled, dots.roll(7, 0))
