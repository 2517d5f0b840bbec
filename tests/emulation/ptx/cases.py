"""Small problems of every op, run by the emulated module while it records its launches."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topgather.ops._library import describe

from .replay import FLOAT_TYPES, RecordedLaunch, take_recording

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


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

    def workspace(self, num_bytes: int) -> tuple[int, int]:
        """Address and size of memory that a call may use."""
        self._kept.append(torch.zeros(max(num_bytes, 1), dtype=torch.uint8))
        return self._kept[-1].data_ptr(), num_bytes

    def call(self, entry_point: str, *arguments: Any) -> None:
        """Run an entry point on device 0 and the default stream."""
        self.module.start_recording()
        getattr(self.module, entry_point)(*arguments, 0, 0)
        self.launches += take_recording(self.module)

    def run(self, native: str, **fields: Any) -> None:
        """Run an entry point with these fields of its parameter struct, on device 0 and the default stream."""
        fields["num_threads"] = 1
        names = self.module.argument_names[f"{native}_cuda"][
            : -len(("workspace", "workspace_bytes", "device", "stream"))
        ]
        arguments = [describe(fields[name]) for name in names]
        count = getattr(self.module, f"{native}_workspace_bytes", None)
        self.call(f"{native}_cuda", *arguments, *self.workspace(0 if count is None else count(*arguments, 0)))


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
    is_deterministic: bool = False

    least_launches = 12

    def __str__(self) -> str:
        parts = [FLOAT_TYPES[self.dtype], f"{self.head_dim}x{self.value_dim}", "causal" if self.is_causal else "full"]
        return "-".join(parts + ["packed"] * bool(self.lengths) + ["deterministic"] * self.is_deterministic)

    def _problem(self, recorder: Recorder) -> tuple[Any, ...]:
        boundaries = [0, 0]
        if self.lengths:
            starts = torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int64)
            boundaries = [recorder.keep(each).data_ptr() for each in (starts, starts.clone())]
        sizes = (len(self.lengths) or 1, self.num_heads, self.num_kv_heads, self.num_tokens, self.num_tokens)
        return (
            DTYPE_CODES[self.dtype],
            *sizes,
            self.head_dim,
            self.value_dim,
            self.block_size,
            self.top_k,
            self.is_causal,
            self.head_dim**-0.5,
            *boundaries,
            1,
        )

    def run(self, recorder: Recorder) -> None:
        """Centroids, routing, forward and backward."""
        problem = self._problem(recorder)
        heads, kv_heads, dtype = self.num_heads, self.num_kv_heads, self.dtype

        def call(kind: str, entry_point: str, tensors: list[Tensor], *more: Any) -> None:
            workspace = recorder.workspace(recorder.module.moba_cuda_workspace_bytes(kind, problem, 0))
            rows = [(tensor.data_ptr(), *tensor.stride()[:3]) for tensor in tensors]
            recorder.call(entry_point, problem, *rows, workspace, *more)

        def random(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
            return recorder.random(1, heads, self.num_tokens, dim, dtype=dtype)

        def zeros(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
            return recorder.zeros(1, heads, self.num_tokens, dim, dtype=dtype)

        query = random(heads, self.head_dim, dtype)
        key = random(kv_heads, self.head_dim, dtype)
        value = random(kv_heads, self.value_dim, dtype)
        block_indices = zeros(heads, self.top_k, torch.int32)
        out = zeros(heads, self.value_dim, dtype)
        lse = zeros(heads, 1, torch.float32)
        call("route", "moba_route_cuda", [query, key, block_indices])
        call("forward", "moba_forward_cuda", [query, key, value, block_indices, out, lse])
        saved = [query, key, value, block_indices, out, lse]
        incoming = [random(heads, self.value_dim, dtype), random(heads, 1, torch.float32)]
        gradients = [
            zeros(heads, self.head_dim, dtype),
            zeros(kv_heads, self.head_dim, dtype),
            zeros(kv_heads, self.value_dim, dtype),
        ]
        kind = "backward_deterministic" if self.is_deterministic else "backward"
        call(kind, "moba_backward_cuda", saved + incoming + gradients, self.is_deterministic)


@dataclass(frozen=True)
class ProductKeyCase:
    """The best pairs of product keys. ``half_dim`` fills rows of whole multiples of 16 bytes."""

    dtype: torch.dtype
    num_tokens: int = 20
    num_heads: int = 2
    num_keys: int = 40
    half_dim: int = 48
    top_k: int = 8

    least_launches = 1

    def __str__(self) -> str:
        return f"product_keys-{FLOAT_TYPES[self.dtype]}-{self.num_keys}x{self.half_dim}-top{self.top_k}"

    def run(self, recorder: Recorder) -> None:
        """Scores and indices."""
        tokens, heads, dim = self.num_tokens, self.num_heads, self.half_dim
        recorder.run(
            "product_key_topk",
            query=recorder.random(tokens, heads, 2, dim, dtype=self.dtype),
            keys=recorder.random(heads, 2, self.num_keys, dim, dtype=self.dtype),
            top_k=self.top_k,
            scores=recorder.zeros(tokens, heads, self.top_k, dtype=torch.float32),
            indices=recorder.zeros(tokens, heads, self.top_k, dtype=torch.int64),
        )


@dataclass(frozen=True)
class MemoryCase:
    """Lookup, dot and their backward. A share of the entries, ``hot``, wants row 1; some indices name no row."""

    dtype: torch.dtype
    row_dim: int = 80
    num_rows: int = 50
    num_tokens: int = 7
    bag_size: int = 40
    hot: float = 0.5
    is_forward: bool = True

    least_launches = 2

    def __str__(self) -> str:
        return f"memory-{FLOAT_TYPES[self.dtype]}-{self.row_dim}-{self.num_tokens}x{self.bag_size}"

    def run(self, recorder: Recorder) -> None:
        """Forward where it is wanted, and backward with gradients of rows and weights."""
        rows, dim, tokens, entries = self.num_rows, self.row_dim, self.num_tokens, self.bag_size
        indices = torch.randint(rows, (tokens, entries)).masked_fill(torch.rand(tokens, entries) < self.hot, 1)
        indices = recorder.keep(indices.masked_fill(torch.rand(tokens, entries) < 0.01, rows))
        values = recorder.random(rows, dim, dtype=self.dtype)
        x = recorder.random(tokens, dim, dtype=self.dtype)
        weights = recorder.random(tokens, entries, dtype=torch.float32)
        if self.is_forward:
            out = recorder.zeros(tokens, dim, dtype=self.dtype)
            recorder.run("memory_lookup", values=values, indices=indices, weights=weights, out=out)
            dots = recorder.zeros(tokens, entries, dtype=torch.float32)
            recorder.run("memory_dot", values=values, indices=indices, x=x, out=dots)
        sorted_rows, order = torch.sort(indices.flatten().to(torch.int32), stable=True)
        sorted_rows = recorder.keep(sorted_rows)
        recorder.run(
            "memory_backward",
            grad_out=x,
            values=values,
            weights=weights,
            order=recorder.keep(order),
            sorted_rows=sorted_rows,
            targets=sorted_rows,
            grad_rows=recorder.zeros(rows, dim, dtype=self.dtype),
            grad_weights=recorder.zeros(tokens, entries, dtype=torch.float32),
        )


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
        """One forward, three backward, and with a bias one or two for its gradient."""
        return 5 if self.has_bias else 4

    def __str__(self) -> str:
        rows, columns = self.size
        parts = ["grid", FLOAT_TYPES[self.dtype], f"{rows}x{columns}", f"stride{self.stride[0]}x{self.stride[1]}"]
        return "-".join(parts + [str(self.head_dim)] + ["bias"] * self.has_bias)

    def run(self, recorder: Recorder) -> None:
        """Outputs and every gradient."""
        heads, shape = self.num_heads, (self.batch, self.num_heads, *self.size, self.head_dim)
        axes = [
            (size, min(step, size), 1, step, -(-size // step))
            for size, step in zip(self.size, self.stride, strict=True)
        ]
        problem = (DTYPE_CODES[self.dtype], self.batch, heads, self.head_dim, *axes, self.head_dim**-0.5, 1)
        group = axes[0][4] * axes[1][4]

        def image_of(tensor: Tensor) -> tuple[int, ...]:
            return (tensor.data_ptr(), *tensor.stride()[:4])

        query, key, value = (recorder.random(*shape, dtype=self.dtype) for _ in range(3))
        bias = recorder.random(heads, group, group, dtype=torch.float32).data_ptr() if self.has_bias else 0
        out = recorder.zeros(*shape, dtype=self.dtype)
        lse = recorder.zeros(*shape[:4], dtype=torch.float32).data_ptr()
        inputs = [image_of(tensor) for tensor in (query, key, value)]
        recorder.call("grid_forward_cuda", problem, *inputs, bias, image_of(out), lse)
        incoming = [image_of(out), image_of(recorder.random(*shape, dtype=self.dtype))]
        recorder.call(
            "grid_backward_cuda",
            problem,
            (*inputs, *incoming),
            bias,
            lse,
            tuple(image_of(recorder.zeros(*shape, dtype=self.dtype)) for _ in range(3)),
            recorder.zeros(heads, group, group, dtype=torch.float32).data_ptr() if self.has_bias else 0,
            recorder.workspace(recorder.module.grid_backward_workspace_bytes(problem, self.has_bias)),
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
        table = recorder.keep(torch.randperm(num_pages).to(torch.int32))

        def problem(query_heads: int, tokens: int, seq_lens: Tensor, num_tokens: Tensor | None) -> tuple[Any, ...]:
            sizes = (batch, query_heads, kv_heads, tokens, self.head_dim, self.value_dim, self.block_size)
            pages = (self.page_size, num_pages, columns, self.top_k)
            counts = 0 if num_tokens is None else num_tokens.data_ptr()
            addresses = (seq_lens.data_ptr(), counts, table.data_ptr())
            return (DTYPE_CODES[dtype], *sizes, *pages, self.head_dim**-0.5, *addresses, 1)

        def rows(tensor: Tensor) -> tuple[int, ...]:
            return (tensor.data_ptr(), *tensor.stride()[:3])

        key_pages = recorder.zeros(num_pages, kv_heads, self.page_size, self.head_dim, dtype=dtype)
        value_pages = recorder.zeros(num_pages, kv_heads, self.page_size, self.value_dim, dtype=dtype)
        blocks = self.page_size // self.block_size
        centroids = recorder.zeros(num_pages, kv_heads, blocks, self.head_dim, dtype=torch.float32)
        cache = (rows(key_pages), rows(value_pages))
        key = recorder.random(batch, kv_heads, self.length, self.head_dim, dtype=dtype)
        value = recorder.random(batch, kv_heads, self.length, self.value_dim, dtype=dtype)
        appended = problem(kv_heads, self.length, none, lengths)
        recorder.call("moba_cache_append_cuda", appended, rows(key), rows(value), *cache, rows(centroids))
        query = recorder.random(batch, heads, self.query_len, self.head_dim, dtype=dtype)
        choices = recorder.zeros(batch, heads, self.query_len, self.top_k, dtype=torch.int32)
        out = recorder.zeros(batch, heads, self.query_len, self.value_dim, dtype=dtype)
        lse = recorder.zeros(batch, heads, self.query_len, 1, dtype=torch.float32)
        asked = problem(heads, self.query_len, lengths, None)
        space = recorder.workspace(recorder.module.moba_decode_route_workspace_bytes(asked))
        recorder.call("moba_decode_route_cuda", asked, rows(query), rows(centroids), rows(choices), space)
        space = recorder.workspace(recorder.module.moba_decode_workspace_bytes(asked))
        recorder.call("moba_decode_cuda", asked, rows(query), *cache, rows(choices), rows(out), rows(lse), space)


@dataclass(frozen=True)
class KeyConvCase:
    """The key convolution forward and backward, with a state, or packed where there are ``lengths``."""

    dtype: torch.dtype
    head_dim: int = 40
    width: int = 3
    num_tokens: int = 70
    lengths: tuple[int, ...] = ()

    least_launches = 3

    def __str__(self) -> str:
        parts = ["key_conv", FLOAT_TYPES[self.dtype], str(self.head_dim), f"width{self.width}"]
        return "-".join(parts + ["packed"] * bool(self.lengths))

    def run(self, recorder: Recorder) -> None:
        """Outputs and every gradient."""
        packed = bool(self.lengths)
        batch, heads, tokens = (1, 2, sum(self.lengths)) if packed else (2, 2, self.num_tokens)
        bounds = recorder.keep(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int64))
        sequences = (bounds.data_ptr(), len(self.lengths)) if packed else (0, 0)
        dtypes = (DTYPE_CODES[self.dtype], DTYPE_CODES[torch.float32])
        problem = (*dtypes, batch, heads, tokens, self.head_dim, self.width, *sequences, 1)

        def rows(tensor: Tensor) -> tuple[int, ...]:
            return (tensor.data_ptr(), *tensor.stride()[:3])

        def keys(count: int, make: Any) -> tuple[int, ...]:
            return rows(make(batch, heads, count, self.head_dim, dtype=self.dtype))

        nothing = (0, 0, 0, 0)
        key, grad_out = keys(tokens, recorder.random), keys(tokens, recorder.random)
        state = nothing if packed else keys(self.width - 1, recorder.random)
        weight = recorder.random(heads, self.head_dim, self.width, dtype=torch.float32).data_ptr()
        recorder.call("key_conv_forward_cuda", problem, key, state, weight, keys(tokens, recorder.zeros))
        grad_state = nothing if packed else keys(self.width - 1, recorder.zeros)
        recorder.call(
            "key_conv_backward_cuda",
            problem,
            (grad_out, key, state),
            weight,
            (keys(tokens, recorder.zeros), grad_state),
            recorder.zeros(heads, self.head_dim, self.width, dtype=torch.float32).data_ptr(),
            recorder.workspace(recorder.module.key_conv_backward_workspace_bytes(problem, True)),
        )


Case = MobaCase | ProductKeyCase | MemoryCase | GridCase | DecodeCase | KeyConvCase


def record(module: ModuleType, case: Case) -> Recorder:
    """Every launch of the case."""
    torch.manual_seed(1)
    recorder = Recorder(module)
    case.run(recorder)
    return recorder
