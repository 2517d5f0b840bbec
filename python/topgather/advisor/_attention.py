"""Dense against block attention on this machine, and which setting to take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import checks
from ..ops import moba_attention
from . import _show
from ._law import Needle
from ._measure import Run, apart, device_name, peak_bytes, show_seconds, time_in_turn
from ._progress import Progress
from ._shape import DEFAULT_SEQ_LEN, AttentionShape, shape_of_model

BLOCK_SIZES = (32, 64, 128, 256)
TOP_KS = (4, 8, 16)
CLOSE = 0.05  # recalls that far apart are as good as one another
SHORTEST = 512  # where the search for the crossover starts


@dataclass(frozen=True)
class Measurement:
    """One kind of attention at one length.

    Args:
        seq_len: tokens of the sequence.
        block_size: keys per block; None for dense attention.
        top_k: blocks per query, the own one included; None for dense attention.
        seconds: least time of a call, with its gradients where they were asked for.
        bytes: what the call adds to the memory held, at its peak, results included; None where it was not measured.
        recall: probability with which the last query chooses a needle's block, by the routing law; 1 for dense.
        is_measured: whether ``seconds`` was measured; otherwise it grows with the square of the length from the last
            one that was.
    """

    seq_len: int
    block_size: int | None
    top_k: int | None
    seconds: float
    bytes: int | None
    recall: float
    is_measured: bool = True

    @property
    def is_dense(self) -> bool:
        """Whether this is dense attention."""
        return self.block_size is None

    @property
    def setting(self) -> tuple[int, int] | None:
        """``block_size`` and ``top_k``; None for dense attention."""
        return None if self.block_size is None or self.top_k is None else (self.block_size, self.top_k)


@dataclass(frozen=True)
class Advice:
    """What :func:`topgather.advise` measured, and what it advises. ``print`` shows the table.

    Args:
        shape: sizes of the attention.
        device: name of the device that was measured on.
        seq_lens: the lengths that were asked for, ascending.
        measurements: of every kind of attention at these lengths, and at shorter ones for the crossover.
        needle: what recall was computed for.
        recommended: the advised setting at the longest length; None for dense attention.
        crossover: length from which the advised setting, or the fastest where none is advised, is faster than dense
            attention; None where it never was.
        is_crossover_exact: whether dense attention was faster below; else it was not at any length measured.
        reason: why this setting, in words.
        code: the lines that use it.
    """

    shape: AttentionShape
    device: str
    seq_lens: tuple[int, ...]
    measurements: tuple[Measurement, ...]
    needle: Needle
    recommended: Measurement | None
    crossover: int | None
    is_crossover_exact: bool
    reason: str
    code: str

    def at(self, seq_len: int) -> list[Measurement]:
        """Measurements at one length, dense attention first.

        Args:
            seq_len: the length.
        """
        return [row for row in self.measurements if row.seq_len == seq_len]

    def speedup(self, row: Measurement) -> float:
        """How many times as fast as dense attention at the same length.

        Args:
            row: one of ``measurements``.
        """
        return self.at(row.seq_len)[0].seconds / row.seconds

    def curve(self, setting: tuple[int, int] | None) -> list[Measurement]:
        """Measurements of one setting by ascending length.

        Args:
            setting: ``(block_size, top_k)``, or None for dense attention.
        """
        return [row for row in self.measurements if row.setting == setting]

    def __str__(self) -> str:
        return _show.attention_text(self)

    def save_html(self, path: str | Path) -> None:
        """Write one page with table, curves and advice, which needs no other file.

        Args:
            path: of the file to write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        _show.save_attention_html(self, Path(path))


@apart()
def advise(
    *,
    seq_len: int | Sequence[int] | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    train: bool = False,
    dtype: torch.dtype | None = None,
    model: str | None = None,
    batch_size: int = 1,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    top_ks: Sequence[int] = TOP_KS,
    device: torch.device | str = "cpu",
    seconds: float = 30.0,
    needle: Needle | None = None,
    min_recall: float = 0.9,
    progress: bool = False,
) -> Advice:
    """Measure dense and block attention here, and advise a setting.

    Dense attention is ``torch.nn.functional.scaled_dot_product_attention``, causal. Candidates run in turn, and a time
    is the least of several. The advised setting is the fastest of those that are faster than dense attention at the
    longest length and whose expected recall (FlashMoBA, arXiv 2511.11571; docs/block-attention.md) reaches
    ``min_recall``; where none does, of the faster ones the fastest whose recall is within 0.05 of the highest.

    Args:
        seq_len: tokens, one length or several; if None 16384, or what the model takes where that is less.
        heads: query heads; the model's if None, or 8.
        kv_heads: key heads, which divide them; the model's if None, or ``heads``.
        head_dim: channels of a head; the model's if None, or 64.
        train: whether the gradients are computed too.
        dtype: of queries, keys and values; the model's if None, or float32.
        model: a name or folder that ``transformers.AutoConfig.from_pretrained`` takes, or the path of a class of
            transformers, ``package.module:Class``, a config or a model, of which the defaults are taken.
        batch_size: sequences at a time.
        block_sizes: keys per block to try.
        top_ks: blocks per query to try, the own one included.
        device: where to measure.
        seconds: about how long to measure. Where dense attention would take too large a part of it, its time is
            extrapolated from a shorter length, and shown as such. Every setting is measured at least twice.
        needle: what recall is computed for; if None a :class:`Needle` of 4 tokens.
        min_recall: the recall asked for, above 0 and at most 1.
        progress: whether a bar is shown on stderr: by rich or tqdm where one is installed, else as lines.

    Returns:
        An :class:`Advice`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, or a model that is unknown or has no attention.
        ImportError: ``model`` without the package transformers.
    """
    given = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    rest: dict[str, Any] = {"batch_size": batch_size, "train": train}
    if model is not None:
        if not isinstance(model, str):
            raise TypeError(f"model must be a str, got {type(model).__name__}")
        shape = shape_of_model(model, **given, **rest)
    else:
        heads = 8 if heads is None else heads
        shape = AttentionShape(
            heads,
            heads if kv_heads is None else kv_heads,
            64 if head_dim is None else head_dim,
            torch.float32 if dtype is None else dtype,
            **rest,
        )
    seq_lens = _lengths("seq_len", min(DEFAULT_SEQ_LEN, shape.max_seq_len or DEFAULT_SEQ_LEN), seq_len)
    sizes, counts = _lengths("block_sizes", 1, block_sizes), _lengths("top_ks", 1, top_ks)
    for name, number in (("seconds", seconds), ("min_recall", min_recall)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
        if not 0 < number < math.inf or (name == "min_recall" and number > 1):
            raise ValueError(f"{name} must be above 0{' and at most 1' if name == 'min_recall' else ''}, got {number}")
    needle = Needle() if needle is None else needle
    if not isinstance(needle, Needle):
        raise TypeError(f"needle must be a topgather.advisor.Needle or None, got {type(needle).__name__}")
    place = torch.device(device)
    settings = [(size, count) for size in sizes for count in counts]
    with Progress(progress) as shown:
        rows = _measure(shape, seq_lens, settings, place, needle, float(seconds), shown)
    return _decide(shape, device_name(place), seq_lens, rows, needle, float(min_recall))


def _lengths(name: str, default: int, given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return (default,)
    numbers = (given,) if isinstance(given, int) else tuple(given)
    if not numbers:
        raise ValueError(f"{name} must not be empty")
    for number in numbers:
        checks.check_count(name, number)
    return tuple(sorted(set(numbers)))


# --- measuring ------------------------------------------------------------------------------------------------------


class _Problem:
    """Queries, keys and values of one length, and how to attend to them."""

    def __init__(self, shape: AttentionShape, seq_len: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(heads: int) -> Tensor:
            sizes = (shape.batch_size, heads, seq_len, shape.head_dim)
            return torch.randn(sizes, generator=generator, device=device).to(shape.dtype).requires_grad_(shape.train)

        self.shape = shape
        self.query, self.key, self.value = (random(count) for count in (shape.heads, shape.kv_heads, shape.kv_heads))
        self.grad_out = random(shape.heads).detach() if shape.train else None

    def dense(self, expands: bool) -> Run:
        """Torch's attention, with key heads shared by option or repeated."""
        group = self.shape.heads // self.shape.kv_heads
        query, key, value = self.query, self.key, self.value

        def run() -> Tensor:
            if expands:
                return F.scaled_dot_product_attention(
                    query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal=True
                )
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)

        return self._with_gradients(run)

    def block(self, block_size: int, top_k: int) -> Run:
        """Block attention."""
        return self._with_gradients(lambda: moba_attention(self.query, self.key, self.value, block_size, top_k))

    def _with_gradients(self, run: Callable[[], Tensor]) -> Run:
        if self.grad_out is None:
            return run
        return lambda: torch.autograd.grad(run(), (self.query, self.key, self.value), self.grad_out)


def _ladder(seq_lens: Sequence[int]) -> list[int]:
    """The lengths asked for, and powers of two below the longest."""
    lengths = set(seq_lens)
    length = SHORTEST
    while length < max(seq_lens):
        lengths.add(length)
        length *= 2
    return sorted(lengths)


def _measure(
    shape: AttentionShape,
    seq_lens: Sequence[int],
    settings: Sequence[tuple[int, int]],
    device: torch.device,
    needle: Needle,
    seconds: float,
    shown: Progress,
) -> list[Measurement]:
    ladder = _ladder(seq_lens)
    rows: list[Measurement] = []
    dense: Measurement | None = None
    expands: bool | None = None if shape.heads != shape.kv_heads else False
    ends = time.perf_counter() + seconds
    for i, length in enumerate(ladder):
        # Time goes by length, as block attention's does, and what a length leaves over goes to the longer ones.
        share = max(0.0, ends - time.perf_counter()) * length / sum(ladder[i:])
        shown.begin(f"{length} tokens", sum(ladder[:i]) / sum(ladder), length / sum(ladder), share)
        problem = _Problem(shape, length, device)
        if expands is None:
            ways = {str(way): problem.dense(way) for way in (False, True)}
            fastest = time_in_turn(ways, device, 0.0)
            expands = fastest["True"] < fastest["False"]
        assert expands is not None
        runs = {f"block_size {size}, top_k {count}": problem.block(size, count) for size, count in settings}
        predicted = 0.0 if dense is None else dense.seconds * (length / dense.seq_len) ** 2
        if 2 * predicted <= share:
            runs = {"dense": problem.dense(expands), **runs}
        least = time_in_turn(runs, device, share, on_run=shown.update)
        is_asked = length in seq_lens
        peaks = {name: peak_bytes(run, device) if is_asked else None for name, run in runs.items()}
        is_measured = "dense" in runs
        row = Measurement(length, None, None, least.get("dense", predicted), peaks.get("dense"), 1.0, is_measured)
        if is_measured:
            dense = row
        rows.append(row)
        for (size, count), name in zip(settings, (name for name in runs if name != "dense"), strict=True):
            recall = needle.recall(length, shape.head_dim, size, count)
            rows.append(Measurement(length, size, count, least[name], peaks[name], recall))
    return rows


# --- deciding -------------------------------------------------------------------------------------------------------


def _decide(
    shape: AttentionShape,
    device: str,
    seq_lens: tuple[int, ...],
    rows: Sequence[Measurement],
    needle: Needle,
    min_recall: float,
) -> Advice:
    longest = seq_lens[-1]
    dense, *blocks = (row for row in rows if row.seq_len == longest)
    # With as many blocks as there are a setting is dense attention, and no advice.
    sparse = [row for row in blocks if row.block_size is not None and row.block_size * (row.top_k or 0) < longest]
    faster = [row for row in sparse if row.seconds < dense.seconds]
    recommended: Measurement | None = None
    if enough := [row for row in faster if row.recall >= min_recall]:
        recommended = min(enough, key=lambda row: row.seconds)
    elif faster:
        most = max(row.recall for row in faster)
        recommended = min((row for row in faster if row.recall >= most - CLOSE), key=lambda row: row.seconds)
    looked_at = recommended or min(sparse, key=lambda row: row.seconds, default=None)
    crossover, is_exact = None, False
    if looked_at is not None:
        crossover, is_exact = _crossover(
            [row for row in rows if row.is_dense], [row for row in rows if row.setting == looked_at.setting]
        )
    reason = _reason(dense, sparse, recommended, min_recall, needle)
    code = _code(shape, recommended)
    return Advice(shape, device, seq_lens, tuple(rows), needle, recommended, crossover, is_exact, reason, code)


def _crossover(dense: Sequence[Measurement], block: Sequence[Measurement]) -> tuple[int | None, bool]:
    """Length from which ``block`` stays faster, between two lengths on a line of logarithms, and whether it is one."""
    ratios = [math.log(b.seconds / d.seconds) for d, b in zip(dense, block, strict=True)]
    if ratios[-1] >= 0:
        return None, False
    first = len(ratios) - 1
    while first > 0 and ratios[first - 1] < 0:
        first -= 1
    if first == 0:
        return block[0].seq_len, False
    low, high = math.log(block[first - 1].seq_len), math.log(block[first].seq_len)
    part = ratios[first - 1] / (ratios[first - 1] - ratios[first])
    return round(math.exp(low + (high - low) * part)), True


def _reason(
    dense: Measurement,
    sparse: Sequence[Measurement],
    recommended: Measurement | None,
    min_recall: float,
    needle: Needle,
) -> str:
    length = dense.seq_len
    if not sparse:
        return f"At {length} tokens every setting that was tried reads all blocks: dense attention does the same."
    if recommended is None:
        fastest = min(sparse, key=lambda row: row.seconds)
        return (
            f"At {length} tokens dense attention is faster ({show_seconds(dense.seconds)}) than the fastest setting "
            f"({show_seconds(fastest.seconds)}, block_size {fastest.block_size}, top_k {fastest.top_k})."
        )
    about = "" if dense.is_measured else "about "
    gain = (
        f"At {length} tokens it takes {show_seconds(recommended.seconds)} where dense attention takes "
        f"{about}{show_seconds(dense.seconds)}, {dense.seconds / recommended.seconds:.1f} times as long, and finds a "
        f"needle of {needle.num_tokens} tokens with a probability of {recommended.recall:.2f} by the routing law"
    )
    if recommended.recall >= min_recall:
        return f"{gain}: the fastest setting that reaches {min_recall:g}."
    return (
        f"{gain}. None that is faster than dense attention reaches {min_recall:g}; of those that come closest "
        "(within 0.05) this is the fastest. More blocks "
        "(top_ks), a larger head_dim or a convolution of the keys raise it."
    )


def _code(shape: AttentionShape, recommended: Measurement | None) -> str:
    if recommended is None:
        sharing = "" if shape.heads == shape.kv_heads else ", enable_gqa=True"
        return (
            "import torch.nn.functional as F\n"
            f"out = F.scaled_dot_product_attention(query, key, value, is_causal=True{sharing})"
        )
    options = f"block_size={recommended.block_size}, top_k={recommended.top_k}"
    if shape.model is not None:
        return (
            "import topgather as tg, transformers\n"
            f"tg.integrations.transformers.register({options})\n"
            f'model = transformers.AutoModelForCausalLM.from_pretrained(..., attn_implementation="moba")'
        )
    return (
        "import topgather as tg\n"
        f"# query [B, {shape.heads}, N, {shape.head_dim}], key and value [B, {shape.kv_heads}, N, {shape.head_dim}]\n"
        f"out = tg.moba_attention(query, key, value, {options})"
    )
