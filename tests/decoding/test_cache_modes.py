"""Caches under torch's modes, copies of them, sizes beyond memory, and writes that autograd must see."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import topgather as tg
import topgather.cache
from tests.memory.op_cases import ROW_STEPS

CLASSES = [cls for cls in vars(topgather.cache).values() if inspect.isclass(cls)]
ops = torch.ops.topgather


def make(cls: type, device: torch.device | str = "cpu", conv: bool = False, **changes: Any) -> Any:
    options: dict[str, Any] = {"block_size": 4, "max_seq_len": 64, "device": device, **changes}
    if conv:
        options["conv_weight"] = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)).to(device)
    return cls(1, 2, 8, **options)


def tokens(count: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(1, 2, count, 8, generator=torch.Generator().manual_seed(seed)).to(device)


# --- modes ------------------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "append": lambda cache: cache.append(tokens(1, 1), tokens(1, 2)),
    "append counts": lambda cache: cache.append(tokens(3, 1), tokens(3, 2), num_tokens=[2]),
    "truncate": lambda cache: cache.truncate(7),
    "reorder": lambda cache: cache.reorder([0]),
    "reorder to another size": lambda cache: (cache.reorder([0, 0]), cache.reorder([1])),
    "reset": lambda cache: cache.reset(),
    "copy": lambda cache: cache.copy(),
    "reserve": lambda cache: cache.reserve(3) if hasattr(cache, "reserve") else None,
}


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("cls", CLASSES)
def test_any_mode_after_any_other(cls: type, made: str, used: str, step: str, conv: bool) -> None:
    """Made in one mode, changed in a second, gone on with in the first and in none: the same bits as in no mode."""

    def run(first: str, second: str) -> list[Tensor]:
        with MODES[first]():
            cache = make(cls, conv=conv)
            cache.append(tokens(10, 3), tokens(10, 4))
        with MODES[second]():
            made_by_step = STEPS[step](cache)
        outs = []
        for each in (cache, made_by_step) if isinstance(made_by_step, cls) else (cache,):
            for seed, mode in enumerate((first, second, "no_grad")):
                with MODES[mode]():
                    each.append(tokens(2, seed), tokens(2, seed + 5))
                    outs.append(tg.moba_decode(tokens(2, seed + 9), each, top_k=2))
        return outs

    for out, expected in zip(run(made, used), run("no_grad", "no_grad"), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_tensors_of_a_cache_are_ordinary_ones(cls: type) -> None:
    """Whatever it went through in inference mode, it can be written to outside."""
    with torch.inference_mode():
        cache = make(cls, conv=True)
        cache.append(tokens(10), tokens(10))
        cache.reorder([0, 0])
        cache.truncate(7)
        caches = [cache, cache.copy()]
    for each in caches:
        for name, held in vars(each).items():
            assert not (isinstance(held, Tensor) and held.is_inference() and name not in ("conv_weight",)), name


def test_a_weight_that_is_trained_convolves_without_gradient(device: torch.device) -> None:
    cache = make(tg.MobaCache, device, conv=True)
    trained = tg.MobaCache(
        1, 2, 8, block_size=4, max_seq_len=64, device=device, conv_weight=torch.nn.Parameter(cache.conv_weight)
    )
    for each in (cache, trained, trained.copy()):
        each.append(tokens(10, device=device), tokens(10, device=device))
        assert not each.key.requires_grad
        assert torch.equal(each.key, cache.key)


# --- what records gradients is refused --------------------------------------------------------------------------------


def make_decode() -> Callable[[Tensor], Tensor]:
    cache = make(tg.MobaCache)
    cache.append(tokens(10), tokens(10))
    return lambda query: tg.moba_decode(query, cache, top_k=2)


def test_gradients_are_refused_beneath_vmap() -> None:
    decode = make_decode()
    query = tokens(1)[None].repeat(3, 1, 1, 1, 1).requires_grad_()
    for in_dims in (0, 1):
        batch = query.transpose(0, in_dims)
        with pytest.raises(ValueError, match="query must not require grad: moba_decode has no gradient"):
            torch.vmap(decode, in_dims=in_dims)(batch)
        with pytest.raises(ValueError, match="query must not require grad"):
            torch.vmap(torch.vmap(decode, in_dims=in_dims))(batch[None])
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(ValueError, match="query must not require grad"):
            transform(lambda query: decode(query).sum())(tokens(1))
    with torch.no_grad():
        assert decode(query[0]).shape == (1, 2, 1, 8)


def test_tangents_are_refused() -> None:
    query, decode = tokens(1), make_decode()
    for run in (
        lambda: torch.func.jvp(decode, (query,), (query,)),
        lambda: torch.vmap(lambda tangent: torch.func.jvp(decode, (query,), (tangent,)))(query[None]),
        lambda: torch.func.jacfwd(decode)(query),
    ):
        with pytest.raises(NotImplementedError, match=r"query must not have a tangent.*forward-mode"):
            run()
        with torch.no_grad(), pytest.raises(NotImplementedError, match="query must not have a tangent"):
            run()


@pytest.mark.parametrize("num_queries", [1, 64])
def test_sinks_are_refused_as_queries_are(num_queries: int) -> None:
    """However many queries there are: many of them go through moba_attention, which has gradients."""
    cache = make(tg.MobaCache)
    cache.append(tokens(num_queries), tokens(num_queries))
    sinks, query = torch.zeros(2), tokens(num_queries)

    def decode(sinks: Tensor) -> Tensor:
        return tg.moba_decode(query, cache, top_k=2, sinks=sinks)

    with pytest.raises(ValueError, match="sinks must not require grad: moba_decode has no gradient"):
        decode(sinks.requires_grad_())
    with pytest.raises(NotImplementedError, match="sinks must not have a tangent"):
        torch.func.jvp(decode, (sinks.detach(),), (sinks.detach(),))


def test_registered_ops_name_what_requires_a_gradient() -> None:
    arguments = list(append_arguments())
    for position, name in enumerate(("key", "value", "key_pages", "value_pages", "centroids")):
        wrong = [*arguments[:position], arguments[position].clone().requires_grad_(), *arguments[position + 1 :]]
        with pytest.raises(ValueError, match=f"^{name} must not require grad: a cache records no gradients"):
            ops.moba_cache_append(*wrong)


# --- writes that autograd must see ------------------------------------------------------------------------------------


def mutable_ops() -> list[str]:
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("topgather::")}  # fmt: skip
    return sorted(name for name in names if getattr(ops, name).default._schema.is_mutable)


def append_arguments() -> tuple[Any, ...]:
    cache = make(tg.PagedMobaCache)
    cache.reserve(3)
    counts = torch.tensor([2], dtype=torch.int32)
    return (tokens(2), tokens(2), cache.key_pages, cache.value_pages, cache.centroids,
            cache.seq_lens, cache.page_table, counts, cache.block_size)  # fmt: skip


def update_arguments() -> tuple[Any, ...]:
    (case,) = (case for case in ROW_STEPS if case.written)
    return tuple(case.inputs(torch.float32, torch.device("cpu")).values())


# Arguments of every op that writes to some of them, in order.
MUTABLE_ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "memory_update": update_arguments,
    "moba_cache_append": append_arguments,
}


def test_every_mutable_op_has_arguments_here() -> None:
    assert set(mutable_ops()) == set(MUTABLE_ARGUMENTS)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", mutable_ops())
def test_mutable_ops_bump_versions(name: str, context: Callable[[], Any]) -> None:
    """Of what they write, once it is written, and of nothing else."""
    arguments = MUTABLE_ARGUMENTS[name]()
    schema = getattr(ops, name).default._schema
    before = [value._version if isinstance(value, Tensor) else None for value in arguments]
    with context():
        getattr(ops, name)(*arguments)
        named = {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=True)}
        getattr(ops, name)(**named)
    for value, version, argument in zip(arguments, before, schema.arguments, strict=True):
        if isinstance(value, Tensor):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            assert value._version == version + (2 if is_written else 0), argument.name


@pytest.mark.parametrize("name", mutable_ops())
def test_a_refused_op_bumps_nothing(name: str) -> None:
    arguments = MUTABLE_ARGUMENTS[name]()
    before = [value._version for value in arguments if isinstance(value, Tensor)]
    with pytest.raises((TypeError, ValueError)):
        getattr(ops, name)(arguments[0].to(torch.complex64), *arguments[1:])
    assert before == [value._version for value in arguments if isinstance(value, Tensor)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return tg.moba_attention(query, key, value, block_size=4, top_k=2)


@pytest.mark.parametrize("step", ["append", "truncate", "reorder"])
def test_a_backward_through_what_was_overwritten_raises(step: str, device: torch.device) -> None:
    """As it does through a tensor that ``copy_`` overwrote."""
    cache = tg.MobaCache(2, 2, 8, block_size=4, max_seq_len=16, device=device)
    key, value, other = (torch.randn(2, 2, 10, 8, device=device) for _ in range(3))
    cache.append(key, value)
    query = torch.randn(2, 2, 10, 8, device=device, requires_grad=True)
    attend(query, cache.key, cache.value).sum().backward()  # nothing came between
    out = attend(query, cache.key, cache.value).sum()
    if step == "append":
        cache.reset()
        cache.append(other, other)
    elif step == "truncate":
        cache.truncate(9)
    else:
        cache.reorder([1, 0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- copies -----------------------------------------------------------------------------------------------------------


def saved(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy()": lambda cache: cache.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda cache: copy.deepcopy([cache, cache])[1],
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
}


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_is_its_own(cls: type, how: str, conv: bool, device: torch.device) -> None:
    """No memory and no list is shared, and both go on as the one would have."""
    cache = make(cls, device, conv, value_dim=6)
    value = tokens(10, 4, device)[..., :6].contiguous()
    cache.append(tokens(10, 3, device), value)
    other = COPIES[how](cache)
    assert type(other) is cls and vars(other).keys() == vars(cache).keys()
    for name, held in vars(cache).items():
        copied = getattr(other, name)
        if isinstance(held, Tensor):
            assert copied.shape == held.shape and copied.stride() == held.stride(), name
            assert copied.untyped_storage().data_ptr() != held.untyped_storage().data_ptr(), name
        elif isinstance(held, list):
            assert copied == held and copied is not held, name
        else:
            assert copied == held, name
    decoded = tg.moba_decode(tokens(1, 9, device), cache, top_k=2)
    other.append(tokens(2, 5, device), value[:, :, :2])
    other.truncate(9)
    other.reorder([0])
    other.reset()
    assert cache.lengths == [10] and torch.equal(tg.moba_decode(tokens(1, 9, device), cache, top_k=2), decoded)


def test_copies_in_a_list_stay_one() -> None:
    cache = make(tg.MobaCache)
    left, right = copy.deepcopy([cache, cache])
    assert left is right and left is not cache


# --- sizes beyond what there is ---------------------------------------------------------------------------------------

BIG = 2**31 - 1
# What means the same as the largest number.
SAME = {
    "block_size": ({"block_size": BIG}, {"block_size": 64}),
    "page_size": ({"page_size": 4 * (BIG // 4)}, {"page_size": 64}),
    "both": ({"block_size": BIG, "page_size": BIG}, {"block_size": 64, "page_size": 64}),
    "max_seq_len": ({"max_seq_len": BIG, "num_pages": 16}, {}),  # its memory is that of its pages
}


@pytest.mark.parametrize("conv", [False, True], ids=["", "conv"])
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("cls", CLASSES)
def test_more_than_there_is(cls: type, name: str, conv: bool, device: torch.device) -> None:
    large, same = SAME[name]
    if not set(large) <= set(inspect.signature(cls).parameters):
        return
    outs = []
    for changes in (large, same):
        if cls is tg.PagedMobaCache:
            changes = {"num_pages": 16, **changes}
        cache = make(cls, device, conv, **changes)
        cache.append(tokens(30, 3, device), tokens(30, 4, device))
        cache.truncate(27)
        cache.reorder([0, 0])
        cache.append(tokens(2, 5, device).repeat(2, 1, 1, 1), tokens(2, 6, device).repeat(2, 1, 1, 1))
        query = tokens(2, 7, device).repeat(2, 1, 1, 1)
        for top_k in (1, 2, BIG, None):
            outs.append(tg.moba_decode(query, cache, top_k))
    for out, expected in zip(outs[: len(outs) // 2], outs[len(outs) // 2 :], strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("block_size", [64, 65, BIG])
def test_a_choice_of_larger_blocks_than_sequences(block_size: int) -> None:
    cache = make(tg.MobaCache, block_size=block_size)
    cache.append(tokens(10), tokens(10))
    routing = tg.BlockRouting(torch.zeros(1, 2, 1, 1, dtype=torch.int32), block_size)
    assert torch.equal(tg.moba_decode(tokens(1), cache, routing=routing), tg.moba_decode(tokens(1), cache, top_k=None))
    with pytest.raises(ValueError, match="routing must have the cache's block_size"):
        tg.moba_decode(tokens(1), cache, routing=tg.BlockRouting(routing.block_indices, 63))


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (tg.MobaCache, {"max_seq_len": BIG, "batch_size": 2**20}),
        (tg.MobaCache, {"max_seq_len": BIG, "batch_size": BIG}),
        (tg.MobaCache, {"num_kv_heads": BIG, "head_dim": BIG}),
        (tg.MobaCache, {"value_dim": BIG, "batch_size": BIG}),
        (tg.PagedMobaCache, {"num_pages": BIG, "head_dim": BIG}),
        (tg.PagedMobaCache, {"max_seq_len": BIG, "num_kv_heads": 2**20}),
    ],
)
def test_more_than_memory_holds_is_refused_in_words(cls: type, changes: dict[str, Any]) -> None:
    options = {"batch_size": 1, "num_kv_heads": 2, "head_dim": 8, "block_size": 4, "max_seq_len": 64, **changes}
    with pytest.raises(ValueError, match=r"max_seq_len, batch_size, num_pages and block_size must be such that.*bytes"):
        cls(**options)


# --- weights of the convolution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (lambda: torch.zeros(2, 8, 9), ValueError, "conv_weight must have between 2 and 8 taps"),
        (lambda: torch.zeros(2, 8, 1), ValueError, "conv_weight must have between 2 and 8 taps"),
        (lambda: torch.zeros(2, 8, 0), ValueError, "conv_weight must have between 2 and 8 taps"),
        (
            lambda: torch.zeros(2, 8, 3).double(),
            TypeError,
            "conv_weight must have the cache.*got torch.float64",
        ),
        (lambda: torch.zeros(2, 8, 3).half(), TypeError, "conv_weight must have the cache's dtype.*got torch.float16"),
        (lambda: torch.zeros(2, 8, 3).long(), TypeError, "conv_weight must have the cache's dtype.*got torch.int64"),
        (lambda: torch.zeros(2, 8, 3, device="meta"), ValueError, "conv_weight must be on the cache's device"),
        (lambda: torch.zeros(2, 8, 3).to_sparse(), ValueError, "conv_weight must have layout"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_weight_that_no_append_takes_is_refused_at_once(
    cls: type, weight: Callable[[], Tensor], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make(cls, conv_weight=weight())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [2, 8])
def test_a_weight_that_is_taken_is_one_that_appends_take(dtype: torch.dtype, width: int) -> None:
    for weight_dtype in (dtype, torch.float64 if dtype == torch.float64 else torch.float32):
        cache = make(tg.MobaCache, dtype=dtype, conv_weight=torch.randn(2, 8, width, dtype=weight_dtype))
        cache.append(tokens(3).to(dtype), tokens(3).to(dtype))
        assert cache.lengths == [3]


@pytest.mark.parametrize("cls", CLASSES)
def test_fake_tensors_do_not_reach_a_real_cache(cls: type) -> None:
    """Nothing would be written, and the lengths would count it; a cache made of fakes is another matter."""
    cache = make(cls)
    cache.append(tokens(3), tokens(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ValueError, match="key must not be a fake tensor"):
            cache.append(torch.empty(1, 2, 2, 8), torch.empty(1, 2, 2, 8))
        fake = make(cls)
        fake.append(torch.empty(1, 2, 2, 8), torch.empty(1, 2, 2, 8))
        assert tg.moba_decode(torch.empty(1, 2, 2, 8), fake).shape == (1, 2, 2, 8)
    assert cache.lengths == cache.seq_lens.tolist() == [3]


@pytest.mark.parametrize("cls", CLASSES)
def test_loaded_to_another_device(cls: type) -> None:
    """A ``map_location`` moves the tensors, and the cache knows where they are."""
    cache = make(cls, conv=True)
    cache.append(tokens(3), tokens(3))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    moved = torch.load(file, map_location="meta", weights_only=False)
    for count in (1, 60):
        new = tokens(count).to("meta")
        moved.append(new, new)
        assert moved.device.type == tg.moba_decode(new, moved).device.type == "meta"
    fresh = make(cls, "meta", conv=True)
    fresh.append(tokens(64).to("meta"), tokens(64).to("meta"))  # a prefill
    assert tg.moba_decode(tokens(64).to("meta"), fresh).shape == (1, 2, 64, 8)
    assert cache.lengths == [3]
