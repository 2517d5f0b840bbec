"""The layer with an indexer: what it computes, what each loss trains, how it learns, records and replays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import topgather as tg
from tests.common.tensors import assert_bitwise_equal

OPTIONS: dict[str, Any] = {"num_kv_heads": 2, "index_dim": 8, "block_size": 4, "top_k": 3}


def make(**changed: Any) -> tuple[tg.nn.IndexedAttention, Tensor]:
    torch.manual_seed(0)
    return tg.nn.IndexedAttention(32, 4, **(OPTIONS | changed)), torch.randn(2, 30, 32)


def names_with_gradient(layer: nn.Module) -> set[str]:
    return {name for name, parameter in layer.named_parameters() if parameter.grad is not None}


def test_it_is_its_parts(device: torch.device) -> None:
    layer, x = make(position_embedding=lambda query, key: (query.flip(-1), key.flip(-1)), force_first=1)
    layer, x = layer.to(device), x.to(device)

    def heads(projection: nn.Module, norm: nn.Module, dim: int) -> Tensor:
        made: Tensor = norm(projection(x).view(2, 30, -1, dim)).flip(-1).transpose(1, 2)
        return made

    query, key = heads(layer.query_proj, layer.query_norm, 8), heads(layer.key_proj, layer.key_norm, 8)
    index_query = heads(layer.index_query_proj, layer.index_query_norm, 8)
    index_key = heads(layer.index_key_proj, layer.index_key_norm, 8)
    value = layer.value_proj(x).view(2, 30, 2, 8).transpose(1, 2)
    routing = tg.index_route(index_query, index_key, 4, 3, force_first=1)
    attended, lse = tg.moba_attention(query, key, value, 4, routing=routing, return_lse=True)
    out, loss = layer(x, stage="sparse")
    torch.testing.assert_close(out, layer.out_proj(attended.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(loss, tg.index_loss(index_query, index_key, query, key, lse, routing, 4))
    assert_bitwise_equal("without a loss", layer(x), out)
    attended, lse = tg.moba_attention(query, key, value, 4, return_lse=True)
    out, loss = layer(x, stage="dense")
    torch.testing.assert_close(out, layer.out_proj(attended.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(loss, tg.index_loss(index_query, index_key, query, key, lse, None, 4))


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_each_loss_trains_its_part(stage: Any) -> None:
    layer, x = make()
    out, loss = layer(x.requires_grad_(), stage=stage)
    loss.backward()
    indexer = {name for name, _ in layer.named_parameters() if name.startswith("index_")}
    assert names_with_gradient(layer) == indexer and x.grad is None
    assert {id(parameter) for parameter in layer.indexer_parameters()} == {
        id(parameter) for name, parameter in layer.named_parameters() if name in indexer
    }
    layer.zero_grad()
    out.square().sum().backward()
    assert names_with_gradient(layer) == {name for name, _ in layer.named_parameters()} - indexer


def test_training_loop() -> None:
    """Warm-up, then the sparse stage: the loss of the indexer falls in both, beside the task's."""
    layer, x = make(top_k=4)
    target = torch.randn(2, 30, 32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for stage in ("dense", "sparse"):
        losses = []
        for _ in range(15):
            out, loss = layer(x, stage=stage)
            total = (out - target).square().mean() + loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append((float(total.detach()), float(loss.detach())))
        assert losses[-1][0] < losses[0][0] and losses[-1][1] < 0.9 * losses[0][1]


def test_record_replay_and_checkpoint() -> None:
    layer, x = make()
    with tg.record_routing() as record:
        expected = layer(x)
        layer(x, stage="dense")
    assert len(record) == 1 and record[0].block_indices.shape == (2, 2, 30, 3)
    with torch.no_grad():
        layer.index_key_proj.weight.neg_()
    assert not torch.equal(layer(x), expected)
    with tg.replay_routing(record):
        assert_bitwise_equal("replayed", layer(x), expected)
        assert_bitwise_equal("dense", layer(x, stage="dense")[0], layer(x, stage="dense")[0])
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert_bitwise_equal("checkpoint", found, wanted)


def test_one_compiled_graph() -> None:
    layer, x = make()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for stage in (None, "sparse"):
        found, expected = compiled(x, stage), layer(x, stage)
        torch.testing.assert_close(found, expected)


def test_autocast() -> None:
    layer, x = make()
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = layer(x, stage="sparse")
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (out.float().square().mean() + loss).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("changed", "exception", "message"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads, 4, got 3"),
        ({"index_dim": 0}, ValueError, "index_dim must be between 1"),
        ({"reduction": "relu_sum"}, ValueError, "reduction must be 'max' or 'mean', got 'relu_sum'"),
        ({"force_first": 3}, ValueError, "force_first and force_last must together be at most top_k, 3"),
        ({"force_last": 1.0}, TypeError, "force_last must be an int"),
        ({"position_embedding": 3}, TypeError, "position_embedding must be callable or None, got int"),
        ({"bias": 1}, TypeError, "bias must be a bool"),
    ],
)
def test_bad_options(changed: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        make(**changed)


def test_bad_input() -> None:
    layer, x = make()
    for wrong, exception, message in (
        (x[0], ValueError, "x must have 3 dimensions"),
        (x[..., 1:], ValueError, "x must have size 32 in dimension 2"),
        (x.long(), TypeError, "x must have one of the dtypes"),
        ([1.0], TypeError, "x must be a torch.Tensor"),
    ):
        with pytest.raises(exception, match=message):
            layer(wrong)
    with pytest.raises(ValueError, match="stage must be 'dense', 'sparse' or None, got 'warm'"):
        layer(x, stage="warm")
    with pytest.raises(TypeError, match="stage must be a str or None, got int"):
        layer(x, stage=1)
