"""Forced blocks and a window beside the choice, in transformers models: training, prefill, decoding, padded."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:  # importorskip would hide a broken one too
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers import AttentionInterface, AttentionMaskInterface

import topgather as tg
from tests.transformers.test_integration import greedy, llama, padded, positions_of, recomputed, tokens
from topgather.integrations import transformers as moba

OPTIONS: list[dict[str, Any]] = [{"force_first": 1, "force_last": 2}, {"window": 11}, {"force_first": 1, "window": 5}]
ALL = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    moba.register()


def by_hand(options: dict[str, Any], **config: Any) -> Any:
    """A model whose attention is one call of the op, for batches without padding and without a cache."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        out = tg.moba_attention(query, key, value, 8, 3, **options)
        return out.transpose(1, 2), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)
    return llama("by_hand", **config)


@ALL
def test_training(options: dict[str, Any]) -> None:
    """Logits and gradients are those of the op with these options, and others than without."""
    moba.register(block_size=8, top_k=3, **options)
    ids, model, expected = tokens(2, 50), llama(), by_hand(options)
    plain = expected(ids).logits
    plain.square().mean().backward()
    logits = model(ids).logits
    logits.square().mean().backward()
    assert torch.equal(logits, plain)
    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None and torch.equal(left.grad, right.grad)
    moba.register(block_size=8, top_k=3)
    assert (model(ids).logits - logits).abs().max() > 1e-3


@ALL
def test_generation(options: dict[str, Any]) -> None:
    """Prefill and single tokens over a cache choose and see what whole sequences do."""
    moba.register(block_size=8, top_k=3, **options)
    ids = tokens(2, 41)
    expected = recomputed(by_hand(options), ids, 24)
    assert torch.equal(greedy(llama(), ids), expected)
    moba.register(block_size=8, top_k=3)
    assert not torch.equal(greedy(llama(), ids), expected)


@ALL
def test_padded(options: dict[str, Any]) -> None:
    """A sequence gives what it gives alone, with padding and in a batch that is generated from."""
    moba.register(block_size=8, top_k=3, **options)
    model, (ids, mask) = llama(), padded([45, 30], "left")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        for row, length in enumerate([45, 30]):
            alone = by_hand(options)(ids[row : row + 1, 45 - length :]).logits
            torch.testing.assert_close(logits[row, 45 - length :], alone[0], atol=1e-4, rtol=1e-4)
    generated = greedy(model, ids, 12, attention_mask=mask)
    for row, length in enumerate([45, 30]):
        expected = recomputed(by_hand(options), ids[row : row + 1, 45 - length :], 12)
        assert torch.equal(generated[row, 45 - length :], expected[0])


def test_the_config_has_them_and_dense_layers_none() -> None:
    """``config.moba_window`` of 0 is none; a dense layer neither forces blocks nor has a window."""
    ids = tokens(1, 50)
    moba.register(block_size=8, top_k=3)
    model = llama(moba_force_first=1, moba_force_last=2, moba_window=11)
    both = {"force_first": 1, "force_last": 2, "window": 11}
    assert torch.equal(model(ids).logits, by_hand(both)(ids).logits)
    moba.register(block_size=8, top_k=3, window=11)
    assert torch.equal(llama(moba_window=0)(ids).logits, by_hand({})(ids).logits)
    moba.set_moba(model, window=0, force_last=1)
    assert torch.equal(model(ids).logits, by_hand({"force_first": 1})(ids).logits)
    moba.set_moba(model, window=3, dense_layers=[0, 1])
    dense = llama("sdpa")(ids).logits
    torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be at least what force_first and force_last make together, 4"):
        moba.register(top_k=3, force_first=2, force_last=2)
    with pytest.raises(ValueError, match="window must be between 1 and"):
        moba.register(window=0)
    moba.register(top_k=4, force_first=2, force_last=2)
    with pytest.raises(ValueError, match="top_k must be at least what force_first and force_last make together, 4"):
        llama(moba_top_k=3)
    model = llama()
    with pytest.raises(ValueError, match="top_k must be at least"):
        moba.set_moba(model, force_first=3)
    assert not hasattr(model.config, "moba_force_first")
