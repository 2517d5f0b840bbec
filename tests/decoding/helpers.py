"""What the tests of decoding share: sequences that come in steps, and checks of all they gave against the oracle."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, assert_routing_contract, attention_magnitudes, with_layout
from tests.common.tensors import assert_bitwise_equal, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference

Cache = tg.MobaCache | tg.PagedMobaCache


@dataclass(frozen=True)
class DecodeCase:
    """One problem.

    ``steps`` has, per append, the new tokens of each sequence; ``pages`` is blocks of a page, 0 for the contiguous
    cache.
    """

    steps: tuple[tuple[int, ...], ...] = ((20,), (1,), (1,))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    block_size: int = 8
    top_k: int | None = 2
    pages: int = 0
    scale: float | None = None

    @property
    def batch(self) -> int:
        return len(self.steps[0])

    @property
    def lengths(self) -> list[int]:
        """Of each sequence, in the end."""
        return [sum(counts) for counts in zip(*self.steps, strict=True)]

    @property
    def value_head_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    def attention_case(self, sequence: int) -> AttentionCase:
        """The same sequence, all at once."""
        length = self.lengths[sequence]
        return AttentionCase(
            1, self.num_heads, self.num_kv_heads, length, length, self.head_dim, self.value_head_dim, self.block_size,
            self.slots, True, self.scale,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """``top_k``, or as many as the longest sequence has blocks."""
        return max(1, -(-max(self.lengths) // self.block_size)) if self.top_k is None else self.top_k

    def __str__(self) -> str:
        """Test id: the fields that differ from the default."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed).replace(" ", "") or "default"


def in_steps(*steps: int, batch: int = 1) -> tuple[tuple[int, ...], ...]:
    """Steps that are the same for every sequence."""
    return tuple((step,) * batch for step in steps)


def make_cache(case: DecodeCase, dtype: torch.dtype, device: torch.device, spare: int = 0) -> Cache:
    """An empty cache that has room for ``case`` and ``spare`` tokens, pages in a shuffled order."""
    max_seq_len = max(1, max(case.lengths) + spare)
    if case.pages == 0:
        return tg.MobaCache(
            case.batch, case.num_kv_heads, case.head_dim, block_size=case.block_size, max_seq_len=max_seq_len,
            value_dim=case.value_dim, dtype=dtype, device=device,
        )  # fmt: skip
    page_size = case.pages * case.block_size
    cache = tg.PagedMobaCache(
        case.batch, case.num_kv_heads, case.head_dim, block_size=case.block_size, max_seq_len=max_seq_len,
        value_dim=case.value_dim, dtype=dtype, device=device, page_size=page_size,
        num_pages=case.batch * -(-max_seq_len // page_size) + 3,
    )  # fmt: skip
    random.Random(0).shuffle(cache._free)
    poison(cache)
    return cache


def poison(cache: Cache, number: float = torch.nan) -> None:
    """NaN wherever nothing was written: what a cache holds there must not matter."""
    for pages in (cache.key_pages, cache.value_pages, cache.centroids):
        pages.fill_(number)


@dataclass
class Tokens:
    """Query, key and value of every sequence, each ``[1, H, length, D]``."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]


def make_tokens(case: DecodeCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tokens:
    def draw(heads: int, dim: int, seed: int) -> list[Tensor]:
        return [random_tensor((1, heads, n, dim), dtype, device, seed + 3 * b) for b, n in enumerate(case.lengths)]

    return Tokens(
        draw(case.num_heads, case.head_dim, seed),
        draw(case.num_kv_heads, case.head_dim, seed + 1),
        draw(case.num_kv_heads, case.value_head_dim, seed + 2),
    )


def padded(
    tensors: Sequence[Tensor], starts: Sequence[int], counts: Sequence[int], layout: str = "contiguous"
) -> Tensor:
    """The next ``counts`` tokens of every sequence in one tensor, NaN behind them."""
    most = max(counts, default=0)
    first = tensors[0]
    batch = first.new_full((len(tensors), first.size(1), most, first.size(3)), torch.nan)
    for b, (tensor, start, count) in enumerate(zip(tensors, starts, counts, strict=True)):
        batch[b, :, :count] = tensor[0, :, start : start + count]
    return with_layout(batch, layout)


def choice_of(cache: Cache, query: Tensor, top_k: int | None, num_tokens: Tensor | None) -> Tensor:
    """The blocks that ``moba_decode`` chooses."""
    num_blocks = max(1, -(-max(cache.lengths, default=0) // cache.block_size))
    return torch.ops.topgather.moba_decode_route(
        query, cache.centroids, cache.seq_lens, cache.page_table, num_tokens, cache.block_size, cache.page_size,
        num_blocks if top_k is None else top_k,
    )  # fmt: skip


@dataclass
class Rows:
    """What every token of a sequence got: ``out [1, Hq, length, Dv]`` and so on."""

    out: Tensor
    lse: Tensor
    block_indices: Tensor


def is_ragged(counts: Sequence[int]) -> bool:
    return len(set(counts)) > 1


def run_steps(
    case: DecodeCase, tokens: Tokens, cache: Cache, layout: str = "contiguous", on_device: bool = False
) -> list[Rows]:
    """Append and attend, step by step. ``on_device``: counts go in as tensors there."""
    found: list[list[Rows]] = [[] for _ in range(case.batch)]
    starts = [0] * case.batch
    for counts in case.steps:
        query, key, value = (padded(t, starts, counts, layout) for t in (tokens.query, tokens.key, tokens.value))
        count_tensor = torch.tensor(counts, dtype=torch.int32, device=query.device)
        is_needed = is_ragged(counts)
        cache.append(key, value, (count_tensor if on_device else list(counts)) if is_needed else None)
        out, lse = tg.moba_decode(query, cache, case.top_k, case.scale, return_lse=True)
        chosen = choice_of(cache, query, case.top_k, count_tensor if is_needed else None)
        given = tg.moba_decode(query, cache, scale=case.scale, routing=tg.BlockRouting(chosen, case.block_size))
        assert_bitwise_equal("out of the same choice", given, out)
        chosen = torch.nn.functional.pad(chosen, (0, max(0, case.slots - chosen.size(3))), value=-1)
        for b, count in enumerate(counts):
            found[b].append(Rows(out[b : b + 1, :, :count], lse[b : b + 1, :, :count], chosen[b : b + 1, :, :count]))
            assert (out[b, :, count:] == 0).all() and (lse[b, :, count:] == -torch.inf).all(), "rows of no token"
            assert (chosen[b, :, count:] == -1).all(), "choices of no token"
            starts[b] += count
        assert cache.seq_lens.tolist() == cache.lengths == starts
    return [joined(rows) for rows in found]


def joined(rows: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(row, f.name) for row in rows], dim=2) for f in fields(Rows)))


def assert_rows(rows: Rows, tokens: Tokens, sequence: int, case: DecodeCase) -> None:
    """Every row is that of attention over the whole sequence, on a choice of blocks that keeps its promises."""
    query, key, value = tokens.query[sequence], tokens.key[sequence], tokens.value[sequence]
    dtype = query.dtype
    whole = case.attention_case(sequence)
    assert rows.out.dtype == dtype and rows.lse.dtype == accumulation_dtype(dtype)
    assert_routing_contract(rows.block_indices, query, key, case.block_size, case.slots, True)
    out, lse = reference.moba_attention(query, key, value, rows.block_indices, case.block_size, True, case.scale)
    no_gradient = torch.zeros_like(value[:, :1].expand(-1, query.size(1), -1, -1))
    sizes = attention_magnitudes(query, key, value, no_gradient, lse, rows.block_indices, whole)
    for name, actual, expected in (("out", rows.out, out), ("lse", rows.lse, lse)):
        assert_close(
            name, actual, expected, sizes.by_name[name], TOLERANCES["moba_decode", name], dtype,
            case.head_dim + whole.keys, sizes.score_factor,
        )  # fmt: skip


def check_decode(
    case: DecodeCase, dtype: torch.dtype, device: torch.device, layout: str = "contiguous", seed: int = 0
) -> list[Rows]:
    """Decode random sequences in steps; check every row."""
    tokens = make_tokens(case, dtype, device, seed)
    found = run_steps(case, tokens, make_cache(case, dtype, device), layout)
    for sequence, rows in enumerate(found):
        assert_rows(rows, tokens, sequence, case)
    return found


def filled_cache(
    case: DecodeCase,
    dtype: torch.dtype,
    device: torch.device,
    spare: int = 0,
    seed: int = 0,
    unwritten: float = torch.nan,
) -> tuple[Cache, Tokens]:
    """A cache to which all of ``case`` was appended, and what that was; ``unwritten`` is what it holds elsewhere."""
    tokens = make_tokens(case, dtype, device, seed)
    cache = make_cache(case, dtype, device, spare)
    poison(cache, unwritten)
    for starts, counts in _starts(case):
        cache.append(padded(tokens.key, starts, counts), padded(tokens.value, starts, counts), list(counts))
    return cache, tokens


def _starts(case: DecodeCase) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    starts = [0] * case.batch
    for counts in case.steps:
        yield list(starts), counts
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


def contents_of(cache: Cache, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and centroids (of whole blocks; sums of a last, unfinished one) of one sequence, in order."""
    length = cache.lengths[sequence]
    num_blocks = -(-length // cache.block_size)
    if cache.page_table is None:
        pages = torch.tensor([sequence], device=cache.device)
    else:
        pages = cache.page_table[sequence, : -(-length // cache.page_size)].long()
    key, value, centroids = (
        rows[pages].transpose(0, 1).flatten(1, 2) for rows in (cache.key_pages, cache.value_pages, cache.centroids)
    )
    return key[:, :length], value[:, :length], centroids[:, :num_blocks]


def assert_same_contents(cache: Cache, sequence: int, other: Cache, other_sequence: int) -> None:
    """Bit for bit, unfinished sums included."""
    pairs = zip(contents_of(cache, sequence), contents_of(other, other_sequence), strict=True)
    for name, (left, right) in zip(("keys", "values", "centroids"), pairs, strict=True):
        assert_bitwise_equal(f"{name} of sequence {sequence}", left, right)
