"""Small problems of every op, run by the emulated module while it records its launches."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topgather import _native
from topgather._common.cuda import aligned
from topgather._common.library import describe

from .replay import FLOAT_TYPES, RecordedLaunch, take_recording


class Recorder:
    """Runs entry points of the emulated module and keeps every launch."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.launches: list[RecordedLaunch] = []
        self.types: dict[int, str] = {}  # what is stored at an address; workspaces are not listed
        self._kept: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, whose memory stays where it is for as long as the recorder lives."""
        self._kept.append(tensor)
        self.types[tensor.data_ptr()] = FLOAT_TYPES.get(tensor.dtype, "int32")
        return tensor

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of normal numbers."""
        return self.keep(torch.randn(shape).to(dtype))

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        return self.keep(torch.zeros(shape, dtype=dtype))

    def call(self, entry_point: str, **fields: Any) -> None:
        """Run an entry point on device 0 and the default stream, its fields given by name."""
        fields = {"num_threads": 1, **fields}
        names = self.module.argument_names[f"{entry_point}_cuda"][:-4]
        assert set(names) == set(fields), f"{entry_point} takes {names}"
        for name in _native.aligned_arguments[entry_point]:
            fields[name] = self.keep(aligned(fields[name]))
        values = [describe(fields[name]) for name in names]
        count = getattr(self.module, f"{entry_point}_workspace_bytes", None)
        num_bytes = 0 if count is None else count(*values, 0)
        self._kept.append(torch.zeros(max(num_bytes, 1), dtype=torch.uint8))
        self.module.start_recording()
        getattr(self.module, f"{entry_point}_cuda")(*values, self._kept[-1].data_ptr(), num_bytes, 0, 0)
        self.launches += take_recording(self.module)


@dataclass(frozen=True)
class MobaCase:
    """Routing, forward and backward of block attention.

    ``lengths`` packs sequences of these lengths, which must sum to the number of tokens.
    """

    dtype: torch.dtype
    head_dim: int = 64
    value_dim: int = 64
    num_tokens: int = 80
    block_size: int = 32
    top_k: int = 2
    is_causal: bool = True
    lengths: tuple[int, ...] = ()
    num_heads: int = 2
    num_kv_heads: int = 1
    deterministic: bool = False
    window: int | None = None

    least_launches = 12

    def __str__(self) -> str:
        parts = [FLOAT_TYPES[self.dtype], f"{self.head_dim}x{self.value_dim}", "causal" if self.is_causal else "full"]
        parts += ["packed"] * bool(self.lengths) + ["deterministic"] * self.deterministic
        return "-".join(parts + ["window"] * (self.window is not None))

    def run(self, recorder: Recorder) -> None:
        """Routing, forward and backward."""
        heads, kv_heads, dtype = self.num_heads, self.num_kv_heads, self.dtype
        bounds: Tensor | None = None
        if self.lengths:
            bounds = recorder.keep(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int64))
        problem = {
            "block_size": self.block_size,
            "is_causal": self.is_causal,
            "cu_seqlens_q": bounds,
            "cu_seqlens_k": None if bounds is None else recorder.keep(bounds.clone()),
        }

        def rows(make: Any, heads: int, dim: int) -> Tensor:
            """[1, heads, tokens, dim], or packed [tokens, heads, dim]."""
            shape = (self.num_tokens, heads, dim) if self.lengths else (1, heads, self.num_tokens, dim)
            return make(*shape, dtype=dtype)

        leading = (heads, self.num_tokens) if self.lengths else (1, heads, self.num_tokens)
        query = rows(recorder.random, heads, self.head_dim)
        key = rows(recorder.random, kv_heads, self.head_dim)
        value = rows(recorder.random, kv_heads, self.value_dim)
        block_indices = recorder.zeros(*leading, self.top_k, dtype=torch.int32)
        routed = {"query": query, "key": key, "block_indices": block_indices, "force_first": 0, "force_last": 1}
        recorder.call("moba_route", **problem, **routed)
        attended = {**problem, "scale": self.head_dim**-0.5, "query": query, "key": key, "value": value}
        attended |= {"block_indices": block_indices, "out": rows(recorder.zeros, heads, self.value_dim)}
        attended["lse"] = recorder.zeros(*leading, dtype=torch.float32)
        attended["softmax_terms"] = recorder.zeros(*leading, 2, dtype=torch.float32)
        attended |= {"softcap": 2.0 if self.lengths else None, "window": self.window}
        sinks = recorder.random(heads, dtype=torch.float32) if self.lengths else None
        recorder.call("moba_attention", **attended, sinks=sinks)
        recorder.call(
            "moba_attention_backward",
            **attended,
            deterministic=self.deterministic,
            grad_out=rows(recorder.random, heads, self.value_dim),
            grad_lse=recorder.random(*leading, dtype=torch.float32),
            grad_query=rows(recorder.zeros, heads, self.head_dim),
            grad_key=rows(recorder.zeros, kv_heads, self.head_dim),
            grad_value=rows(recorder.zeros, kv_heads, self.value_dim),
        )


@dataclass(frozen=True)
class FilteredRouteCase:
    """Routing over so many blocks that scores are bounded first; some rows fail and are done again."""

    dtype: torch.dtype
    head_dim: int = 64
    num_queries: int = 20
    num_keys: int = 300

    least_launches = 4

    def __str__(self) -> str:
        return f"{FLOAT_TYPES[self.dtype]}-{self.head_dim}-filtered"

    def run(self, recorder: Recorder) -> None:
        """Every seventh block is the same one."""
        query = recorder.random(1, 1, self.num_queries, self.head_dim, dtype=self.dtype)
        key = recorder.random(1, 1, self.num_keys, self.head_dim, dtype=self.dtype)
        key[:, :, ::7] = query[:, :, 3:4]
        recorder.call(
            "moba_route",
            block_size=1,
            is_causal=False,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            query=query,
            key=key,
            block_indices=recorder.zeros(1, 1, self.num_queries, 8, dtype=torch.int32),
            force_first=1,
            force_last=1,
        )


@dataclass(frozen=True)
class ProductKeyCase:
    """The best pairs of product keys. ``half_dim`` fills rows of whole multiples of 16 bytes."""

    dtype: torch.dtype
    num_tokens: int = 20
    num_heads: int = 2
    num_keys: int = 40
    half_dim: int = 48
    top_k: int = 8
    share_of_infinite: float = 0.0

    least_launches = 2

    def __str__(self) -> str:
        return f"product_keys-{FLOAT_TYPES[self.dtype]}-{self.num_keys}x{self.half_dim}-top{self.top_k}" + (
            f"-infinite{self.share_of_infinite}" if self.share_of_infinite else ""
        )

    def run(self, recorder: Recorder) -> None:
        """Scores and indices."""
        heads, keys, dim = self.num_heads, self.num_keys, self.half_dim
        rows = recorder.random(heads, 2, keys, dim, dtype=self.dtype)
        if self.share_of_infinite:
            is_infinite = torch.arange(heads * 2 * keys) * 7 % 64 < 64 * self.share_of_infinite
            rows[is_infinite.view(heads, 2, keys)] *= torch.inf
        recorder.call(
            "product_key_topk",
            top_k=self.top_k,
            query=recorder.random(self.num_tokens, heads, 2, dim, dtype=self.dtype),
            keys=rows,
            scores=recorder.zeros(self.num_tokens, heads, self.top_k, dtype=torch.float32),
            indices=recorder.zeros(self.num_tokens, heads, self.top_k, dtype=torch.int64),
        )


@dataclass(frozen=True)
class MemoryCase:
    """Lookup, dot and their backward. A share of the entries, ``hot``, wants row 1; some indices name no row. Ragged
    bags are of 0 entries up to twice ``bag_size``, the last three entries nobody's.
    """

    dtype: torch.dtype
    row_dim: int = 80
    num_rows: int = 50
    num_tokens: int = 7
    bag_size: int = 40
    hot: float = 0.5
    is_forward: bool = True
    is_ragged: bool = False

    least_launches = 2

    def __str__(self) -> str:
        text = f"memory-{FLOAT_TYPES[self.dtype]}-{self.row_dim}-{self.num_tokens}x{self.bag_size}"
        return text + ("-ragged" if self.is_ragged else "")

    def run(self, recorder: Recorder) -> None:
        """Forward where it is wanted, and backward with gradients of rows and weights."""
        rows, dim, tokens, entries = self.num_rows, self.row_dim, self.num_tokens, self.bag_size
        indices = torch.randint(rows, (tokens, entries)).masked_fill(torch.rand(tokens, entries) < self.hot, 1)
        indices = recorder.keep(indices.masked_fill(torch.rand(tokens, entries) < 0.01, rows))
        values = recorder.random(rows, dim, dtype=self.dtype)
        x = recorder.random(tokens, dim, dtype=self.dtype)
        weights = recorder.random(tokens, entries, dtype=torch.float32)
        offsets = owners = None
        if self.is_ragged:
            indices, weights = recorder.keep(indices.view(1, -1)), recorder.keep(weights.view(1, -1))
            bounds = torch.arange(tokens + 1) // 2 * 2 * entries
            offsets = recorder.keep(bounds.clamp(max=tokens * entries - 3))
            owners = torch.searchsorted(offsets, torch.arange(tokens * entries), right=True)
            owners = recorder.keep((torch.where(owners <= tokens, owners, 0) - 1).to(torch.int32))
        if self.is_forward:
            out = recorder.zeros(tokens, dim, dtype=self.dtype)
            recorder.call("memory_lookup", values=values, indices=indices, weights=weights, offsets=offsets, out=out)
            dots = recorder.zeros(tokens * entries, 1, dtype=torch.float32).view(-1, 1 if self.is_ragged else entries)
            recorder.call("memory_dot", values=values, indices=indices.view_as(dots), x=x, tokens=owners, out=dots)
        rows_of = indices.flatten() if owners is None else torch.where(owners < 0, rows, indices.flatten())
        sorted_rows, order = torch.sort(rows_of.to(torch.int32), stable=True)
        sorted_rows = recorder.keep(sorted_rows)
        recorder.call(
            "memory_backward",
            grad_out=x,
            values=values,
            weights=weights,
            order=recorder.keep(order),
            sorted_rows=sorted_rows,
            targets=sorted_rows,
            tokens=owners,
            grad_rows=recorder.zeros(rows, dim, dtype=self.dtype),
            grad_weights=recorder.zeros(*weights.shape, dtype=torch.float32),
        )


@dataclass(frozen=True)
class QuantizedCase:
    """Lookup and dot of rows of 8 bits, e4m3 or integers, with a scale for every ``group_size`` columns."""

    dtype: torch.dtype
    row_dim: int = 160
    group_size: int = 80
    num_rows: int = 50
    num_tokens: int = 5
    bag_size: int = 9
    is_ragged: bool = False

    least_launches = 2

    def __str__(self) -> str:
        text = f"quantized-{str(self.dtype).removeprefix('torch.')}-{self.row_dim}"
        return text + ("-ragged" if self.is_ragged else "")

    def run(self, recorder: Recorder) -> None:
        rows, dim, tokens, entries = self.num_rows, self.row_dim, self.num_tokens, self.bag_size
        table: dict[str, Any] = {
            "values": recorder.keep(torch.randint(-127, 128, (rows, dim)).to(torch.int8)),
            "scales": recorder.keep(torch.rand(rows, dim // self.group_size)),
            "is_float8": int(self.dtype == torch.float8_e4m3fn),
        }
        indices = recorder.keep(torch.randint(rows + 1, (tokens, entries)))
        weights = recorder.random(tokens, entries, dtype=torch.float32)
        offsets = owners = None
        if self.is_ragged:
            indices, weights = recorder.keep(indices.view(1, -1)), recorder.keep(weights.view(1, -1))
            offsets = recorder.keep((torch.arange(tokens + 1) // 2 * 2 * entries).clamp(max=tokens * entries - 3))
            owners = torch.searchsorted(offsets, torch.arange(tokens * entries), right=True)
            owners = recorder.keep((torch.where(owners <= tokens, owners, 0) - 1).to(torch.int32))
        out = recorder.zeros(tokens, dim, dtype=torch.float32)
        recorder.call("memory_lookup_quantized", **table, indices=indices, weights=weights, offsets=offsets, out=out)
        x = recorder.random(tokens, dim, dtype=torch.float32)
        dots = recorder.zeros(tokens * entries, 1, dtype=torch.float32).view(-1, 1 if self.is_ragged else entries)
        indices = indices.view_as(dots)
        recorder.call("memory_dot_quantized", **table, indices=indices, x=x, tokens=owners, out=dots)


@dataclass(frozen=True)
class RowStepCase:
    """A step of an optimizer on rows, with all that a step may have, and the sum of squares. Half of the entries name
    row 1.
    """

    dtype: torch.dtype
    algorithm: int
    row_dim: int = 80
    num_rows: int = 30
    num_entries: int = 300
    state_dtype: torch.dtype = torch.bfloat16

    least_launches = 7

    def __str__(self) -> str:
        return f"row_step-{FLOAT_TYPES[self.dtype]}-{self.algorithm}-{self.row_dim}x{self.num_entries}"

    def run(self, recorder: Recorder) -> None:
        rows, dim, entries, tokens = self.num_rows, self.row_dim, self.num_entries, 7
        indices = torch.randint(rows + 1, (entries,)).masked_fill(torch.rand(entries) < 0.5, 1)
        sorted_rows, order = torch.sort(indices.to(torch.int32), stable=True)
        state = recorder.random(rows, dim, dtype=self.state_dtype)
        given = {
            "grad_out": recorder.random(tokens, dim, dtype=self.dtype),
            "weights": recorder.random(entries, dtype=torch.float32),
            "order": recorder.keep(order),
            "sorted_rows": recorder.keep(sorted_rows),
            "targets": recorder.keep(torch.unique_consecutive(sorted_rows, return_inverse=True)[1].to(torch.int32)),
            "tokens": recorder.keep(torch.randint(tokens, (entries,)).to(torch.int32)),
            "values": recorder.random(rows, dim, dtype=self.dtype),
            "algorithm_code": self.algorithm,
            "learning_rate": 0.1,
            "first_rate": 0.9,
            "second_rate": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "total_decay": -1.5,
            "grad_scale": 0.5,
            "nesterov": 1,
            "seed": 3,
            "step": 7,
            "stochastic_rounding": 1,
        }
        states = {
            "steps": recorder.keep(torch.randint(3, (rows, 1)).to(torch.int32)),
            "first": recorder.keep(state.abs()),
            "second": recorder.keep(state.square()) if self.algorithm == 2 else None,
            "decayed": recorder.keep(-torch.rand(rows, 1, dtype=torch.float64)),
        }
        recorder.call("memory_update", **given, **states, squares=None)
        squares = recorder.keep(torch.zeros(1, dtype=torch.float64))
        recorder.call("memory_update", **given, **dict.fromkeys(states), squares=squares)


@dataclass(frozen=True)
class GridCase:
    """Grid attention forward and backward. ``head_dim`` fills rows of whole multiples of 16 bytes."""

    dtype: torch.dtype
    head_dim: int = 40
    size: tuple[int, int] = (7, 9)
    stride: tuple[int, int] = (2, 2)
    batch: int = 2
    num_heads: int = 2
    has_bias: bool = True

    @property
    def least_launches(self) -> int:
        """One forward; one backward, or three of float32; and with a bias one or two for its gradient."""
        return 1 + (3 if self.dtype is torch.float32 else 1) + self.has_bias

    def __str__(self) -> str:
        rows, columns = self.size
        parts = ["grid", FLOAT_TYPES[self.dtype], f"{rows}x{columns}", f"stride{self.stride[0]}x{self.stride[1]}"]
        return "-".join(parts + [str(self.head_dim)] + ["bias"] * self.has_bias)

    def run(self, recorder: Recorder) -> None:
        """Outputs and every gradient."""
        shape = (self.batch, self.num_heads, *self.size, self.head_dim)
        group = 1
        for size, step in zip(self.size, self.stride, strict=True):
            group *= -(-size // step)

        def image(make: Any) -> Tensor:
            return make(*shape, dtype=self.dtype)

        def bias(make: Any) -> Tensor | None:
            return make(self.num_heads, group, group, dtype=torch.float32) if self.has_bias else None

        attended = {name: image(recorder.random) for name in ("query", "key", "value")}
        attended |= {"is_window": False, "rows_step": self.stride[0], "columns_step": self.stride[1]}
        attended |= {"scale": self.head_dim**-0.5, "bias": bias(recorder.random), "out": image(recorder.zeros)}
        attended["lse"] = recorder.zeros(*shape[:4], dtype=torch.float32)
        attended["softmax_terms"] = recorder.zeros(*shape[:4], 2, dtype=torch.float32)
        recorder.call("grid_attention", **attended)
        recorder.call(
            "grid_attention_backward",
            **attended,
            grad_out=image(recorder.random),
            **{f"grad_{name}": image(recorder.zeros) for name in ("query", "key", "value")},
            grad_bias=bias(recorder.zeros),
        )


@dataclass(frozen=True)
class DecodeCase:
    """An append, the choice of blocks and attention over what was cached, in a cache of pages."""

    dtype: torch.dtype
    head_dim: int = 64
    value_dim: int = 40
    length: int = 75
    query_len: int = 2
    block_size: int = 8
    top_k: int = 4
    page_size: int = 16

    least_launches = 5

    def __str__(self) -> str:
        return f"decode-{FLOAT_TYPES[self.dtype]}-{self.head_dim}x{self.value_dim}-top{self.top_k}"

    def run(self, recorder: Recorder) -> None:
        """Pages, centroids, choices, outputs and lse."""
        batch, heads, kv_heads, dtype = 2, 4, 2, self.dtype
        columns = -(-self.length // self.page_size)
        num_pages = batch * columns
        lengths = recorder.keep(torch.tensor([self.length, self.length - 11], dtype=torch.int32))
        none = recorder.keep(torch.zeros(batch, dtype=torch.int32))
        table = recorder.keep(torch.randperm(num_pages).to(torch.int32).view(batch, columns))
        problem = {"page_table": table, "block_size": self.block_size}
        key_pages = recorder.zeros(num_pages, kv_heads, self.page_size, self.head_dim, dtype=dtype)
        value_pages = recorder.zeros(num_pages, kv_heads, self.page_size, self.value_dim, dtype=dtype)
        blocks = self.page_size // self.block_size
        centroids = recorder.zeros(num_pages, kv_heads, blocks, self.head_dim, dtype=torch.float32)
        pages = {"key_pages": key_pages, "value_pages": value_pages}
        recorder.call(
            "moba_cache_append",
            **problem,
            **pages,
            seq_lens=none,
            num_tokens=lengths,
            key=recorder.random(batch, kv_heads, self.length, self.head_dim, dtype=dtype),
            value=recorder.random(batch, kv_heads, self.length, self.value_dim, dtype=dtype),
            centroids=centroids,
        )
        problem |= {"seq_lens": lengths, "num_tokens": None}
        query = recorder.random(batch, heads, self.query_len, self.head_dim, dtype=dtype)
        choices = recorder.zeros(batch, heads, self.query_len, self.top_k, dtype=torch.int32)
        recorder.call(
            "moba_decode_route",
            **problem,
            query=query,
            centroids=centroids,
            page_size=self.page_size,
            block_indices=choices,
            force_first=self.top_k // 4,
            force_last=1,
        )
        recorder.call(
            "moba_decode",
            **problem,
            **pages,
            query=query,
            block_indices=choices,
            scale=self.head_dim**-0.5,
            softcap=2.0,
            window=20,
            sinks=recorder.random(heads, dtype=torch.float32),
            out=recorder.zeros(batch, heads, self.query_len, self.value_dim, dtype=dtype),
            lse=recorder.zeros(batch, heads, self.query_len, dtype=torch.float32),
        )


@dataclass(frozen=True)
class KeyConvCase:
    """The key convolution forward and backward, with a state, or packed where there are ``lengths``."""

    dtype: torch.dtype
    head_dim: int = 40
    width: int = 3
    num_tokens: int = 70
    lengths: tuple[int, ...] = ()
    has_options: bool = False

    least_launches = 3

    def __str__(self) -> str:
        parts = ["key_conv", FLOAT_TYPES[self.dtype], str(self.head_dim), f"width{self.width}"]
        return "-".join(parts + ["packed"] * bool(self.lengths) + ["options"] * self.has_options)

    def run(self, recorder: Recorder) -> None:
        """Outputs and every gradient."""
        packed, heads, batch = bool(self.lengths), 2, 2
        bounds = recorder.keep(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int64)) if packed else None

        def keys(make: Any, count: int) -> Tensor:
            shape = (sum(self.lengths), heads) if packed else (batch, heads, count)
            return make(*shape, self.head_dim, dtype=self.dtype)

        given = {
            "cu_seqlens": bounds,
            "key": keys(recorder.random, self.num_tokens),
            "state": None if packed else keys(recorder.random, self.width - 1),
            "weight": recorder.random(heads, self.head_dim, self.width, dtype=torch.float32),
            "bias": recorder.random(heads, self.head_dim, dtype=torch.float32) if self.has_options else None,
            "has_silu": not self.has_options or packed,
        }
        recorder.call("key_conv", **given, out=keys(recorder.zeros, self.num_tokens))
        recorder.call(
            "key_conv_backward",
            **given,
            grad_out=keys(recorder.random, self.num_tokens),
            grad_key=keys(recorder.zeros, self.num_tokens),
            grad_state=None if packed else keys(recorder.zeros, self.width - 1),
            grad_weight=recorder.zeros(heads, self.head_dim, self.width, dtype=torch.float32),
            grad_bias=recorder.zeros(heads, self.head_dim, dtype=torch.float32) if self.has_options else None,
        )


@dataclass(frozen=True)
class IndexRouteCase:
    """The indexer's choice; with ``is_sum`` of weighted sums over two index heads a choice."""

    dtype: torch.dtype
    dim: int = 40
    is_sum: bool = False
    has_whole_tiles: bool = False

    least_launches = 1

    def __str__(self) -> str:
        return "-".join(["index_route", FLOAT_TYPES[self.dtype], str(self.dim)] + ["sum"] * self.is_sum)

    def run(self, recorder: Recorder) -> None:
        """Forced and scored blocks, and queries that see fewer than they may choose."""
        heads, choices, tokens = 4, 2 if self.is_sum else 4, 130 if self.has_whole_tiles else 70
        recorder.call(
            "index_route",
            index_query=recorder.random(1, heads, tokens, self.dim, dtype=self.dtype),
            index_key=recorder.random(1, 2, tokens, self.dim, dtype=self.dtype),
            weights=recorder.random(1, heads, tokens, dtype=torch.float32) if self.is_sum else None,
            block_size=64 if self.has_whole_tiles else 9,
            reduction_code=2 if self.is_sum else int(self.dtype == torch.float16),
            is_causal=True,
            force_first=1,
            force_last=int(not self.is_sum),
            block_indices=recorder.zeros(1, choices, tokens, 2 if self.has_whole_tiles else 4, dtype=torch.int32),
        )


Case = (
    MobaCase
    | FilteredRouteCase
    | ProductKeyCase
    | MemoryCase
    | QuantizedCase
    | GridCase
    | DecodeCase
    | KeyConvCase
    | IndexRouteCase
)


def record(module: ModuleType, case: Case) -> Recorder:
    """Every launch of the case."""
    torch.manual_seed(1)
    recorder = Recorder(module)
    case.run(recorder)
    return recorder
