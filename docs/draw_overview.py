"""Draws assets/overview.png: how block attention chooses blocks, and what a call takes as sequences grow.

    python docs/draw_overview.py
    python docs/draw_overview.py --results bench/results/<device> --output build/overview.png

The choice is that of ``tg.moba_route`` on a small random problem, the scores are products of its query with the mean
keys, and the times are those of a committed ``moba.json``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import topgather as tg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "amd-epyc-avx512-2-threads"

NUM_TOKENS, BLOCK_SIZE, TOP_K, HEAD_DIM = 64, 8, 3, 16
QUERY_IDX = 52
"""The query whose scores are shown."""

DENSE, CHOSEN, OWN, UNREAD = "#8a8f98", "#d1495b", "#2e4057", "#e8e9ec"
SERIES = {
    "dense": ("torch, dense", DENSE),
    "topgather 128": ("topgather, blocks of 128", CHOSEN),
    "topgather 64": ("topgather, blocks of 64", "#e0a458"),
}


def draw_choice(scores_axes: Axes, mask_axes: Axes) -> None:
    """One query's scores, block by block, and below them the keys that every query reads."""
    torch.manual_seed(2)
    query, key = torch.randn(2, 1, 1, NUM_TOKENS, HEAD_DIM)
    chosen = tg.moba_route(query, key, block_size=BLOCK_SIZE, top_k=TOP_K).block_indices[0, 0]
    scores = tg.block_centroids(key, block_size=BLOCK_SIZE)[0, 0] @ query[0, 0, QUERY_IDX]

    token_idx = torch.arange(NUM_TOKENS)
    block_idx = token_idx // BLOCK_SIZE
    is_chosen = (chosen[:, :, None] == block_idx).any(dim=1)
    is_own = block_idx[:, None] == block_idx
    kind = torch.where(is_chosen, torch.where(is_own, 2.0, 1.0), 0.0)
    kind[token_idx[:, None] < token_idx] = torch.nan

    own_block = QUERY_IDX // BLOCK_SIZE
    colors = [OWN if j == own_block else CHOSEN if j in chosen[QUERY_IDX] else DENSE for j in range(own_block + 1)]
    centers = BLOCK_SIZE * (torch.arange(own_block + 1) + 0.5) - 0.5
    scores_axes.bar(centers, scores[: own_block + 1], width=BLOCK_SIZE - 1.5, color=colors)
    scores_axes.axhline(0, color="black", linewidth=0.6)
    scores_axes.set(ylabel="score", yticks=[], xlim=(-0.5, NUM_TOKENS - 0.5))
    scores_axes.set_title(f"1. Score: one query times the mean key of each block; keep the top {TOP_K}", fontsize=10)
    scores_axes.tick_params(axis="x", length=0, labelbottom=False)

    mask_axes.imshow(kind, cmap=ListedColormap([UNREAD, CHOSEN, OWN]), vmin=0, vmax=2, aspect="auto")
    mask_axes.annotate(
        "the query above",
        (QUERY_IDX + 0.5, QUERY_IDX),
        (NUM_TOKENS - 1, QUERY_IDX - 8),
        arrowprops={"arrowstyle": "->"},
        ha="right",
        fontsize=9,
    )
    edges = torch.arange(0, NUM_TOKENS + 1, BLOCK_SIZE) - 0.5
    mask_axes.set_xticks(edges, [str(j * BLOCK_SIZE) for j in range(len(edges))], fontsize=8)
    mask_axes.set_yticks([])
    mask_axes.grid(axis="x", color="white", linewidth=1)
    mask_axes.set(xlabel="keys", ylabel="queries")
    mask_axes.set_title("2. Attend: dense attention to the keys of these blocks alone", fontsize=10)
    for color, name in ((OWN, "own block, always read"), (CHOSEN, "chosen by score"), (UNREAD, "never read")):
        mask_axes.scatter([], [], marker="s", s=45, color=color, label=name)
    mask_axes.legend(loc="upper right", frameon=False, fontsize=9)


def draw_times(axes: Axes, results: dict[str, Any]) -> None:
    """Time of a forward by sequence length, and how many times longer dense attention takes."""
    times = {
        row["num_tokens"]: {name: timing["min_seconds"] for name, timing in row["times"].items()}
        for row in results["times"]
        if (row["dtype"], row["direction"]) == ("float32", "forward")
    }
    for name, (label, color) in SERIES.items():
        lengths = [length for length in sorted(times) if name in times[length]]
        axes.loglog(lengths, [times[length][name] for length in lengths], "o-", color=color, label=label, markersize=4)
    for length, seconds in times.items():
        if "dense" in seconds:
            ratio = seconds["dense"] / seconds["topgather 128"]
            axes.annotate(
                f"{ratio:.0f}x", (length, seconds["dense"]), (-6, 4), textcoords="offset points", ha="right", fontsize=9
            )
    axes.set_xticks(sorted(times), [f"{length // 1024}K" for length in sorted(times)])
    axes.minorticks_off()
    axes.set_yticks([0.01, 0.1, 1, 10], ["10 ms", "100 ms", "1 s", "10 s"])
    axes.grid(True, which="major", alpha=0.3)
    axes.margins(x=0.09)
    axes.set_ylim(top=2 * max(max(seconds.values()) for seconds in times.values()))
    axes.legend(frameon=False, loc="lower right", fontsize=9, title="numbers: dense / blocks of 128")
    run, shape = results["run"], results["shape"]
    axes.set(xlabel="tokens of the sequence")
    axes.set_title(
        f"Forward, float32, {shape['num_heads']} heads of {shape['head_dim']}, top {shape['top_k']} blocks\n"
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}, commit {run['commit'][:7]}, {run['date']}",
        fontsize=9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the moba.json to draw")
    default = ROOT / "docs" / "assets" / "overview.png"
    parser.add_argument("--output", type=Path, default=default, help="default: docs/assets/overview.png")
    options = parser.parse_args()
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplot_mosaic([["scores", "times"], ["mask", "times"]], height_ratios=[1, 2.6])
    axes["scores"].sharex(axes["mask"])
    draw_choice(axes["scores"], axes["mask"])
    draw_times(axes["times"], json.loads((options.results / "moba.json").read_text()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
