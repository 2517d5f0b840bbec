"""Choices of transformers models, recorded and replayed: a rollout, and training on it."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("transformers") is None:  # importorskip would hide a broken one too
    pytest.skip("transformers is not installed", allow_module_level=True)

import topgather as tg
from tests.transformers.test_integration import greedy, llama, padded, tokens
from topgather.integrations import transformers as moba


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register(block_size=8, top_k=3)
    yield
    moba.register()


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each token after the first, given those before it."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def test_training_goes_by_the_blocks_of_a_rollout() -> None:
    """A policy that has moved on since its rollout, as in reinforcement learning."""
    model, prompt = llama(), tokens(2, 30)
    with tg.record_routing() as record:
        ids = greedy(model, prompt, num_new=20)
    assert record.num_calls == 2 * 20  # layers by forwards: the last token is not read
    rollout = record.by_layer(2)
    with torch.no_grad(), tg.record_routing() as whole:
        before = log_probabilities(model, ids)
    for left, right in zip(rollout, whole, strict=True):
        assert torch.equal(left.block_indices, right.block_indices)
    with tg.replay_routing(rollout):
        now = log_probabilities(model, ids)
    assert torch.equal((now - before).exp(), torch.ones_like(now))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tg.record_routing() as moved:
        own = log_probabilities(model, ids)
    assert any(not torch.equal(a.block_indices, b.block_indices) for a, b in zip(moved, whole, strict=True))
    with tg.replay_routing(rollout):
        replayed = log_probabilities(model, ids)
    assert not torch.equal(replayed, own)
    replayed.sum().backward()


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_checkpoints(side: str, checkpoints: bool) -> None:
    model, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids, mask = padded([40, 23], side)
    with torch.no_grad(), tg.record_routing() as record:
        other(ids, attention_mask=mask, use_cache=False)
    assert record[0].block_indices.shape == (4, 63, 3)
    with tg.replay_routing(record):
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    expected[mask.bool()].square().mean().backward()
    again = llama()
    if checkpoints:
        again.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with tg.replay_routing(record):
        actual = again(ids, attention_mask=mask, use_cache=False).logits
    actual[mask.bool()].square().mean().backward()
    assert torch.equal(actual, expected)
    for left, right in zip(again.parameters(), model.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert torch.equal(left.grad, right.grad)


def test_dense_layers_choose_nothing() -> None:
    model = llama(moba_dense_layers=[0])
    with torch.no_grad(), tg.record_routing() as record:
        model(tokens(1, 30))
    assert record.num_calls == 1
