"""What numbers that are not finite cost: a step that a gradient scaler throws away must not stall the device.

``docs/performance-cuda.md`` has what it comes to at 64K tokens. Here the emulator counts what a kernel does: accesses
of memory, asynchronous copies and products of matrices, of a problem of finite numbers and of the same with others.
"""

from typing import Any

import pytest
import torch

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_gradients, make_inputs
from tests.common import emulated

# Lists of many entries, of which the block's own queries are few: as in long sequences.
CASE = AttentionCase(num_heads=1, query_len=512, head_dim=32, block_size=32, top_k=4)
LARGE_BLOCKS = AttentionCase(num_heads=1, query_len=480, head_dim=32, block_size=160, top_k=2)
KINDS = {"NaN": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def count(module: Any, call: Any) -> tuple[dict[str, int], Any]:
    module.reset_stats()
    result = call()
    return module.stats(), result


def assert_bounded(name: str, work: dict[str, int], finite: dict[str, int], most: float) -> None:
    """Neither copies more, nor more than ``most`` times the accesses."""
    assert work["async_copies"] <= finite["async_copies"], f"{name}: copies what it had"
    ratio = work["checked_accesses"] / finite["checked_accesses"]
    assert ratio <= most, f"{name}: {ratio:.1f} times the accesses of finite numbers"


def check_forward(case: AttentionCase, number: float, module: Any) -> None:
    """Every value is ``number``."""
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.bfloat16, torch.device("cpu")))
    routing = tg.moba_route(query, key, case.block_size, case.top_k)
    finite, _ = count(module, lambda: tg.moba_attention(query, key, value, case.block_size, routing=routing))
    value.fill_(number)
    work, out = count(module, lambda: tg.moba_attention(query, key, value, case.block_size, routing=routing))
    assert torch.equal(out.isnan(), torch.full_like(out, number).isnan()), "out: hidden values are seen"
    assert_bounded("forward", work, finite, 3.0)


def check_backward(case: AttentionCase, number: float, module: Any) -> None:
    """Every number of grad_out is ``number``."""
    inputs = make_inputs(case, torch.bfloat16, torch.device("cpu"))
    routing = tg.moba_route(inputs[0], inputs[1], case.block_size, case.top_k)
    out = tg.moba_attention(*inputs, case.block_size, routing=routing)
    grad_out, _ = make_gradients(case, torch.bfloat16, torch.device("cpu"), 0)
    finite, _ = count(module, lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True))
    work, gradients = count(module, lambda: torch.autograd.grad(out, inputs, torch.full_like(grad_out, number)))
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        assert not gradient.isfinite().any() or name == "query", f"d_{name}: does not show that grad_out is not finite"
    assert not gradients[0].isfinite().all(), "d_query: does not show that grad_out is not finite"
    assert_bounded("backward", work, finite, 8.0)


def check_route(top_k: int, number: float, most: float, module: Any) -> None:
    """Every number of a query is ``number``: scores are NaN, inf or -inf."""
    query, key, _ = (tensor.detach() for tensor in make_inputs(CASE, torch.bfloat16, torch.device("cpu")))
    finite, _ = count(module, lambda: tg.moba_route(query, key, 4, top_k))
    query.fill_(number)
    work, _ = count(module, lambda: tg.moba_route(query, key, 4, top_k))
    assert_bounded("route", work, finite, most)


def check_work(number: float, module: Any) -> None:
    """All of the above."""
    check_forward(CASE, number, module)
    check_forward(LARGE_BLOCKS, number, module)
    check_backward(CASE, number, module)
    check_route(4, number, 1.6, module)
    check_route(20, number, 0.92, module)


@pytest.mark.emulator
@pytest.mark.parametrize("number", KINDS.values(), ids=KINDS)
def test_work_is_bounded(number: float, cuda_device: torch.device) -> None:
    check_work(number, emulated.native())
