"""Advice as text and as a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._measure import show_bytes, show_seconds

if TYPE_CHECKING:
    from ._attention import Advice, Measurement
    from ._memory import MemoryAdvice, MemoryMeasurement

_Rows = list[tuple[bool, list[str]]]  # whether the row is the advised one, and its cells

_LINES = ("-", "--", "-.", ":")
_ATTENTION_COLUMNS = ("tokens", "attention", "keys a query", "time", "to dense", "memory", "needle found")
_MEMORY_COLUMNS = ("layer", "time", "a token", "memory", "parameters", "a token meets", "share")


# --- attention ------------------------------------------------------------------------------------------------------


def _attention_rows(advice: Advice) -> _Rows:
    rows: _Rows = []
    for length in advice.seq_lens:
        for row in advice.at(length):
            if row.is_dense:
                name, keys = "dense", length
            else:
                assert row.block_size is not None and row.top_k is not None
                keys = row.block_size * row.top_k
                if keys >= length:
                    continue
                name = f"block_size {row.block_size}, top_k {row.top_k}"
            seconds = f"{'' if row.is_measured else '~'}{show_seconds(row.seconds)}"
            cells = [f"{length}", name, f"{keys}", seconds, f"{advice.speedup(row):.2f}x", show_bytes(row.bytes)]
            rows.append((row is advice.recommended, [*cells, f"{row.recall:.2f}"]))
    return rows


def _attention_notes(advice: Advice) -> list[str]:
    notes = []
    if any(not row.is_measured for row in advice.measurements if row.seq_len in advice.seq_lens):
        notes.append("~: not measured, grown with the square of the length from a shorter one.")
    if advice.shape.num_layers > 1:
        notes.append(f"Times are of one layer; the model has {advice.shape.num_layers}.")
    notes.append(
        f"needle found: expected probability with which the last query chooses the block of a needle of "
        f"{advice.needle.num_tokens} tokens (docs/block-attention.md, the routing law). A trained model does better or "
        "worse: means are learnt."
    )
    return notes


def _crossover_text(advice: Advice) -> str:
    if advice.crossover is None:
        return "Dense attention is faster at every length that was measured."
    if advice.is_crossover_exact:
        return f"Below about {advice.crossover} tokens dense attention is faster than this setting."
    return f"This setting is faster than dense attention at every length measured, from {advice.crossover} tokens on."


def _headline(advice: Advice) -> str:
    if advice.recommended is None:
        return "Advised: dense attention."
    return f"Advised: block_size {advice.recommended.block_size}, top_k {advice.recommended.top_k}."


def _attention_title(advice: Advice) -> str:
    model = "" if advice.shape.model is None else f"{advice.shape.model}: "
    return f"{model}{advice.shape}, on {advice.device}"


def attention_text(advice: Advice) -> str:
    """Title, table, notes, advice and code."""
    return _text(
        _attention_title(advice),
        _ATTENTION_COLUMNS,
        _attention_rows(advice),
        _attention_notes(advice),
        [_headline(advice), advice.reason, _crossover_text(advice)],
        advice.code,
    )


def save_attention_html(advice: Advice, path: Path) -> None:
    """Curves of time by length and of recall against time, table and advice."""
    figure, (times, recalls) = _figure(2)
    settings = {row.setting: None for row in advice.measurements if row.setting is not None}
    _curve(times, advice.curve(None), "black", "dense")
    sizes = sorted({size for size, _ in settings})
    counts = sorted({count for _, count in settings})
    for size, count in settings:
        chosen = advice.recommended is not None and (size, count) == advice.recommended.setting
        color, line = f"C{sizes.index(size) % 10}", _LINES[counts.index(count) % len(_LINES)]
        label = f"block_size {size}, top_k {count}"
        _curve(times, advice.curve((size, count)), color, label, 3.0 if chosen else 1.2, line)
    times.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="time of a call")
    times.set_xscale("log", base=2)
    for row in advice.at(advice.seq_lens[-1]):
        if row.block_size is None or row.top_k is None or row.block_size * row.top_k >= row.seq_len:
            continue
        chosen = row is advice.recommended
        recalls.plot(
            row.seconds, row.recall, "*" if chosen else "o", color="C3" if chosen else "C0", ms=15 if chosen else 6
        )
        recalls.annotate(
            f"{row.block_size} x {row.top_k}",
            (row.seconds, row.recall),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    dense = advice.at(advice.seq_lens[-1])[0]
    recalls.axvline(dense.seconds, color="black", linestyle="--", label="dense")
    recalls.set(xscale="log", xlabel="seconds", ylabel="needle found (expected)", ylim=(-0.03, 1.08))
    recalls.set_title(f"{advice.seq_lens[-1]} tokens, block_size x top_k")
    recalls.legend(fontsize=8)
    times.legend(fontsize=7)
    notes, advised = _attention_notes(advice), [_headline(advice), advice.reason, _crossover_text(advice)]
    table = (_ATTENTION_COLUMNS, _attention_rows(advice))
    path.write_text(_page("Block attention", _attention_title(advice), figure, *table, notes, advised, advice.code))


def _curve(axes: Any, rows: Sequence[Measurement], color: str, label: str, width: float = 1.8, line: str = "-") -> None:
    measured = [row for row in rows if row.is_measured]
    axes.plot(
        [r.seq_len for r in measured],
        [r.seconds for r in measured],
        color=color,
        lw=width,
        ls=line,
        marker=".",
        label=label,
    )
    guessed = measured[-1:] + [row for row in rows if not row.is_measured]
    if len(guessed) > 1:
        axes.plot([r.seq_len for r in guessed], [r.seconds for r in guessed], color=color, lw=width, linestyle=":")


# --- memory layers --------------------------------------------------------------------------------------------------


def _memory_row(advice: MemoryAdvice, name: str, row: MemoryMeasurement) -> list[str]:
    a_token = show_seconds(row.seconds / advice.num_tokens)
    numbers = [f"{row.parameters:,}", f"{row.active_parameters:,}", f"{row.active_share:.2%}"]
    return [name, show_seconds(row.seconds), a_token, show_bytes(row.bytes), *numbers]


def _memory_rows(advice: MemoryAdvice) -> _Rows:
    rows: _Rows = [(False, _memory_row(advice, "feed-forward", advice.feed_forward))]
    for row in advice.measurements:
        rows.append((row is advice.recommended, _memory_row(advice, f"memory, top_k {row.top_k}", row)))
    return rows


def _memory_notes(advice: MemoryAdvice) -> list[str]:
    notes = [
        f"The table of {advice.rows} rows takes {show_bytes(advice.table_bytes)}, held once for all layers of a pool."
    ]
    if advice.train:
        notes.append(f"Adam's moments of it take {show_bytes(advice.optimizer_bytes)}; SGD or sparse optimizers less.")
    notes.append("memory: what a call adds, results and gradients included, parameters not.")
    return notes


def _memory_title(advice: MemoryAdvice) -> str:
    what = "forward and backward" if advice.train else "forward"
    return (
        f"{advice.rows} rows of {advice.width} channels, {advice.num_heads} heads, {advice.num_tokens} tokens, "
        f"{str(advice.dtype).removeprefix('torch.')}, {what}, on {advice.device}"
    )


def memory_text(advice: MemoryAdvice) -> str:
    """Title, table, notes, advice and code."""
    advised = [f"Advised: top_k {advice.recommended.top_k}.", advice.reason]
    return _text(
        _memory_title(advice), _MEMORY_COLUMNS, _memory_rows(advice), _memory_notes(advice), advised, advice.code
    )


def save_memory_html(advice: MemoryAdvice, path: Path) -> None:
    """Time by top_k beside the feed-forward layer's, table and advice."""
    figure, (axes,) = _figure(1)
    rows = advice.measurements
    axes.plot([row.top_k for row in rows], [row.seconds for row in rows], "o-", label="memory layer")
    axes.axhline(advice.feed_forward.seconds, color="black", linestyle="--", label="feed-forward, 4 x width")
    axes.set(xlabel="top_k", ylabel="seconds", ylim=(0, None), title=f"time of {advice.num_tokens} tokens")
    axes.legend(fontsize=8)
    table = (_MEMORY_COLUMNS, _memory_rows(advice))
    advised = [f"Advised: top_k {advice.recommended.top_k}.", advice.reason]
    page = _page("Memory layer", _memory_title(advice), figure, *table, _memory_notes(advice), advised, advice.code)
    path.write_text(page)


# --- both -----------------------------------------------------------------------------------------------------------


def _text(
    title: str, columns: Sequence[str], rows: _Rows, notes: Sequence[str], advised: Sequence[str], code: str
) -> str:
    lines = [["", *columns], *(["*" if is_advised else "", *cells] for is_advised, cells in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    # Names to the left, numbers to the right.
    is_name = [
        not any(cell[:1].isdigit() or cell[:1] in "~-" for cell in column) for column in zip(*lines[1:], strict=True)
    ]
    shown = []
    for line in lines:
        cells = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, is_name, strict=True))
        shown.append("  ".join(cells).rstrip())
    code = "\n".join(f"    {line}" for line in code.splitlines())
    return "\n".join([title, "", *shown, "", *notes, "", *advised, "", code])


def print_advice(advice: Advice | MemoryAdvice) -> None:
    """Print it: by rich, with the advised row in colour, where that is installed and the output a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(advice)
        return
    console = Console(soft_wrap=True)
    for line in str(advice).splitlines():
        style = "bold green" if line.startswith(("*", "Advised")) else "cyan" if line.startswith("    ") else ""
        console.print(Text(line, style=style))


def _figure(num_axes: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a page with curves needs the package matplotlib (pip install matplotlib): {error}"
        ) from error
    figure = Figure(figsize=(5.5 * num_axes, 4.2), layout="constrained")
    axes = [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
tr.advised { background: #e3f4e3; font-weight: 600 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
figure { margin: 1.5em 0; overflow-x: auto }
svg, img { max-width: 100%; height: auto }
div { overflow-x: auto }
.note { color: #666; font-size: 90% }
"""


def _page(
    heading: str,
    title: str,
    figure: Any,
    columns: Sequence[str],
    rows: _Rows,
    notes: Sequence[str],
    advised: Sequence[str],
    code: str,
) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    picture = base64.b64encode(buffer.getvalue()).decode()
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = ""
    for is_advised, cells in rows:
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr{' class=advised' if is_advised else ''}>{shown}</tr>\n"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(heading)}: advice</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(heading)}</h1><p>{html.escape(title)}</p>\n"
        + "".join(f"<p>{html.escape(text)}</p>\n" for text in advised)
        + f"<pre>{html.escape(code)}</pre>\n"
        f'<figure><img alt="curves of the numbers below" src="data:image/svg+xml;base64,{picture}"></figure>\n'
        f"<div><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
        + "".join(f'<p class="note">{html.escape(text)}</p>\n' for text in notes)
        + "</body></html>\n"
    )
