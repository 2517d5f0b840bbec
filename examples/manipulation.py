"""Find what was pasted into a photograph: a small SparseViT, with sparse and with global attention.

The photographs are those that scikit-image ships, nothing is downloaded. The script manipulates them itself, so that
it knows the truth: a blob of another photograph (a splice) or of the same one (a copy-move) is pasted over a part. Four
traces are planted, of the kinds that real manipulations leave, and stronger than careful ones do:

    noise        what is pasted and what it is pasted into have sensor noise, equally strong, added by the script
    resampling   the blob is then rotated and enlarged by bilinear interpolation, which smooths its noise
    JPEG         the blob was saved at a quality of 50 to 80 before, which smooths it more and leaves blocks of 8 x 8
    edges        the blob's rim is mixed with its surroundings over about a pixel

The whole is saved at a quality of 95 in the end. What is in the picture does not help: blobs lie anywhere. The model is
trained on crops of some photographs and tested on larger crops of others.

    sparse   tg.models.SparseViT(rates=((4, 1), (2, 1)), base_size=64, ...): groups keep their number of tokens, 4 or
             64 in the third stage and 4 or 16 in the fourth, in larger images as well
    global   tg.models.SparseViT(rates=((1, 1), (1, 1)), base_size=None, ...): each token attends to all of its stage

Parameters at the start, crops and their order, and the number of steps are the same.

    python examples/manipulation.py
    python examples/manipulation.py --steps 400

It prints a table, writes a picture, and exits with status 1 if a model did not get better at photographs that it never
saw.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import topgather as tg

TRAIN_SIZE, TEST_SIZE = 64, 192
BATCH = 8
NUM_TESTS = 8
"""Manipulated crops of each held-out photograph."""
SEED = 0

console = Console(highlight=False)

# ------------------------------------------------------------------------------------------------- photographs

TRAINING: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "camera": skimage.data.camera,
    "rocket": skimage.data.rocket,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "galaxies": skimage.data.hubble_deep_field,
    "tissue": skimage.data.immunohistochemistry,
    "retina": skimage.data.retina,
    "brick": skimage.data.brick,
    "grass": skimage.data.grass,
    "gravel": skimage.data.gravel,
    "moon": skimage.data.moon,
}
HELD_OUT: dict[str, Callable[[], np.ndarray]] = {
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "coins": skimage.data.coins,
}


def load(photographs: dict[str, Callable[[], np.ndarray]]) -> list[Tensor]:
    """Each photograph as ``[3, H, W]``, from 0 to 1; three equal channels where it has no colour."""
    loaded = [torch.from_numpy(np.array(read())).float() / 255 for read in photographs.values()]
    return [image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1) for image in loaded]


@dataclass(frozen=True)
class Examples:
    """Manipulated images ``[B, 3, H, W]`` and their masks ``[B, 1, H, W]``, 1 where something was pasted."""

    images: Tensor
    masks: Tensor


class Forger:
    """Makes examples of photographs; the same ones for the same seed."""

    def __init__(self, photographs: Sequence[Tensor], seed: int) -> None:
        self.photographs = photographs
        self.random = torch.Generator().manual_seed(seed)

    def examples(self, hosts: Sequence[int], size: int) -> Examples:
        """One example of each photograph in ``hosts``."""
        pairs = [self.manipulate(host, size) for host in hosts]
        return Examples(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]))

    def batch(self, num_examples: int, size: int) -> Examples:
        """Examples of photographs drawn at random."""
        return self.examples([self.whole(len(self.photographs)) for _ in range(num_examples)], size)

    def manipulate(self, host: int, size: int) -> tuple[Tensor, Tensor]:
        """One example of ``size`` pixels a side: a splice or a copy-move."""
        source = host if self.whole(2) else self.whole(len(self.photographs))
        noise = self.uniform(0.02, 0.05)
        image = self.photograph(self.photographs[host], size, noise)
        pasted = self.photograph(self.photographs[source], size, noise)
        pasted = save_as_jpeg(self.resample(pasted), quality=50 + self.whole(31))
        mask = self.blob(size)
        # The rim: a mask smoothed by a box of 3 x 3.
        soft = F.avg_pool2d(mask[None], 3, stride=1, padding=1)[0]
        return save_as_jpeg(image + soft * (pasted - image), quality=95), mask

    def photograph(self, whole: Tensor, size: int, noise: float) -> Tensor:
        """A crop, turned or mirrored, as a sensor of this noise would have it."""
        row, column = self.whole(whole.size(1) - size + 1), self.whole(whole.size(2) - size + 1)
        crop = whole[:, row : row + size, column : column + size].rot90(self.whole(4), dims=(1, 2))
        crop = crop.flip(2) if self.whole(2) else crop
        return (crop + noise * torch.randn(crop.shape, generator=self.random)).clamp(0, 1)

    def resample(self, image: Tensor) -> Tensor:
        """Rotate by up to 30 degrees and enlarge by a factor of 1 to 1.6."""
        angle, scale = self.uniform(-math.pi / 6, math.pi / 6), self.uniform(1, 1.6)
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        motion = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
        places = F.affine_grid(motion, [1, *image.shape], align_corners=False)
        return F.grid_sample(image[None], places, padding_mode="reflection", align_corners=False)[0]

    def blob(self, size: int) -> Tensor:
        """A region ``[1, size, size]`` around a point anywhere: its radius varies with the direction."""
        place = torch.arange(size).float()
        # Centres lie up to the edge and past it: were they always inside, to mark the middle would pay.
        dy, dx = (place - self.uniform(-0.1, 1.1) * size)[:, None], (place - self.uniform(-0.1, 1.1) * size)[None, :]
        direction = torch.atan2(dy, dx)
        radius = torch.full_like(direction, self.uniform(0.2, 0.35) * size)
        for waves in (2, 3):
            radius *= 1 + self.uniform(0, 0.25) * torch.cos(waves * direction + self.uniform(0, 2 * math.pi))
        return (dy.square() + dx.square() < radius.square()).float()[None]

    def whole(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.random))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.random))


def save_as_jpeg(image: Tensor, quality: int) -> Tensor:
    """``image [3, H, W]`` as it comes back from a JPEG file."""
    file = io.BytesIO()
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


# ------------------------------------------------------------------------------------------------------- model


def make_model(rates: Sequence[Sequence[int]], base_size: int | None) -> "tg.models.SparseViT":
    """A small SparseViT, the same at the start whatever its rates."""
    torch.manual_seed(SEED)
    return tg.models.SparseViT(
        depths=(1, 1, 2, 2),
        dims=(16, 32, 48, 64),
        head_dim=16,
        rates=rates,
        base_size=base_size,
        patch_sizes=(2, 2, 2, 2),
        mlp_ratio=2.0,
        fusion_dim=48,
        drop_path_rate=0.0,
        init_value=0.5,
    )


@dataclass(frozen=True)
class Scores:
    """Agreement with the truth, over the pixels of all test images."""

    f1: float
    iou: float


def scores_of(guesses: Tensor, masks: Tensor) -> Scores:
    both = float((guesses * masks).sum())
    either = float(guesses.sum() + masks.sum()) - both
    return Scores(2 * both / max(either + both, 1.0), both / max(either, 1.0))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The probability of each pixel to be pasted."""
    model.eval()
    probabilities = torch.cat([model(batch - 0.5).sigmoid() for batch in images.split(BATCH)])
    model.train()
    return probabilities


@dataclass
class Run:
    """One training: its model and what it measured."""

    name: str
    model: "tg.models.SparseViT"
    losses: list[float] = field(default_factory=list)
    seconds: float = math.nan
    before: Scores = field(default_factory=lambda: Scores(math.nan, math.nan))
    after: Scores = field(default_factory=lambda: Scores(math.nan, math.nan))
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))


def train(run: Run, photographs: Sequence[Tensor], tests: Examples, num_steps: int) -> None:
    """Train on crops, the same for every model, and test before and after."""
    run.before = scores_of((predict(run.model, tests.images) > 0.5).float(), tests.masks)
    forger = Forger(photographs, SEED + 1)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps + 1, pct_start=0.1)
    columns = [TextColumn(f"{run.name:<8}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        bar = progress.add_task(run.name, total=num_steps, loss=math.nan)
        seconds = 0.0
        for _ in range(num_steps):
            examples = forger.batch(BATCH, TRAIN_SIZE)
            began = time.perf_counter()
            logits = run.model(examples.images - 0.5)
            loss = F.binary_cross_entropy_with_logits(logits, examples.masks)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - began
            run.losses.append(loss.item())
            progress.update(bar, advance=1, loss=sum(run.losses[-20:]) / len(run.losses[-20:]))
    run.seconds = seconds
    run.probabilities = predict(run.model, tests.images)
    run.after = scores_of((run.probabilities > 0.5).float(), tests.masks)


# ----------------------------------------------------------------------------------------------------- results


def print_results(runs: list[Run], tests: Examples) -> None:
    table = Table("attention")
    for heading in ("F1 before", "F1 after", "IoU before", "IoU after", "loss", "MMACs", "seconds"):
        table.add_column(heading, justify="right")
    for name, guess in (("none: mark nothing", 0.0), ("none: mark all", 1.0)):
        trivial = scores_of(torch.full_like(tests.masks, guess), tests.masks)
        table.add_row(name, "", f"{trivial.f1:.3f}", "", f"{trivial.iou:.3f}")
    for run in runs:
        last = run.losses[-max(1, len(run.losses) // 10) :]
        table.add_row(
            run.name,
            f"{run.before.f1:.3f}",
            f"{run.after.f1:.3f}",
            f"{run.before.iou:.3f}",
            f"{run.after.iou:.3f}",
            f"{sum(last) / len(last):.3f}",
            f"{run.model.attention_macs(TEST_SIZE) / 1e6:.1f}",
            f"{run.seconds:.1f}",
        )
    console.print(table)
    console.print(
        f"F1 and IoU of pasted pixels at a probability of 0.5, over all pixels of {len(tests.masks)} images of "
        f"{TEST_SIZE} x {TEST_SIZE} pixels, made of {len(HELD_OUT)} photographs held out of the training on crops of "
        f"{TRAIN_SIZE} x {TRAIN_SIZE}. Loss: of the training's last tenth. MMACs: millions of multiplications of "
        "attention for a test image. Seconds: of training steps, without the making of crops."
    )


def draw(runs: list[Run], tests: Examples, path: Path) -> None:
    """Write the picture: image, truth and predictions side by side, the first two of each held-out photograph."""
    rows = [photograph * NUM_TESTS + index for photograph in range(len(HELD_OUT)) for index in range(2)]
    titles = ["image", "truth", *(f"{run.name} attention" for run in runs)]
    figure = Figure(figsize=(2 * len(titles), 2 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(titles))
    for line, row in enumerate(rows):
        pictures = [tests.images[row].permute(1, 2, 0), tests.masks[row, 0], *(r.probabilities[row, 0] for r in runs)]
        for axes, picture, title in zip(grid[line], pictures, titles, strict=True):
            axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            if line == 0:
                axes.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="steps of each training (default: 800)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/manipulation.png"),
        help="the picture (default: build/manipulation.png)",
    )
    # On one thread, so small a model loses little, and nothing to waiting where the machine has other things to do.
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    options = parser.parse_args()
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)

    photographs = load(TRAINING)
    held_out = load(HELD_OUT)
    hosts = [host for host in range(len(held_out)) for _ in range(NUM_TESTS)]
    tests = Forger(held_out, SEED).examples(hosts, TEST_SIZE)
    runs = [
        Run("sparse", make_model(((4, 1), (2, 1)), base_size=TRAIN_SIZE)),
        Run("global", make_model(((1, 1), (1, 1)), base_size=None)),
    ]
    num_parameters = sum(parameter.numel() for parameter in runs[0].model.parameters())
    console.print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {num_parameters:,} parameters")
    for run in runs:
        train(run, photographs, tests, options.steps)
    print_results(runs, tests)
    draw(runs, tests, options.output)
    console.print(f"Images, truth and predictions: {options.output}")

    all_pasted = scores_of(torch.ones_like(tests.masks), tests.masks)
    failed = [run.name for run in runs if run.after.f1 <= max(run.before.f1, all_pasted.f1)]
    if failed:
        console.print(f"No better than before, or than marking everything: {', '.join(failed)}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
