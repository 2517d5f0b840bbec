"""The table of every op and every public function: how to call each, on random inputs by name.

``CASES`` has small problems, one or more for each; ``SHARED`` larger ones, whose work threads share out. What holds of
all ops is tested once, in ``tests/all_ops``, over these. ``tests/all_ops/test_table.py`` sees that nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase
from tests.block_attention.helpers import make_inputs as make_attention_inputs
from tests.common.op_case import Inputs as Inputs
from tests.common.op_case import OpCase as OpCase
from tests.common.op_case import gives as _gives
from tests.common.op_case import on as on
from tests.common.tensors import random_tensor
from tests.common.tolerances import accumulation_dtype
from tests.decoding.helpers import DecodeCase, filled_cache
from tests.grid.helpers import GridCase
from tests.grid.helpers import make_inputs as make_grid_inputs
from tests.indexer.helpers import IndexCase
from tests.indexer.op_cases import INDEXER, index_cases
from tests.key_conv.helpers import KeyConvCase
from tests.key_conv.helpers import make_inputs as make_key_conv_inputs
from tests.memory.helpers import LookupCase, TopkCase, make_lookup, make_topk_inputs
from tests.memory.op_cases import QUANTIZED, ROW_STEPS, quantized_cases
from tests.memory.quantized_helpers import QuantizedCase

ops = torch.ops.topgather


# --- block attention --------------------------------------------------------------------------------------------------

SMALL = AttentionCase(
    batch=2, num_heads=4, num_kv_heads=2, query_len=20, key_len=24, head_dim=8, value_dim=6, block_size=4, top_k=2
)
UNFORCED = {"force_first": 0, "force_last": 1}
PACKED = {"cu_seqlens_q": (0, 12, 12, 20), "cu_seqlens_k": (0, 12, 14, 24)}


def _bounds(device: torch.device) -> Inputs:
    bounds = {name: torch.tensor(numbers, dtype=torch.int32, device=device) for name, numbers in PACKED.items()}
    return {**bounds, "max_seqlen_q": 12, "max_seqlen_k": 12}


def _heads(case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int, is_packed: bool) -> Inputs:
    heads = (tensor.detach() for tensor in make_attention_inputs(case, dtype, device, seed))
    # Packed: the first image's tokens, one sequence after the other.
    tensors = (tensor[0].transpose(0, 1).contiguous() if is_packed else tensor for tensor in heads)
    return dict(zip(("query", "key", "value"), tensors, strict=True))


def _routing(case: AttentionCase, heads: Inputs, bounds: Inputs) -> Tensor:
    return ops.moba_route(heads["query"], heads["key"], case.block_size, case.top_k, case.is_causal, **bounds)


def _scores(num_heads: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """What changes scores and what is seen: a cap, sinks and a window."""
    sinks = random_tensor((num_heads,), accumulation_dtype(dtype), device, seed + 6)
    return {"softcap": 1.5, "sinks": sinks, "window": 6}


def _shared_routing(case: AttentionCase, heads: Inputs, bounds: Inputs, num_choice_heads: int) -> Tensor:
    """The choices of the first query head of each group."""
    step = case.num_heads // num_choice_heads
    firsts = heads["query"][..., ::step, :] if bounds else heads["query"][:, ::step]
    keys = heads["key"][..., :num_choice_heads, :] if bounds else heads["key"][:, :num_choice_heads]
    return _routing(case, {"query": firsts, "key": keys}, bounds)


def _attention(
    case: AttentionCase, is_packed: bool, is_routed: bool, num_choice_heads: int | None = None
) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        heads = _heads(case, dtype, device, seed, is_packed)
        bounds = _bounds(device) if is_packed else {}
        inputs = {**heads, **bounds, "block_size": case.block_size, "top_k": case.top_k, "is_causal": True}
        inputs |= {} if is_routed else UNFORCED
        if is_routed:
            choice = _shared_routing(case, heads, bounds, num_choice_heads or case.num_heads)
            routing = tg.BlockRouting(choice, case.block_size)
            inputs |= {"top_k": None, "routing": routing, **_scores(case.num_heads, dtype, device, seed)}
        return {**inputs, "scale": 0.3, "return_lse": True, "deterministic": True}

    return draw


def _route(case: AttentionCase, is_packed: bool, **options: int) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        heads = _heads(case, dtype, device, seed, is_packed)
        del heads["value"]
        bounds = _bounds(device) if is_packed else {}
        choice = {"block_size": case.block_size, "top_k": case.top_k, "is_causal": True}
        return {**heads, **bounds, **choice, **UNFORCED, **options}

    return draw


def _centroids(case: AttentionCase) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {"key": _heads(case, dtype, device, seed, False)["key"], "block_size": case.block_size}

    return draw


def _packed_centroids(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    bounds = _bounds(device)
    key = _heads(SMALL, dtype, device, seed, True)["key"]
    return {"key": key, "block_size": 4, "cu_seqlens": bounds["cu_seqlens_k"], "max_seqlen": bounds["max_seqlen_k"]}


def _attention_op(case: AttentionCase, is_packed: bool, is_backward: bool) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        heads = _heads(case, dtype, device, seed, is_packed)
        bounds = _bounds(device) if is_packed else {}
        choice = _routing(case, heads, bounds)
        tail = {"block_size": case.block_size, "is_causal": True, "scale": 0.3, **bounds, "deterministic": True}
        scores = _scores(case.num_heads, dtype, device, seed) if is_packed else {}
        forward = {**heads, "block_indices": choice, **tail, **scores}
        if not is_backward:
            return forward
        out, lse, softmax_terms = ops.moba_attention(**forward)
        grad_out, grad_lse = (random_tensor(tuple(t.shape), t.dtype, device, seed + 5) for t in (out, lse))
        saved = {"out": out, "lse": lse, "block_indices": choice}
        # A graph compiled by an earlier release gives no softmax_terms.
        if is_packed:
            tail |= {"softcap": scores["softcap"], "window": scores["window"], "softmax_terms": softmax_terms}
        return {"grad_out": grad_out, "grad_lse": grad_lse, **heads, **saved, **tail}

    return draw


HEADS = ("query", "key", "value")
HEADS_AND_SINKS = (*HEADS, "sinks")
OUT_LSE = ("out", "lse")
SAVED = (*OUT_LSE, "softmax_terms")
GRADIENTS = ("grad_query", "grad_key", "grad_value")


def attention_cases(name: str, case: AttentionCase) -> list[OpCase]:
    """The dense public functions on one problem."""
    suffix = f"({name})" if name else ""
    return [
        OpCase(f"moba_attention{suffix}", tg.moba_attention, _attention(case, False, False), **_gives(HEADS, OUT_LSE)),
        OpCase(f"moba_route{suffix}", tg.moba_route, _route(case, False), ("block_indices",)),
        OpCase(f"block_centroids{suffix}", tg.block_centroids, _centroids(case), **_gives(("key",), ("centroids",))),
    ]


BLOCK_ATTENTION = [
    *attention_cases("", SMALL),
    OpCase(
        "moba_attention(routing)", tg.moba_attention, _attention(SMALL, False, True), **_gives(HEADS_AND_SINKS, OUT_LSE)
    ),
    OpCase(
        "moba_attention(choice of key heads)",
        tg.moba_attention,
        _attention(SMALL, False, True, 2),
        **_gives(HEADS_AND_SINKS, OUT_LSE),
    ),
    OpCase(
        "moba_attention_varlen(one choice)",
        tg.moba_attention_varlen,
        _attention(SMALL, True, True, 1),
        **_gives(HEADS_AND_SINKS, OUT_LSE),
    ),
    OpCase("moba_attention_varlen", tg.moba_attention_varlen, _attention(SMALL, True, False), **_gives(HEADS, OUT_LSE)),
    OpCase(
        "moba_attention_varlen(routing)",
        tg.moba_attention_varlen,
        _attention(SMALL, True, True),
        **_gives(HEADS_AND_SINKS, OUT_LSE),
    ),
    OpCase("moba_route_varlen", tg.moba_route_varlen, _route(SMALL, True), ("block_indices",)),
    OpCase(
        "moba_route(forced)",
        tg.moba_route,
        _route(replace(SMALL, top_k=4), False, force_first=1, force_last=2),
        ("block_indices",),
    ),
    OpCase("ops.block_centroids", ops.block_centroids.default, _centroids(SMALL), **_gives(("key",), ("centroids",))),
    OpCase("block_centroids(packed)", tg.block_centroids, _packed_centroids, **_gives(("key",), ("centroids",))),
    OpCase(
        "ops.block_centroids(packed)",
        ops.block_centroids.default,
        _packed_centroids,
        **_gives(("key",), ("centroids",)),
    ),
    *(
        case
        for is_packed, suffix in ((False, ""), (True, "(packed)"))
        for case in (
            OpCase(f"ops.moba_route{suffix}", ops.moba_route.default, _route(SMALL, is_packed), ("block_indices",)),
            OpCase(
                f"ops.moba_attention{suffix}",
                ops.moba_attention.default,
                _attention_op(SMALL, is_packed, False),
                **_gives(HEADS_AND_SINKS if is_packed else HEADS, SAVED) | {"differentiable_results": OUT_LSE},
            ),
            OpCase(
                f"ops.moba_attention_backward{suffix}",
                ops.moba_attention_backward.default,
                _attention_op(SMALL, is_packed, True),
                GRADIENTS,
            ),
        )
    ),
]

# --- decoding ---------------------------------------------------------------------------------------------------------

# The last step's tokens differ by sequence.
DECODING = DecodeCase(((21, 9), (3, 2)), head_dim=8, value_dim=6)


def _cache(case: DecodeCase, pages: int, dtype: torch.dtype, device: torch.device, seed: int, spare: int = 8) -> Any:
    # Whole tensors are compared: what was never written must be the same every time, and equal to itself.
    cache = filled_cache(replace(case, pages=pages), dtype, device, spare, seed, unwritten=0.0)[0]
    if isinstance(cache, tg.PagedMobaCache):
        cache.reserve(spare)
    return cache


def _decode(case: DecodeCase, pages: int, num_choice_heads: int = 0) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        cache = _cache(case, pages, dtype, device, seed)
        counts = torch.tensor(case.steps[-1], dtype=torch.int32, device=device)
        shape = (case.batch, case.num_heads, max(case.steps[-1]), case.head_dim)
        inputs = {"query": random_tensor(shape, dtype, device, seed), "cache": cache, "top_k": case.top_k}
        inputs |= {"scale": 0.3, "num_tokens": counts, "return_lse": True, **UNFORCED}
        if num_choice_heads:
            tail = (cache.seq_lens, cache.page_table, counts, cache.block_size, cache.page_size, case.slots)
            firsts = inputs["query"][:, :: case.num_heads // num_choice_heads]
            choice = ops.moba_decode_route(firsts, cache.centroids, *tail)
            inputs |= {"top_k": None, "routing": tg.BlockRouting(choice, cache.block_size)}
            inputs |= _scores(case.num_heads, dtype, device, seed)
        return inputs

    return draw


def _decode_op(name: str, case: DecodeCase, pages: int) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        cache = _cache(case, pages, dtype, device, seed)
        counts = torch.tensor(case.steps[-1], dtype=torch.int32, device=device)
        places = {"seq_lens": cache.seq_lens, "page_table": cache.page_table, "num_tokens": counts}
        places["block_size"] = cache.block_size
        rows = {"key_pages": cache.key_pages, "value_pages": cache.value_pages, "centroids": cache.centroids}
        most = max(case.steps[-1])

        def new(heads: int, dim: int, number: int) -> Tensor:
            return random_tensor((case.batch, heads, most, dim), dtype, device, 3 * seed + number)

        if name == "moba_cache_append":
            key, value = new(case.num_kv_heads, case.head_dim, 0), new(case.num_kv_heads, case.value_head_dim, 1)
            return {"key": key, "value": value, **rows, **places}
        query = new(case.num_heads, case.head_dim, 2)
        search = {"page_size": cache.page_size, "top_k": case.slots, **UNFORCED}
        if name == "moba_decode_route":
            return {"query": query, "centroids": rows["centroids"], **places, **search}
        choice = ops.moba_decode_route(query, rows.pop("centroids"), **places, **search)
        scores = _scores(case.num_heads, dtype, device, seed) if pages else {}
        return {"query": query, **rows, "block_indices": choice, **places, "scale": 0.3, **scores}

    return draw


CACHES = ((0, ""), (1, "(paged)"))
CACHE_ROWS = ("key_pages", "value_pages", "centroids")
DECODE_OPS: dict[str, dict[str, Any]] = {
    "moba_cache_append": {"results": CACHE_ROWS, "written": CACHE_ROWS},
    "moba_decode_route": {"results": ("block_indices",)},
    "moba_decode": {"results": OUT_LSE},
}
DECODES = [
    *(OpCase(f"moba_decode{suffix}", tg.moba_decode, _decode(DECODING, pages), OUT_LSE) for pages, suffix in CACHES),
    OpCase("moba_decode(routing)", tg.moba_decode, _decode(DECODING, 0, DECODING.num_heads), OUT_LSE),
    OpCase("moba_decode(choice of key heads)", tg.moba_decode, _decode(DECODING, 1, DECODING.num_kv_heads), OUT_LSE),
    *(
        OpCase(f"ops.{name}{suffix}", getattr(ops, name).default, _decode_op(name, DECODING, pages), **options)
        for name, options in DECODE_OPS.items()
        for pages, suffix in CACHES
    ),
]

# --- memory layers ----------------------------------------------------------------------------------------------------

SEARCH = TopkCase(num_tokens=6, num_heads=3, num_keys=10, head_dim=8, top_k=5)
LOOKUP = LookupCase(num_rows=20, width=6, num_tokens=5, bag_size=4, width_in=8)


def _search(case: TopkCase) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        query, keys = make_topk_inputs(case, dtype, device, seed)
        return {"query": query.detach(), "keys": keys.detach(), "top_k": case.top_k}

    return draw


def _lookup(case: LookupCase, names: tuple[str, ...], renamed: dict[str, str], **options: Any) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        lookup = make_lookup(case, dtype, device, seed)
        return {renamed.get(name, name): getattr(lookup, name).detach() for name in names} | options

    return draw


def _ragged(names: tuple[str, ...], renamed: dict[str, str], least: int, **options: Any) -> Callable[..., Inputs]:
    """The entries of LOOKUP in bags of other sizes: ``least`` bags, without the end of the last or with it."""

    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = _lookup(LOOKUP, names, renamed, **options)(dtype, device, seed)
        inputs |= {name: inputs[name].flatten() for name in ("indices", "weights") if name in inputs}
        return inputs | {"offsets": torch.tensor([0, 3, 3, 11, 18, 20][:least], device=device)}

    return draw


BAG = ("values", "indices", "weights")
DOT = ("values_in", "indices", "x")
EXPERTS = ("x", "values_in", "values", "indices", "weights")
EXPERT_LEAVES = ("x", "values_in", "values_out", "weights")


def lookup_cases(name: str, case: LookupCase) -> list[OpCase]:
    """Both lookups on one problem, with gradients of tables dense, sparse and padded."""
    cases = []
    for is_sparse in (False, True, "padded"):
        described = ",".join(filter(None, (name, {True: "sparse", "padded": "padded sparse"}.get(is_sparse, ""))))
        suffix = f"({described})" if described else ""
        bag = _lookup(case, BAG, {}, sparse_grad=is_sparse)
        cases.append(OpCase(f"memory_lookup{suffix}", tg.memory_lookup, bag, **_gives(("values", "weights"))))
        experts = _lookup(case, EXPERTS, {"values": "values_out"}, activation="silu", sparse_grad=is_sparse)
        cases.append(OpCase(f"expert_lookup{suffix}", tg.expert_lookup, experts, **_gives(EXPERT_LEAVES)))
    return cases


def search_case(name: str, case: TopkCase, function: Any = tg.product_key_topk) -> OpCase:
    """The search on one problem."""
    return OpCase(name, function, _search(case), ("scores", "indices"), ("query", "keys"), ("scores",))


BACKWARD = ("grad_out", *BAG)
MEMORY = [
    search_case("product_key_topk", SEARCH),
    *lookup_cases("", LOOKUP),
    OpCase(
        "memory_lookup(ragged)",
        tg.memory_lookup,
        _ragged(BAG, {}, 6, padding_idx=-1, mode="sum", include_last_offset=True),
        **_gives(("values", "weights")),
    ),
    OpCase("memory_lookup(mean)", tg.memory_lookup, _ragged(BAG[:2], {}, 5, mode="mean"), **_gives(("values",))),
    search_case("ops.product_key_topk", SEARCH, ops.product_key_topk.default),
    OpCase(
        "ops.memory_lookup",
        ops.memory_lookup.default,
        _lookup(LOOKUP, BAG, {}, sparse_grad=False, padded_grad=False),
        **_gives(("values", "weights")),
    ),
    OpCase(
        "ops.memory_dot",
        ops.memory_dot.default,
        _lookup(LOOKUP, DOT, {"values_in": "values"}, sparse_grad=False, padded_grad=False),
        **_gives(("values", "x"), ("dots",)),
    ),
    OpCase(
        "ops.memory_backward",
        ops.memory_backward.default,
        _lookup(LOOKUP, BACKWARD, {}, needs_grad_weights=True, owner="memory_lookup"),
        ("grad_values", "grad_weights"),
    ),
    OpCase(
        "ops.memory_backward_sparse",
        ops.memory_backward_sparse.default,
        _lookup(LOOKUP, BACKWARD, {}, needs_grad_weights=True, owner="memory_lookup", padded=False),
        ("grad_values", "grad_weights"),
    ),
    OpCase(
        "ops.memory_lookup(ragged)", ops.memory_lookup.default, _ragged(BAG, {}, 6), **_gives(("values", "weights"))
    ),
    OpCase(
        "ops.memory_dot(ragged)",
        ops.memory_dot.default,
        _ragged(DOT, {"values_in": "values"}, 6),
        **_gives(("values", "x"), ("dots",)),
    ),
    *(
        OpCase(
            f"ops.{op.__name__.removesuffix('.default')}(ragged)",
            op,
            _ragged(BACKWARD, {}, 6, needs_grad_weights=True),
            ("grad_values", "grad_weights"),
        )
        for op in (ops.memory_backward.default, ops.memory_backward_sparse.default)
    ),
]

# --- grid and window attention ----------------------------------------------------------------------------------------

GRID = GridCase(batch=2, num_heads=3, rows=7, columns=5, step=(2, 2), head_dim=8, has_bias=True)
WINDOW = replace(GRID, step=(4, 3), partition="window")
IMAGES = (*HEADS, "bias")


def _images(case: GridCase, sides: Inputs) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = make_grid_inputs(case, dtype, device, seed)
        tensors = {name: getattr(inputs, name) for name in IMAGES}
        found = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        return {**found, **sides, "scale": 0.3}

    return draw


def _grid_op(case: GridCase, is_backward: bool) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        sides = {"partition": case.partition, "rows_step": case.step[0], "columns_step": case.step[1]}
        forward = _images(case, sides)(dtype, device, seed)
        if not is_backward:
            return forward
        out, lse, softmax_terms = ops.grid_attention(**forward)
        saved = {"out": out, "lse": lse, "needs_grad_bias": True}
        saved |= {"softmax_terms": softmax_terms} if case is GRID else {}
        return {"grad_out": random_tensor(tuple(out.shape), dtype, device, seed + 7), **forward, **saved}

    return draw


def grid_case(name: str, case: GridCase) -> OpCase:
    """The public function of the problem's partition."""
    leaves = IMAGES if case.has_bias else HEADS
    if case.partition == "window":
        return OpCase(name, tg.window_attention, _images(case, {"window_size": case.step}), **_gives(leaves))
    return OpCase(name, tg.grid_attention, _images(case, {"stride": case.step}), **_gives(leaves))


GRIDS = [
    grid_case("grid_attention", GRID),
    grid_case("window_attention", WINDOW),
    OpCase("grid_attention(grid_size)", tg.grid_attention, _images(GRID, {"grid_size": (4, 3)}), **_gives(IMAGES)),
    *(
        case
        for partition, suffix in ((GRID, ""), (WINDOW, "(window)"))
        for case in (
            OpCase(
                f"ops.grid_attention{suffix}",
                ops.grid_attention.default,
                _grid_op(partition, False),
                **_gives(IMAGES, SAVED) | {"differentiable_results": ("out",)},
            ),
            OpCase(
                f"ops.grid_attention_backward{suffix}",
                ops.grid_attention_backward.default,
                _grid_op(partition, True),
                (*GRADIENTS, "grad_bias"),
            ),
        )
    ),
]

# --- key convolution --------------------------------------------------------------------------------------------------

DENSE_KEYS = KeyConvCase(num_heads=3, num_tokens=9, head_dim=8, width=4, has_state=True)
PACKED_KEYS = replace(DENSE_KEYS, has_state=False, lengths=(4, 0, 5))
BIASED_KEYS = replace(DENSE_KEYS, has_bias=True, activation=None)


def _keys(case: KeyConvCase, is_backward: bool = False) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = make_key_conv_inputs(case, dtype, device, seed)
        names = (
            ("key", "weight", "cu_seqlens", "state", "bias")
            if case.has_bias
            else ("key", "weight", "cu_seqlens", "state")
        )
        tensors = {name: getattr(inputs, name) for name in names}
        forward = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
        # A graph compiled by an earlier release gives no options.
        needs = {"needs_grad_weight": True}
        if case.has_bias:
            forward["activation"] = case.activation
            needs["needs_grad_bias"] = True
        return {"grad_out": inputs.grad_out, **forward, **needs} if is_backward else forward

    return draw


def key_conv_case(name: str, case: KeyConvCase) -> OpCase:
    """The public function on one problem."""
    results = ("out", "new_state") if case.has_state else ("out",)
    return OpCase(name, tg.key_conv, _keys(case), **_gives(_key_conv_leaves(case), results))


def _key_conv_leaves(case: KeyConvCase) -> tuple[str, ...]:
    return ("key", "weight", *(["state"] if case.has_state else []), *(["bias"] if case.has_bias else []))


KEY_CONV = [
    key_conv_case("key_conv", DENSE_KEYS),
    key_conv_case("key_conv(packed)", PACKED_KEYS),
    key_conv_case("key_conv(bias)", BIASED_KEYS),
    *(
        case
        for problem, suffix in ((DENSE_KEYS, ""), (PACKED_KEYS, "(packed)"), (BIASED_KEYS, "(bias)"))
        for case in (
            OpCase(
                f"ops.key_conv{suffix}",
                ops.key_conv.default,
                _keys(problem),
                **_gives(_key_conv_leaves(problem)),
            ),
            OpCase(
                f"ops.key_conv_backward{suffix}",
                ops.key_conv_backward.default,
                _keys(problem, is_backward=True),
                ("grad_key", "grad_weight", "grad_state", "grad_bias"),
            ),
        )
    ),
]

# --- the table --------------------------------------------------------------------------------------------------------

CASES = [*BLOCK_ATTENTION, *DECODES, *MEMORY, *ROW_STEPS, *GRIDS, *KEY_CONV, *INDEXER, *QUANTIZED]
PUBLIC = [case for case in CASES if case.is_public]
REGISTERED = [case for case in CASES if not case.is_public]
DIFFERENTIABLE = [case for case in CASES if case.differentiable]

SHARED = [
    *attention_cases(
        "heads",
        AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=700, head_dim=64, block_size=32, top_k=4),
    ),
    *attention_cases("one head", AttentionCase(num_heads=1, query_len=1500, head_dim=40, block_size=64, top_k=5)),
    *attention_cases(
        "few queries", AttentionCase(num_heads=2, query_len=3, key_len=900, head_dim=33, block_size=17, top_k=9)
    ),
    # Blocks of a query are shared out.
    OpCase(
        "moba_decode",
        tg.moba_decode,
        _decode(
            DecodeCase(((4999,), (1,)), num_heads=2, num_kv_heads=1, head_dim=8, block_size=64, top_k=None), pages=0
        ),
        OUT_LSE,
    ),
    grid_case("grid_attention", GridCase(num_heads=3, rows=37, columns=41, step=(5, 4), head_dim=40, has_bias=True)),
    grid_case(
        "window_attention",
        GridCase(num_heads=3, rows=37, columns=41, step=(5, 4), head_dim=40, has_bias=True, partition="window"),
    ),
    # One group, which many threads share.
    grid_case(
        "grid_attention(one group)",
        GridCase(batch=1, num_heads=1, rows=27, columns=29, step=(1, 1), head_dim=33, has_bias=True),
    ),
    grid_case(
        "grid_attention(one token)", GridCase(batch=3, num_heads=2, rows=30, columns=30, step=(30, 30), head_dim=8)
    ),
    key_conv_case("key_conv", KeyConvCase(batch=3, num_heads=3, num_tokens=2000, head_dim=40, has_state=True)),
    key_conv_case("key_conv(short)", KeyConvCase(batch=200, num_heads=2, num_tokens=7, head_dim=33, width=5)),
    key_conv_case("key_conv(packed)", KeyConvCase(lengths=(1500, 0, 1, 700, 33), num_heads=9, head_dim=64, width=8)),
    search_case("product_key_topk", TopkCase(num_tokens=203, num_heads=3, num_keys=90, head_dim=40, top_k=32)),
    search_case(
        "product_key_topk(few tokens)", TopkCase(num_tokens=3, num_heads=1, num_keys=700, head_dim=64, top_k=9)
    ),
    *lookup_cases("", LookupCase(num_rows=3000, width=50, num_tokens=200, bag_size=40, width_in=33)),
    *lookup_cases(
        "power law",
        LookupCase(num_rows=3000, width=50, num_tokens=200, bag_size=40, width_in=7, pattern="power_law"),
    ),
    *lookup_cases("hot", LookupCase(num_rows=30, width=5, num_tokens=900, bag_size=16, width_in=64, pattern="hot")),
    *index_cases(
        "heads",
        IndexCase(query_len=300, dim=40, block_size=64, top_k=3, head_dim=16),
        True,
    ),
    *quantized_cases("", QuantizedCase(num_rows=3000, width=50, num_tokens=200, bag_size=40, group_size=25)),
    *lookup_cases("few tokens", LookupCase(num_rows=6000, width=300, num_tokens=2, bag_size=300)),
]


def one_of_each() -> list[OpCase]:
    """A larger problem of each public function that has one."""
    return list({case.function.__name__: case for case in reversed(SHARED)}.values())


def every(cases: Iterable[OpCase]) -> pytest.MarkDecorator:
    """Run a test over cases, as its parameter ``case``."""
    return pytest.mark.parametrize("case", list(cases), ids=str)
