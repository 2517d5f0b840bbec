"""What the ranks of ``test_mesh.py`` run: whole features on four processes, against one process.

    python -m tests.distributed.mesh_worker FOLDER

Rank r leaves ``FOLDER/rank{r}.pt``, a dict from the name of a check to "fine" or to the traceback of what it raised.
"""

import copy
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import _attention as torchs
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import topgather as tg
import topgather.distributed as tgd
from tests.common.tensors import random_tensor

WORLD_SIZE = 4
CPU = torch.device("cpu")


def close(actual: Any, expected: Tensor, name: str, tolerance: float = 1e-12) -> None:
    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0), (name, error)


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random_tensor(shape, dtype, CPU, seed) for seed, shape in enumerate(shapes)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# --- DTensors -------------------------------------------------------------------------------------------------------


def check_ops_take_dtensors(mesh: DeviceMesh, folder: Path) -> None:
    """Sharded over batch by one axis of the mesh and over heads by the other: nothing is sent, forward or backward."""
    query, key, value, grad, taps, sinks = made(
        (2, 4, 20, 8), (2, 2, 20, 8), (2, 2, 20, 6), (2, 4, 20, 6), (2, 8, 3), (4,)
    )
    whole = [leaf(tensor) for tensor in (query, key, value, taps, sinks)]

    def run(query: Tensor, key: Tensor, value: Tensor, taps: Tensor, sinks: Tensor) -> Tensor:
        return tg.moba_attention(query, tg.key_conv(key, taps), value, 4, 2, sinks=sinks)

    expected = run(*whole)
    expected.backward(grad)
    cut, of_heads = [Shard(0), Shard(1)], [Replicate(), Shard(0)]
    placements = [cut, cut, cut, of_heads, of_heads]
    parts = [distribute_tensor(tensor.detach(), mesh, where) for tensor, where in zip(whole, placements, strict=True)]
    parts = [part.requires_grad_() for part in parts]
    grad_part = distribute_tensor(grad, mesh, cut)
    with CommDebugMode() as sent:
        out = run(*parts)
        out.backward(grad_part)
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    assert list(out.placements) == cut  # type: ignore[attr-defined]
    close(out, expected.detach(), "out")
    for part, tensor in zip(parts, whole, strict=True):
        assert tensor.grad is not None
        close(part.grad, tensor.grad, "gradient")
    # Fewer key heads than an axis has ranks: gathered first, and right all the same.
    few = distribute_tensor(key[:, :1].contiguous(), mesh, cut), distribute_tensor(value[:, :1].contiguous(), mesh, cut)
    out = tg.moba_attention(parts[0].detach(), *few, 4, 2)
    close(out, tg.moba_attention(query, key[:, :1], value[:, :1], 4, 2), "one key head")


def check_other_ops_take_dtensors(mesh: DeviceMesh, folder: Path) -> None:
    """Packed sequences by their heads, one choice for all heads, centroids, grids of an image."""
    heads = mesh["tp"]
    query, key = made((20, 4, 8), (20, 2, 8))
    bounds = torch.tensor([0, 7, 20])
    expected, lse = tg.moba_attention_varlen(query, key, key, bounds, bounds, 13, 13, 4, 2, return_lse=True)
    packed = [distribute_tensor(tensor, heads, [Shard(1)]) for tensor in (query, key, key)]
    edges = distribute_tensor(bounds, heads, [Replicate()])
    out, lse_part = tg.moba_attention_varlen(*packed, edges, edges, 13, 13, 4, 2, return_lse=True)
    assert out.placements == (Shard(1),) and lse_part.placements == (Shard(0),)  # type: ignore[attr-defined]
    close(out, expected, "packed")
    close(lse_part, lse, "lse of packed")

    batch = query[None].transpose(1, 2), key[None].transpose(1, 2)
    shared = tg.moba_route(batch[0][:, :1].contiguous(), batch[1][:, :1].contiguous(), 4, 2)
    expected = tg.moba_attention(*batch, batch[1], 4, routing=shared)
    parts = [distribute_tensor(tensor, heads, [Shard(1)]) for tensor in (*batch, batch[1])]
    one_choice = tg.BlockRouting(distribute_tensor(shared.block_indices, heads, [Replicate()]), 4)
    out = tg.moba_attention(*parts, 4, routing=one_choice)
    assert out.placements == (Shard(1),)  # type: ignore[attr-defined]
    close(out, expected, "one choice")
    close(tg.block_centroids(parts[1], 4), tg.block_centroids(batch[1], 4), "centroids")

    image, bias = made((2, 2, 4, 4, 8), (2, 4, 4))
    whole = [leaf(image), leaf(bias)]
    tg.grid_attention(whole[0], whole[0], whole[0], 2, bias=whole[1]).square().sum().backward()
    cut = distribute_tensor(image, mesh, [Shard(0), Shard(1)]).requires_grad_()
    cut_bias = distribute_tensor(bias, mesh, [Replicate(), Shard(0)]).requires_grad_()
    tg.grid_attention(cut, cut, cut, 2, bias=cut_bias).square().sum().backward()
    for part, tensor in zip((cut, cut_bias), whole, strict=True):
        assert tensor.grad is not None
        close(part.grad, tensor.grad, "gradient of a grid")


def check_tensor_parallel_layer(mesh: DeviceMesh, folder: Path) -> None:
    """``MobaHeadwise`` over one axis, ``fully_shard`` over the other."""
    torch.manual_seed(1)

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query * torch.linspace(0.5, 1.5, query.size(-1)), key.flip(-1)

    layer = tg.nn.MobaAttention(
        16, 4, 2, block_size=4, top_k=2, kernel_size=3, position_embedding=rotate, dtype=torch.float64
    )
    assert layer.key_conv_weight is not None
    nn.init.normal_(layer.key_conv_weight)
    sharded = copy.deepcopy(layer)
    (x,) = made((4, 12, 16))
    expected = layer(x)
    expected.square().sum().backward()
    parallelize_module(sharded, mesh["tp"], tgd.MobaHeadwise())
    fully_shard(sharded, mesh=mesh["dp"])
    mine = mesh["dp"].get_local_rank()
    out = sharded(x.chunk(2)[mine])
    out.square().sum().backward()
    close(out.detach(), expected.detach().chunk(2)[mine], "out")
    for (name, whole), part in zip(layer.named_parameters(), sharded.parameters(), strict=True):
        assert whole.grad is not None and isinstance(part.grad, DTensor)
        close(2 * part.grad.full_tensor(), whole.grad, name)  # a mean over replicas
    refused(TypeError, "MobaHeadwise shards a topgather.nn.MobaAttention", nn.Linear(4, 4), mesh["tp"])
    odd = tg.nn.MobaAttention(9, 3, 3)
    refused(ValueError, "must divide num_kv_heads, 3, got 2", odd, mesh["tp"])
    refused(ValueError, "device_mesh must have one dimension", layer, mesh)


def refused(kind: type[Exception], words: str, module: nn.Module, mesh: DeviceMesh) -> None:
    try:
        tgd.MobaHeadwise()._apply(module, mesh)
    except kind as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(words)


# --- a cache --------------------------------------------------------------------------------------------------------


def check_sharded_cache(mesh: DeviceMesh, folder: Path) -> None:
    """Rows are those of one cache, and the same bits on all ranks, for prompts in pieces and new tokens."""
    for size, page_size, dtype in ((4, 4, torch.float64), (2, 8, torch.float64), (4, 8, torch.float32)):
        group = mesh["dp"] if size == 2 else dist.group.WORLD
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        query, key, value, sinks = made((2, 4, 61, 8), (2, 2, 61, 8), (2, 2, 61, 6), (4,), dtype=dtype)
        one = tg.MobaCache(2, 2, 8, block_size=4, max_seq_len=61, value_dim=6, dtype=dtype)
        options = {"block_size": 4, "max_seq_len": 61, "value_dim": 6, "dtype": dtype, "page_size": page_size}
        many = tgd.ShardedCache(group, 2, 2, 8, **options)
        first = 0
        # A prompt of which each rank has its own, another in order, and tokens that all have.
        for count, placement in ((19, "zigzag"), (0, None), (9, "contiguous"), (3, None), *[(1, None)] * 6, (5, None)):
            new = [tensor[:, :, first : first + count] for tensor in (key, value)]
            one.append(*new)
            if placement is None:
                many.append(*new)
            else:
                many.append_sharded(*(tgd.shard_sequence(part, group, 2, placement) for part in new), placement)
            first += count
            assert many.length == first
            for top_k in (3, None):
                for given in ({}, {"softcap": 2.0, "sinks": sinks}):
                    newest = query[:, :, max(first - 3, 0) : first]
                    counts = {"num_tokens": [newest.size(2)] * 2}
                    expected = tg.moba_decode(newest, one, top_k, return_lse=True, **counts, **given)
                    found = many.decode(newest, top_k, return_lse=True, **given)
                    for name, actual, wanted in zip(("out", "lse"), found, expected, strict=True):
                        close(actual, wanted, f"{name} after {first}", tolerance)
                    everywhere: list[Any] = [None] * size
                    dist.all_gather_object(everywhere, found, group=group if size == 4 else group.get_group())
                    assert all(torch.equal(other[0], found[0]) for other in everywhere)
        decoded = many.decode(query[:, :, 41:42], 3)
        for copied in (copy.copy(many), copy.deepcopy([many])[0]):
            copied.append(key[:, :, :5], value[:, :, :5])
            copied.truncate(2)
            copied.append(*(part[:, :, -9:] for part in (key, value)))
            assert torch.equal(many.decode(query[:, :, 41:42], 3), decoded) and many.length == 42
        try:
            many.append(key, value)
        except ValueError as raised:
            assert "sequence 0, which holds 42: that is more than max_seq_len, 61" in str(raised)
        many.reset()
        assert many.length == 0
    try:
        tgd.ShardedCache(dist.group.WORLD, 2, 2, 8, block_size=4 + dist.get_rank(), max_seq_len=8)
    except ValueError as raised:
        assert "all ranks of the group must have the same block_size, got [4, 5, 6, 7] by rank" in str(raised)
    else:
        raise AssertionError("ranks that differ were not refused")


def check_ragged_sharded_cache(mesh: DeviceMesh, folder: Path) -> None:
    """Sequences of different lengths: appends of different counts, cut off, one begun anew; rows are one cache's."""
    group = dist.group.WORLD
    query, key, value = made((3, 4, 64, 8), (3, 2, 64, 8), (3, 2, 64, 6))
    for page_size in (4, 8):
        one = tg.MobaCache(3, 2, 8, block_size=4, max_seq_len=40, value_dim=6, dtype=torch.float64)
        many = tgd.ShardedCache(
            group, 3, 2, 8, block_size=4, max_seq_len=40, value_dim=6, dtype=torch.float64, page_size=page_size
        )
        first = 0
        steps: list[tuple[str, Any]] = [
            ("zigzag", [13, 17, 2]), (None, [1, 1, 1]), (None, [3, 0, 2]), ("contiguous", [0, 9, 5]), (None, [6, 1, 4]),
            ("cut", [18, 11, 13]), (None, [2, 1, 0]), ("cut", [5, 12, 0]), (None, None), ("contiguous", [9, 1, 7]),
            ("cut", 5), ("zigzag", None), (None, torch.tensor([1, 2, 0])),
        ]  # fmt: skip
        for kind, counts in steps:
            if kind == "cut":
                one.truncate(counts)
                many.truncate(counts)
                assert many.lengths == one.lengths
                continue
            columns = 3 if counts is None else max(counts)
            new = [tensor[:, :, first : first + int(columns)] for tensor in (key, value)]
            first += int(columns)
            one.append(*new, num_tokens=counts)
            if kind is None:
                many.append(*new, num_tokens=counts)
            else:
                cut = (tgd.shard_sequence(part, group, 2, kind) for part in new)
                many.append_sharded(*cut, kind, num_tokens=counts)
            assert many.lengths == one.lengths
            newest = query[:, :, first - int(columns) : first]
            for given in ({}, {"num_tokens": [min(2, length) for length in one.lengths]}):
                asked = newest if not given else query[:, :, :3]
                for top_k in (2, None):
                    expected = tg.moba_decode(asked, one, top_k, return_lse=True, **given)
                    found = many.decode(asked, top_k, return_lse=True, **given)
                    for name, actual, wanted in zip(("out", "lse"), found, expected, strict=True):
                        nothing = wanted == -torch.inf
                        assert torch.equal(actual == -torch.inf, nothing)
                        close(actual.masked_fill(nothing, 0), wanted.masked_fill(nothing, 0), f"{name} after {first}")
        many.truncate([3, 6, 0])
        refused_and_as_before(many, key, value)


def refused_and_as_before(many: Any, key: Tensor, value: Tensor) -> None:
    """What a cache of sequences of 3, 6 and 0 tokens refuses leaves it as it was."""
    rank, of_one, of_two = dist.get_rank(), (key[:, :, :1], value[:, :, :1]), (key[:, :, :36], value[:, :, :36])
    for words, call in (
        ("lengths must be at most what a sequence holds, 0 for 2, got 1", lambda: many.truncate([3, 6, 1])),
        ("must have the same lengths[1], got [0, 1, 2, 3]", lambda: many.truncate([3, rank, 0])),
        ("at most the number of new tokens, 1, got 3", lambda: many.append(*of_one, num_tokens=[1, 3, 1])),
        ("for sequence 1, which holds 6: that is more", lambda: many.append(*of_two, num_tokens=[1, 35, 1])),
        ("the same num_tokens[2]", lambda: many.append_sharded(*of_one, num_tokens=[1, 1, rank])),
        ("sequences must be equally long to have one length, got [3, 6, 0]", lambda: many.length),
    ):
        before = {name: held.clone() for name, held in vars(many).items() if isinstance(held, Tensor)}
        try:
            call()
        except ValueError as raised:
            assert words in str(raised), raised
        else:
            raise AssertionError(f"not refused: {words}")
        assert many.lengths == [3, 6, 0]
        assert all(torch.equal(getattr(many, name), held) for name, held in before.items())


# --- a model's sequences ----------------------------------------------------------------------------------------------


def check_key_conv_over_ranks(mesh: DeviceMesh, folder: Path) -> None:
    group = dist.group.WORLD
    for num_tokens in (22, 5):
        for placement in ("contiguous", "zigzag"):
            key, weight, bias, grad = made((2, 2, num_tokens, 3), (2, 3, 4), (2, 3), (2, 2, num_tokens, 3))
            whole = [leaf(tensor) for tensor in (key, weight, bias)]
            expected = tg.key_conv(whole[0], whole[1], bias=whole[2])
            expected.backward(grad)

            def cut(tensor: Tensor, placement: str = placement) -> Tensor:
                return tgd.shard_sequence(tensor, group, 2, placement)

            mine = [leaf(cut(key)), leaf(weight), leaf(bias)]
            out = tgd.key_conv(mine[0], mine[1], group, placement=placement, bias=mine[2])
            out.backward(cut(grad))
            close(out.detach(), cut(expected.detach()), "out")
            assert whole[0].grad is not None and mine[0].grad is not None
            close(mine[0].grad, cut(whole[0].grad), "grad_key")
            for part, tensor in zip(mine[1:], whole[1:], strict=True):
                assert part.grad is not None and tensor.grad is not None
                dist.all_reduce(part.grad)
                close(part.grad, tensor.grad, "grad of what tokens share")


class SmallModel(nn.Module):
    """Two layers of block attention with a convolution of keys, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(
            tg.nn.MobaAttention(8, 4, 2, block_size=4, top_k=2, kernel_size=3, dtype=torch.float64) for _ in range(2)
        )
        for layer in self.layers:
            nn.init.normal_(layer.key_conv_weight)

    def forward(self, x: Tensor, is_checkpointed: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x))
        return x


def check_context_parallel(mesh: DeviceMesh, folder: Path) -> None:
    """A model in the context, an optimizer's step, sharded, saved, and loaded into half as many ranks."""
    world = init_device_mesh("cpu", (WORLD_SIZE,))
    x, target = made((2, 21, 8), (2, 21, 8))
    alone = SmallModel()
    loss = (alone(x) * target).sum()
    loss.backward()
    for method in ("gather", "exchange"):
        model = SmallModel()
        kept = [x.clone(), target.clone()]
        with tgd.context_parallel(world, kept, [1, 1], method=method):
            assert kept[0].shape == (2, 6 if dist.get_rank() == 3 else 5, 8)
            part = (model(kept[0], is_checkpointed=method == "gather") * kept[1]).sum()
            part.backward()
        assert torch.equal(kept[0], x) and torch.equal(kept[1], target)
        close(summed(part.detach()), loss.detach(), "loss")
        for whole, other in zip(alone.parameters(), model.parameters(), strict=True):
            assert other.grad is not None and whole.grad is not None
            close(summed(other.grad), whole.grad, "gradient")

    sharded = SmallModel()
    for layer in sharded.layers:
        fully_shard(layer, mesh=world)
    fully_shard(sharded, mesh=world)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (alone, sharded)]
    with tgd.context_parallel(world, kept, [1, 1]):
        (sharded(kept[0]) * kept[1]).sum().mul(WORLD_SIZE).backward()  # fully_shard averages
    for optimizer in optimizers:
        optimizer.step()
    dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id=folder / "saved")
    half = SmallModel()
    for parameter in half.parameters():
        nn.init.zeros_(parameter)
    fully_shard(half, mesh=mesh["dp"])  # two ranks, twice
    state = {"model": get_model_state_dict(half)}
    dcp.load(state, checkpoint_id=folder / "saved")
    set_model_state_dict(half, state["model"])
    for whole, other in zip(alone.parameters(), half.parameters(), strict=True):
        close(other.detach(), whole.detach(), "a loaded parameter")
    with tgd.context_parallel(mesh["dp"], kept, [1, 1], method="exchange", no_restore_buffers=kept[:1]):
        mine = half(kept[0])
    close(mine.detach(), tgd.shard_sequence(alone(x).detach(), mesh["dp"], 1, "zigzag"), "of the loaded model")
    assert kept[0].size(1) < 21 and kept[1].size(1) == 21


def check_beside_torchs_context(mesh: DeviceMesh, folder: Path) -> None:
    """Torch's own ``context_parallel`` cuts what ours reads, either around the other; neither touches the other's."""
    group = mesh["dp"]
    x, target = made((2, 20, 8), (2, 20, 8))
    alone = SmallModel()
    (alone(x) * target).sum().backward()
    plain, (q, k) = F.scaled_dot_product_attention, made((1, 1, 5, 4), (1, 1, 5, 4))
    for is_ours_outside in (False, True):
        model, kept = SmallModel(), [x.clone(), target.clone()]
        of_torch = context_parallel(group, buffers=kept, buffer_seq_dims=[1, 1])
        ours = tgd.context_parallel(group)  # as torch cuts them: zigzag
        with ExitStack() as stack:
            stack.enter_context(ours if is_ours_outside else of_torch)
            before = F.scaled_dot_product_attention
            assert (before is plain) == is_ours_outside
            stack.enter_context(of_torch if is_ours_outside else ours)
            assert is_ours_outside or F.scaled_dot_product_attention is before
            for part, whole in zip(kept, (x, target), strict=True):
                assert torch.equal(part, tgd.shard_sequence(whole, group, 1, "zigzag"))
            (model(kept[0], is_checkpointed=True) * kept[1]).sum().backward()
        assert torch.equal(kept[0], x) and torch.equal(kept[1], target)
        assert F.scaled_dot_product_attention is plain
        for whole, other in zip(alone.parameters(), model.parameters(), strict=True):
            assert other.grad is not None and whole.grad is not None
            close(summed(other.grad) / 2, whole.grad, "gradient")  # two pairs of ranks
    with tgd.context_parallel(group):
        assert F.scaled_dot_product_attention is plain
        plain(q, k, k)
    # The reason why dense layers are not compared here: the day that they run, this says so.
    with context_parallel(group, buffers=[q.clone()], buffer_seq_dims=[2]):
        try:
            F.scaled_dot_product_attention(q, k, k, is_causal=True)
        except NotImplementedError as raised:
            assert "_scaled_dot_product_flash_attention_for_cpu" in str(raised), raised
        else:
            raise AssertionError("torch's ring attention runs on the CPU: have test_dense_beside.py run there too")


class FlexLayer(nn.Module):
    """Torch's flexible attention as a module, which its style of context parallelism hooks."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Any:
        return flex_attention(query, key, value, block_mask=block_mask)


def check_beside_torchs_flexible_attention(mesh: DeviceMesh, folder: Path) -> None:
    """A dense layer by torch's flexible attention over ranks, and block attention, in one forward."""
    if not hasattr(torchs, "_ContextParallel"):  # torch before 2.10
        return
    group, num_tokens = mesh["dp"], 32
    x = made((1, 2, num_tokens, 8), dtype=torch.float32)[0]
    dense = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    expected = tg.moba_attention(dense, dense, dense, 4, 2)
    layer, first = FlexLayer(), group.get_local_rank() * num_tokens // 2
    style = torchs._ContextParallel(seq_dim=2, attention_type=torchs._ContextParallel.AttentionType.FLEX)
    parallelize_module(layer, group, style)
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: q_idx + first >= kv_idx, 1, 1, num_tokens // 2, num_tokens, device="cpu",
        BLOCK_SIZE=16,
    )  # fmt: skip
    with torch.no_grad():  # on the CPU it has no gradient
        (part,) = torchs._context_parallel_shard(group, [x], [2])
        part = layer(part, part, part, mask)
        out = tgd.moba_attention(part, part, part, group, block_size=4, top_k=2)
    close(part, tgd.shard_sequence(dense, group, 2), "dense", 1e-5)
    close(out, tgd.shard_sequence(expected, group, 2), "by blocks", 1e-5)


def check_record_over_ranks(mesh: DeviceMesh, folder: Path) -> None:
    """A model's choices over ranks, saved and replayed after it has moved on, are one process's."""
    world = init_device_mesh("cpu", (WORLD_SIZE,))
    x, target = made((2, 21, 8), (2, 21, 8))

    def moved_on() -> SmallModel:
        model = SmallModel()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.linspace(-0.5, 0.5, parameter.numel(), dtype=torch.float64).view_as(parameter)
        return model

    with torch.no_grad(), tg.record_routing() as whole:
        SmallModel()(x)
    alone = moved_on()
    with tg.replay_routing(whole):
        (alone(x) * target).sum().backward()
    path, kept = folder / f"choices{dist.get_rank()}.safetensors", [x.clone(), target.clone()]
    for method in ("gather", "exchange"):
        with tgd.context_parallel(world, kept, [1, 1], method=method):
            with torch.no_grad(), tg.record_routing() as record:
                SmallModel()(kept[0])
            record.save(path)
            model = moved_on()
            with tg.replay_routing(tg.RoutingRecord.load(path)):
                loss = (model(kept[0], is_checkpointed=True) * kept[1]).sum()
            loss.backward()
        for mine, choice in zip(record, whole, strict=True):
            assert torch.equal(mine.block_indices, tgd.shard_sequence(choice.block_indices, world, 2, "zigzag"))
        for one, other in zip(alone.parameters(), model.parameters(), strict=True):
            assert other.grad is not None and one.grad is not None
            close(summed(other.grad), one.grad, "gradient")


def summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def check_transformers(mesh: DeviceMesh, folder: Path) -> None:
    """A Llama whose layers go over the mesh, one of them dense, with gradient checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from topgather.integrations import transformers as moba

    moba.register(block_size=4, top_k=2, dense_layers=(0,))
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="moba", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(5)
    alone = LlamaForCausalLM(config).double()
    model = copy.deepcopy(alone)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    num_tokens = 26
    tokens = torch.randint(32, (2, num_tokens))
    dist.broadcast(tokens, 0)

    def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, positions: Tensor, **given: Any) -> Tensor:
        logits = model(input_ids=tokens, position_ids=positions, **given).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    buffers = [tokens, tokens.roll(-1, 1), torch.arange(num_tokens)[None]]
    loss = loss_of(alone, *buffers)
    loss.backward()
    world = init_device_mesh("cpu", (WORLD_SIZE,))
    with tgd.context_parallel(world, buffers, [1, 1, 1]):
        part = loss_of(model, *buffers)
        part.backward()
    close(summed(part.detach()), loss.detach(), "loss")
    for whole, other in zip(alone.parameters(), model.parameters(), strict=True):
        assert whole.grad is not None and other.grad is not None
        close(summed(other.grad), whole.grad, "gradient")

    bounds = torch.tensor([0, 11, num_tokens], dtype=torch.int32)
    buffers = [tokens[:1].clone(), tokens[:1].roll(-1, 1), torch.cat([torch.arange(11), torch.arange(15)])[None]]
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 15, "max_length_k": 15}
    with torch.no_grad():
        loss = loss_of(alone, *buffers, **packed)
        with tgd.context_parallel(world, buffers, [1, 1, 1], placement="contiguous"):
            close(summed(loss_of(model, *buffers, **packed)), loss, "loss of packed sequences")
        buffers = [tokens, tokens.roll(-1, 1)]
        with tgd.context_parallel(world, buffers, [1, 1]):
            for words, given in (
                ("position_ids must be those of this rank's tokens", {}),
                ("attention_mask must leave out no token", {"attention_mask": torch.zeros_like(buffers[0])}),
            ):
                try:
                    loss_of(alone, *buffers, torch.arange(buffers[0].size(1))[None], **given)
                except ValueError as raised:
                    assert words in str(raised), raised
                else:
                    raise AssertionError(f"not refused: {words}")
            moba.register(block_size=4, top_k=2, window=3)
            try:
                loss_of(alone, *buffers, tgd.shard_sequence(torch.arange(num_tokens)[None], world, 1, "zigzag"))
            except ValueError as raised:
                assert "window must be 0, 1 and None within context_parallel, got 0, 1 and 3" in str(raised), raised
            else:
                raise AssertionError("a window was not refused")
            moba.register()


CHECKS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results = {}
    for name, check in CHECKS.items():
        try:
            check(mesh, folder)
            results[name] = "fine"
        except Exception:
            results[name] = traceback.format_exc()
            break  # the others may wait for this rank
    torch.save(results, folder / f"rank{rank}.pt")
    os._exit(0)


def main() -> None:
    import transformers  # noqa: F401  once, for all ranks

    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
        process.kill()


if __name__ == "__main__":
    main()
