"""Draws assets/groups.png: which tokens of an image attend to each other, in a grid and in windows.

python docs/draw_groups.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import topgather as tg

ROWS, COLUMNS = 10, 14
STRIDE, WINDOW = (3, 4), (4, 5)


def main() -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    partitions = {
        f"grid_attention(stride={STRIDE})": tg.reference.grid_groups(ROWS, COLUMNS, STRIDE),
        f"window_attention(window_size={WINDOW})": tg.reference.window_groups(ROWS, COLUMNS, WINDOW),
    }
    for axes, (title, groups) in zip(figure.subplots(1, 2), partitions.items(), strict=True):
        number = torch.zeros(ROWS, COLUMNS)
        for group_idx, (rows, columns) in enumerate(groups):
            number[rows[:, None], columns[None, :]] = group_idx
        axes.imshow(number, cmap="tab20c", alpha=0.45)
        for rows, columns in groups[:1]:
            axes.scatter(*torch.meshgrid(columns, rows, indexing="xy"), color="#d1495b", s=55, label="one group")
        axes.set(title=title, xticks=[], yticks=[])
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0), frameon=False)
    figure.suptitle(
        f"{ROWS} x {COLUMNS} tokens; equal colours attend to each other; sizes need not divide", fontsize=10
    )
    figure.savefig(Path(__file__).parent / "assets" / "groups.png", dpi=120)


if __name__ == "__main__":
    main()
