"""Choices of a whole forward: recorded, replayed, saved, shared; checkpoints, threads and compiled code with them."""

import asyncio
import copy
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import topgather as tg
from tests.block_attention.helpers import Packed
from tests.common.tensors import assert_bitwise_equal, random_tensor
from tests.decoding.helpers import DecodeCase, in_steps, make_cache, make_tokens
from topgather.ops import replay

CPU = torch.device("cpu")
NUM_LAYERS = 4
shows_checkpoints = pytest.mark.skipif(torch.__version__ < (2, 8), reason="refused with torch before 2.8")


class Model(nn.Module):
    """Residual layers of block attention, whose choices all differ."""

    def __init__(self, num_layers: int = NUM_LAYERS, use_reentrant: bool | None = None, top_k: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            tg.nn.MobaAttention(32, 4, num_kv_heads=2, block_size=8, top_k=top_k) for _ in range(num_layers)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.use_reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def tokens(seed: int = 0, count: int = 70) -> Tensor:
    return random_tensor((2, count, 32), torch.float32, CPU, seed)


def recorded(model: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> tuple[Tensor, tg.RoutingRecord]:
    with tg.record_routing(**options) as record:
        out = model(x)
    return out, record


def assert_same_choices(actual: tg.RoutingRecord, expected: tg.RoutingRecord) -> None:
    assert (len(actual), actual.num_calls) == (len(expected), expected.num_calls)
    for left, right in zip(actual, expected, strict=True):
        assert left.block_size == right.block_size
        assert torch.equal(left.block_indices, right.block_indices)


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))


def assert_same_tensors(actual: list[Tensor], expected: list[Tensor]) -> None:
    for number, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(f"tensor {number}", left, right)


# --- recording and replaying ------------------------------------------------------------------------------------------


def test_recording_changes_nothing_and_names_every_layer() -> None:
    model, x = Model(), tokens()
    expected = model(x)
    out, record = recorded(model, x)
    assert_bitwise_equal("out", out, expected)
    assert (len(record), record.num_calls, record.share_every) == (NUM_LAYERS, NUM_LAYERS, 1)
    for choice in record:
        assert choice.block_indices.dtype == torch.int32
        assert choice.block_indices.shape == (2, 4, 70, 3)
        assert choice.block_size == 8
    assert not torch.equal(record[0].block_indices, record[1].block_indices)
    assert_same_choices(tg.RoutingRecord(record[:]), record)


def test_another_model_goes_by_the_recorded_blocks() -> None:
    """Routing by other keys would choose other blocks."""
    model, x = Model(), tokens()
    _, record = recorded(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    own, own_record = recorded(other, x)
    assert any(not torch.equal(a.block_indices, b.block_indices) for a, b in zip(own_record, record, strict=True))
    with tg.replay_routing(record):
        out = other(x)
    assert not torch.equal(out, own)

    expected = x
    for layer, choice in zip(other.layers, record, strict=True):
        heads = [
            projection(expected).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (layer.query_proj, layer.key_proj, layer.value_proj)
        ]
        attended = tg.moba_attention(*heads, 8, routing=choice)
        expected = expected + layer.out_proj(attended.transpose(1, 2).flatten(2))
    assert_bitwise_equal("out", out, expected)
    assert_same_tensors(gradients(other, out), gradients(other, expected))


def test_importance_ratios_are_one() -> None:
    """The policy that is trained gives the tokens of a rollout the probabilities that the rollout had."""
    model, head = Model(), nn.Linear(32, 50)
    x, chosen = tokens(), torch.randint(0, 50, (2, 70, 1), generator=torch.Generator().manual_seed(1))

    def log_probabilities(x: Tensor) -> Tensor:
        return head(model(x)).log_softmax(-1).gather(-1, chosen)

    with torch.inference_mode():
        before, record = recorded(log_probabilities, x)
    with tg.replay_routing(record):
        now = log_probabilities(x)
    assert torch.equal((now - before).exp(), torch.ones_like(now))
    now.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("pages", [0, 1])
def test_training_goes_by_the_blocks_of_a_rollout(pages: int) -> None:
    """A prefill in chunks and single tokens choose, layer by layer, what one pass over all tokens replays."""
    case = DecodeCase(in_steps(33, 21, 1, 1, 1, batch=2), top_k=3, pages=pages)
    layers = [make_tokens(case, torch.float32, CPU, seed) for seed in (0, 50)]
    layers = [{name: torch.cat(getattr(each, name)) for name in ("query", "key", "value")} for each in layers]
    caches = [make_cache(case, torch.float32, CPU) for _ in layers]
    outs: list[list[Tensor]] = [[] for _ in layers]
    with tg.record_routing() as record, torch.inference_mode():
        start = 0
        for count, _ in case.steps:
            for layer, cache, steps in zip(layers, caches, outs, strict=True):
                query, key, value = (tensor[:, :, start : start + count] for tensor in layer.values())
                cache.append(key, value)
                steps.append(tg.moba_decode(query, cache, top_k=3))
            start += count
    assert (record.num_calls, record[0].block_indices.shape) == (10, (2, 4, 33, 3))
    joined = record.by_layer(2)
    assert (len(joined), joined.num_calls) == (2, 2)

    def one_pass() -> list[Tensor]:
        return [tg.moba_attention(**layer, block_size=8, top_k=3) for layer in layers]

    with tg.record_routing() as whole:
        one_pass()
    assert_same_choices(joined, whole)
    with tg.replay_routing(joined):
        replayed = one_pass()
    for steps, out in zip(outs, replayed, strict=True):
        torch.testing.assert_close(torch.cat(steps, dim=2), out)


def test_calls_that_choose_nothing_are_not_counted() -> None:
    query, key, value = (random_tensor((1, 2, 40, 8), torch.float32, CPU, seed) for seed in range(3))
    routing = tg.moba_route(query, key, 8, 2)
    cache = tg.MobaCache(1, 2, 8, block_size=8, max_seq_len=40)
    cache.append(key, value)

    def calls() -> None:
        tg.moba_attention(query, key, value, 8)
        tg.moba_attention(query, key, value, 8, routing=routing)
        tg.moba_route(query, key, 8, 2)
        tg.moba_decode(query, cache, top_k=None)
        tg.moba_decode(query, cache, routing=routing)

    with tg.record_routing() as record:
        calls()
        tg.moba_attention(query, key, value, 8, 2)
    assert record.num_calls == 1
    assert torch.equal(record[0].block_indices, routing.block_indices)
    with tg.replay_routing(record):
        tg.moba_decode(query, cache, top_k=2)
        calls()


def test_packed_sequences() -> None:
    packed = Packed(([30, 50], [30, 50]), torch.float32, CPU)
    with tg.record_routing() as record:
        expected = packed.run(8, 3, True)
    assert record[0].block_indices.shape == (4, 80, 3)
    assert torch.equal(
        record[0].block_indices,
        tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 8, 3).block_indices,
    )
    with tg.replay_routing(record):
        actual = packed.run(8, 3, True)
    assert_same_tensors(list(actual.tensors().values()), list(expected.tensors().values()))


def test_choices_by_hand_may_be_shared_by_heads() -> None:
    """A record is also a way to give a model a pattern of one's own: here the own block, and the first."""
    model, x = Model(), tokens()
    own = torch.arange(70, dtype=torch.int32) // 8
    pattern = torch.stack([torch.where(own > 0, 0, -1), own], dim=-1).int()[None, None].expand(2, 1, 70, 2)
    record = tg.RoutingRecord([tg.BlockRouting(pattern, 8)], share_every=NUM_LAYERS)
    with tg.replay_routing(record):
        out = model(x)
    alone = tg.RoutingRecord([tg.BlockRouting(pattern.expand(2, 4, 70, 2).contiguous(), 8)] * NUM_LAYERS)
    with tg.replay_routing(alone):
        assert_bitwise_equal("out", out, model(x))


def test_an_attention_that_fails_ends_the_context() -> None:
    model, x = Model(), tokens()
    with pytest.raises(ValueError, match="dim of the layer"), tg.record_routing() as record:
        model.layers[0](x)
        model.layers[0](x[..., 1:])
    assert record.num_calls == 1
    with pytest.raises(ValueError, match="dim of the layer"), tg.replay_routing(record):
        model(x[..., 1:])
    _, record = recorded(model, x)
    assert record.num_calls == NUM_LAYERS
    assert not tg.ops.replay.state.is_watched


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_every", [1, 3])
def test_saved_and_loaded(share_every: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, x = Model(), tokens()
    out, record = recorded(model, x, share_every=share_every)
    path = tmp_path / "choices.safetensors"
    record.save(path)
    loaded = tg.RoutingRecord.load(path)
    assert_same_choices(loaded, record)
    assert loaded.share_every == share_every
    with tg.replay_routing(loaded):
        assert_bitwise_equal("out", model(x), out)
    # Memory in common, and views of other tensors.
    by_hand = tg.RoutingRecord([record[0], record[0], tg.BlockRouting(record[0].block_indices[..., :2], 8)])
    by_hand.save(str(path))
    assert_same_choices(tg.RoutingRecord.load(str(path), device="cpu"), by_hand)
    tg.RoutingRecord().save(path)
    assert len(tg.RoutingRecord.load(path)) == 0


def test_files_of_others(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="path must name a file"):
        tg.RoutingRecord.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="path must name a file of safetensors"):
        tg.RoutingRecord.load(path)
    safetensors.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"path must name a file that RoutingRecord\.save wrote"):
        tg.RoutingRecord.load(path)
    safetensors.save_file({}, path, metadata={"format": "topgather.RoutingRecord", "version": "2"})
    with pytest.raises(ValueError, match="version 2: a later version of topgather"):
        tg.RoutingRecord.load(path)


# --- layers that share ------------------------------------------------------------------------------------------------


def test_layers_share_a_choice() -> None:
    model, x = Model(5), tokens()
    out, record = recorded(model, x, share_every=2)
    assert (len(record), record.num_calls, record.share_every) == (3, 5, 2)
    spread = tg.RoutingRecord([record[i // 2] for i in range(5)])
    for each in (record, spread):
        with tg.replay_routing(each):
            assert_bitwise_equal("out", model(x), out)
    assert not torch.equal(out, model(x))
    _, own = recorded(model, x)
    assert torch.equal(own[0].block_indices, record[0].block_indices)


def test_layers_that_cannot_share() -> None:
    layers = [Model(1), Model(1, top_k=2)]
    with pytest.raises(ValueError, match=r"share_every must join calls of one shape, got 2: call 1 has .* top_k of 2"):
        recorded(lambda x: layers[1](layers[0](x)), tokens(), share_every=2)
    with pytest.raises(ValueError, match="share_every must join calls of one shape"):
        recorded(lambda x: layers[0](layers[0](x)[:, 1:]), tokens(), share_every=2)


# --- records that do not fit ------------------------------------------------------------------------------------------


def test_records_that_do_not_fit() -> None:
    model, x = Model(), tokens()
    _, record = recorded(model, x)
    choice = record[0]
    indices = choice.block_indices

    def refused(message: str, *choices: tg.BlockRouting, model: Callable[[Tensor], Tensor] = model) -> None:
        with pytest.raises(ValueError, match=message), tg.replay_routing(tg.RoutingRecord(choices)):
            model(x)

    for wrong in (indices[:1], indices[:, :3], indices[:, :, 1:], indices[0], indices.repeat(1, 2, 1, 1)):
        refused(r"record does not fit: its choice for call 0 is \(", tg.BlockRouting(wrong, 8))
    refused("record does not fit: its choice for call 1", choice, tg.BlockRouting(indices, 16))
    refused(r"record does not fit: .* the call has queries \[2, 4, 70\], 70 keys in 2 heads, .* a top_k of 2", choice,
            model=Model(top_k=2))  # fmt: skip
    refused("record must have a choice for every call, got one of 3 calls", *record[:3])
    refused("record must be of as many calls as replay it, 4, got one of 5", *record, choice)
    out_of_range = indices.clone()
    out_of_range[0, 0, 69, 0] = 9
    record = tg.RoutingRecord([tg.BlockRouting(out_of_range, 8), *record[1:]])
    with pytest.raises(IndexError, match="block_indices holds 9"), tg.replay_routing(record):
        model(x)


@pytest.mark.parametrize("is_decoding", [False, True])
def test_a_refused_call_neither_chooses_nor_replays(is_decoding: bool) -> None:
    """Tried again, it is the call that it was."""
    query, key = (random_tensor(shape, torch.float32, CPU, 0) for shape in ((1, 4, 3, 8), (1, 2, 40, 8)))
    cache = tg.MobaCache(1, 2, 8, block_size=8, max_seq_len=40)
    cache.append(key, key)

    def attend(sinks: Tensor | None = None) -> Tensor:
        if is_decoding:
            return tg.moba_decode(query, cache, top_k=2, sinks=sinks, num_tokens=[3])
        return tg.moba_attention(query, key, key, 8, 2, sinks=sinks)

    def attend_at_last(sinks: Tensor) -> Tensor:
        attend()
        with pytest.raises(ValueError, match="sinks"):
            attend(sinks)
        return attend()

    too_many = torch.zeros(9)
    for share_every in (1, 2):
        with tg.record_routing(share_every) as record:
            expected = attend_at_last(too_many)
        assert (record.num_calls, len(record)) == (2, 2 // share_every)
        with tg.replay_routing(record):
            assert_bitwise_equal("out", attend_at_last(too_many), expected)


def test_a_copy_of_a_record_does_not_grow_with_it() -> None:
    with tg.record_routing() as record:
        Model(1)(tokens())
        copied = copy.copy(record)
        Model(1)(tokens())
    assert (len(copied), copied.num_calls, len(record)) == (1, 1, 2)


def test_wrong_arguments() -> None:
    _, record = recorded(Model(), tokens())
    for wrong in (record[0], record[:], None, "choices"):
        with pytest.raises(TypeError, match=r"record must be a topgather\.RoutingRecord"):
            tg.replay_routing(wrong)  # type: ignore[arg-type]
    for share_every in (0, -1):
        with pytest.raises(ValueError, match="share_every must be between 1"):
            tg.record_routing(share_every=share_every)
        with pytest.raises(ValueError, match="share_every must be between 1"):
            tg.RoutingRecord((), share_every)
    for wrong_count in (2.0, True, "2", None):
        with pytest.raises(TypeError, match="share_every must be an int"):
            tg.record_routing(share_every=wrong_count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"choices must be of topgather\.BlockRouting, got Tensor"):
        tg.RoutingRecord([record[0].block_indices])  # type: ignore[list-item]
    for num_calls in (3, 5):
        with pytest.raises(ValueError, match="num_calls must fit 4 choices of 1 calls"):
            tg.RoutingRecord(record, num_calls=num_calls)
    with pytest.raises(TypeError, match="num_layers must be an int"):
        record.by_layer(2.0)  # type: ignore[arg-type]
    for num_layers in (3, 8):
        with pytest.raises(ValueError, match="num_layers must be a multiple of share_every, 1, and divide"):
            record.by_layer(num_layers)
    with pytest.raises(ValueError, match="num_layers must be a multiple of share_every, 2"):
        tg.RoutingRecord(record, 2).by_layer(1)
    shorter = tg.BlockRouting(record[0].block_indices[:1], 8)
    packed = tg.BlockRouting(record[0].block_indices[0], 8)
    other = tg.BlockRouting(record[0].block_indices, 4)
    for choices in ([record[0], shorter], [packed, packed], [record[0], other]):
        with pytest.raises(ValueError, match="the choices of a layer must all be"):
            tg.RoutingRecord(choices).by_layer(1)


def test_contexts_within_one_another_are_refused() -> None:
    _, record = recorded(Model(), tokens())
    for outer in (tg.record_routing, partial(tg.replay_routing, tg.RoutingRecord())):
        for inner in (tg.record_routing, partial(tg.replay_routing, record)):
            with outer(), pytest.raises(ValueError, match="must not stand within"), inner():
                pass
    assert not tg.ops.replay.state.is_watched


# --- checkpoints ------------------------------------------------------------------------------------------------------


@shows_checkpoints
@pytest.mark.parametrize("is_inside", [True, False], ids=["backward inside", "backward after"])
def test_a_checkpoint_is_not_recorded_twice(is_inside: bool) -> None:
    plain, model, x = Model(), Model(use_reentrant=False), tokens().requires_grad_()
    expected = gradients(plain, plain(x))
    with tg.record_routing() as record:
        out = model(x)
        if is_inside:
            actual = gradients(model, out)
    if not is_inside:
        actual = gradients(model, out)
    assert record.num_calls == NUM_LAYERS
    assert_same_tensors(actual, expected)


@shows_checkpoints
@pytest.mark.parametrize("is_inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("num_threads", [0, 1])
def test_a_checkpoint_repeats_what_was_replayed(is_inside: bool, num_threads: int) -> None:
    """The backward comes to layers in reverse order, perhaps in another thread: each repeats its own choice."""
    x = tokens().requires_grad_()
    # Of other tokens: nothing that the model would choose by itself.
    _, record = recorded(Model(), tokens(seed=9))
    plain, model = Model(), Model(use_reentrant=False)
    with tg.replay_routing(record):
        expected = gradients(plain, plain(x))
    results: list[list[Tensor]] = []
    with tg.replay_routing(record):
        out = model(x)
        if is_inside:
            results.append(gradients(model, out))
    if not is_inside and num_threads == 0:
        results.append(gradients(model, out))
    elif not is_inside:
        thread = threading.Thread(target=lambda out: results.append(gradients(model, out)), args=(out,))
        thread.start()
        thread.join()
    assert_same_tensors(results[0], expected)
    with torch.no_grad():
        assert_bitwise_equal("out", model(x), Model()(x))  # the context is over
    del out
    assert not tg.ops.replay.state.is_watched


@shows_checkpoints
def test_checkpoints_of_several_layers_and_backwards() -> None:
    """A checkpoint around two layers, gone back through twice, and layers that share a choice over its edge."""
    model, x = Model(), tokens().requires_grad_()

    def halves(x: Tensor) -> Tensor:
        for first in (0, 2):

            def half(x: Tensor, first: int = first) -> Tensor:
                for layer in model.layers[first : first + 2]:
                    x = x + layer(x)
                return x

            x = checkpoint(half, x, use_reentrant=False)
        return x

    for share_every in (1, 3):
        _, record = recorded(model, tokens(seed=9), share_every=share_every)
        with tg.replay_routing(record):
            expected = torch.autograd.grad(model(x).square().sum(), x)
        with tg.replay_routing(record):
            out = halves(x).square().sum()
        for _ in range(2):
            assert_same_tensors(list(torch.autograd.grad(out, x, retain_graph=True)), list(expected))


@shows_checkpoints
def test_a_checkpoint_from_before_the_context_chooses_by_itself() -> None:
    model, x = Model(use_reentrant=False), tokens().requires_grad_()
    expected = gradients(model, model(x))
    out = model(x)
    with tg.record_routing() as record:
        assert_same_tensors(gradients(model, out), expected)
    assert record.num_calls == 0


@shows_checkpoints
def test_checkpoints_that_cannot_be_told_are_refused() -> None:
    x = tokens().requires_grad_()
    message = "cannot tell what is repeated by torch.utils.checkpoint with "
    with pytest.raises(ValueError, match=message + "use_reentrant=True"):
        recorded(Model(use_reentrant=True), x)
    model = Model(1, use_reentrant=False)
    with pytest.raises(ValueError, match=message + "a checkpoint within another one"):
        recorded(lambda x: checkpoint(model, x, use_reentrant=False), x)

    def with_hooks(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return Model(1)(x)

    with pytest.raises(ValueError, match=message + "hooks of saved tensors within the checkpoint"):
        recorded(lambda x: checkpoint(with_hooks, x, use_reentrant=False), x)
    with torch.no_grad():  # nothing is repeated
        recorded(lambda x: checkpoint(model, x, use_reentrant=False), x)

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return Model(1)(gradient)

    with tg.record_routing(), pytest.raises(ValueError, match="do not know which call is repeated in a backward"):
        InBackward.apply(x).sum().backward()


@shows_checkpoints
def test_a_function_that_repeats_more_is_refused() -> None:
    model, x, runs = Model(2), tokens().requires_grad_(), []

    def grows(x: Tensor) -> Tensor:
        runs.append(1)
        with torch.no_grad():
            for layer in model.layers[: len(runs)]:
                layer(x)
        return x.sin() * x.cos()

    with tg.record_routing():
        out = checkpoint(grows, x, use_reentrant=False)
    with pytest.raises(ValueError, match="chose blocks 1 times in its first pass"):
        out.sum().backward()


# --- threads, transforms, compiled code -------------------------------------------------------------------------------


def test_threads_have_records_of_their_own() -> None:
    model, x = Model(), tokens()
    _, expected = recorded(model, x)
    barrier = threading.Barrier(3)
    found: dict[str, Any] = {}

    def record(name: str, seed: int) -> None:
        barrier.wait()
        found[name] = recorded(model, tokens(seed))[1]

    def plain() -> None:
        barrier.wait()
        found["plain"] = model(x)

    threads = [
        threading.Thread(target=record, args=("first", 0)),
        threading.Thread(target=record, args=("second", 9)),
        threading.Thread(target=plain),
    ]
    with tg.record_routing() as own:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert own.num_calls == 0
    assert_same_choices(found["first"], expected)
    assert found["second"].num_calls == NUM_LAYERS
    assert not torch.equal(found["second"][0].block_indices, expected[0].block_indices)
    assert_bitwise_equal("out", found["plain"], model(x))


def test_one_context_in_several_threads() -> None:
    model, x = Model(), tokens()
    expected, record = recorded(model, x)
    context, barrier, found = tg.replay_routing(record), threading.Barrier(2), []

    def replay() -> None:
        with context:
            barrier.wait()
            found.append(model(x))
            barrier.wait()

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_tensors(found, [expected, expected])
    assert not tg.ops.replay.state.is_watched


def test_under_transforms() -> None:
    model, x = Model(), tokens()
    with pytest.raises(ValueError, match="record_routing cannot record what is under a transform"):
        recorded(torch.vmap(lambda x: model(x[None])[0]), x)
    _, record = recorded(model, x)
    with tg.replay_routing(record):
        assert torch.func.grad(lambda x: model(x).square().sum())(x).isfinite().all()


def test_compiled_code_records_and_replays() -> None:
    """Compiled anew, with its graph broken where blocks are chosen; the code from outside stays as it was."""
    torch._dynamo.reset()
    model, x = Model(), tokens()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(x)
    out, record = recorded(compiled, x)
    assert_bitwise_equal("out", out, expected)
    assert_same_choices(record, recorded(model, x)[1])
    _, others = recorded(model, tokens(seed=9))
    with tg.replay_routing(others):
        plain = model(x)
    with tg.replay_routing(others):
        assert_bitwise_equal("out", compiled(x), plain)
    assert_bitwise_equal("out", compiled(x), expected)
    torch._dynamo.reset()


def test_a_full_graph_is_refused_in_a_context_only() -> None:
    torch._dynamo.reset()
    model, x = Model(1), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    with pytest.raises(torch._dynamo.exc.Unsupported), tg.record_routing():
        compiled(x)
    assert_bitwise_equal("out", compiled(x), expected)
    torch._dynamo.reset()


def test_a_torch_that_does_not_show_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.8 a context refuses a checkpoint by torch's version; all else works."""
    model, x = Model(1, use_reentrant=False), tokens().requires_grad_()
    expected = recorded(Model(1), x)[1]
    monkeypatch.setattr("topgather.ops.replay._top_hooks", None)
    assert_same_choices(recorded(Model(1), x)[1], expected)
    model(x).sum().backward()
    message = f"checkpoint need torch 2.8 or newer, this is {torch.__version__}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        recorded(model, x)


def test_a_context_that_ends_elsewhere_ends() -> None:
    """A generator that another thread collects, or another task closes, leaves nothing behind where it began."""
    model, x = Model(1), tokens()

    def steps() -> Iterator[tg.RoutingRecord]:
        with tg.record_routing() as record:
            model(x)
            yield record

    async def asynchronous_steps() -> AsyncIterator[tg.RoutingRecord]:
        with tg.record_routing() as record:
            model(x)
            yield record

    async def closed_by_another_task() -> tg.RoutingRecord:
        generator = asynchronous_steps()
        record = await anext(generator)
        await asyncio.create_task(generator.aclose())
        model(x)
        return record

    suspended = steps()
    record = next(suspended)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(suspended.close).result()
    model(x)
    assert len(record) == 1 and not replay.state.is_watched
    assert len(asyncio.run(closed_by_another_task())) == 1 and not replay.state.is_watched
    assert len(recorded(model, x)[1]) == 1


def test_torch_load_takes_a_record(tmp_path: Path) -> None:
    record = recorded(Model(), tokens(), share_every=2)[1]
    torch.save(record, tmp_path / "record.pt")
    assert_same_choices(torch.load(tmp_path / "record.pt", weights_only=True), record)


def test_records_that_are_not_whole(tmp_path: Path) -> None:
    """A ``ValueError`` that names the file, whatever is missing or does not go together."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "record.safetensors"
    whole = {"format": "topgather.RoutingRecord", "version": 1, "share_every": 1, "num_calls": 1, "block_sizes": "[8]"}
    choice = torch.zeros(1, 1, 4, 2, dtype=torch.int32)

    def load(described: dict[str, Any], tensor: Tensor = choice) -> tg.RoutingRecord:
        metadata = {name: str(value) for name, value in described.items()}
        safetensors.save_file({"choice.0": tensor}, path, metadata=metadata)
        return tg.RoutingRecord.load(path)

    assert load(whole).num_calls == 1
    wrongs = [{name: value for name, value in whole.items() if name != missing} for missing in whole]
    changes: dict[str, list[Any]] = {
        "version": ["x", "-1"], "share_every": [0, "x"], "num_calls": [7, "x"],
        "block_sizes": ["[8, 8]", "8", "[8", '["8"]', "[0]"],
    }  # fmt: skip
    wrongs += [whole | {name: value} for name, values in changes.items() for value in values]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"^path must name .*{re.escape(str(path))}"):
            load(wrong)
    with pytest.raises(ValueError, match=r"^path must name .*int32"):
        load(whole, choice.long())
    with pytest.raises(FileNotFoundError, match="path must name a file"):
        tg.RoutingRecord.load(tmp_path)
