"""How block size and key convolution decide whether the right block is found: the law, measured, and models trained.

First, the law of arXiv 2511.11571 with topgather's router. A query looks for one block of ``B`` keys, in
which ``m`` keys are planted whose mean dot product with it is larger than that of all other keys, the noise. Where dot
products are independent with variance ``1 / d``, the block scores below one given block of noise with probability

    Phi(-SNR)    SNR = delta_mu_eff * sqrt(d / (2 * B))    delta_mu_eff = delta_mu + (m - 1) * (mu_cluster - mu_noise)

``tg.moba_route`` chooses among keys drawn so, and the share of wrong choices is held against the law: pairs of blocks;
the best ``top_k`` of many blocks, where the prediction is an order statistic; and keys that break the assumptions.

Then, models. One layer of block attention reads a context of 2048 tokens, facts like ``a b value``, and is asked for
the values of facts it is given the names of. It is trained with blocks of 512, 128 and 32 keys, choosing 512 keys each
time, and with no key convolution or one over 3 or 5 tokens.

    python examples/routing_snr.py
    python examples/routing_snr.py --steps 300 --seeds 3

It prints tables, writes a picture, and exits with status 1 if the router did not follow the law or no model learnt.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import topgather as tg

BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
HEAD_DIMS = (32, 64, 128, 256)
NUMS_PLANTED = (1, 2, 4)
MU_SIGNAL, MU_CLUSTER = 0.5, 0.3  # means of the dot products of the first planted key and of the others; noise has 0
PLANTINGS = {
    "model": "pairs, as the law assumes",
    "unit": "unit norm, 4 planted at fixed angles",
    "shared": "4 planted keys share their noise",
}
FALSE_ALARM = 0.001
"""How often a router that follows the law would be said not to, over all points together."""

console = Console(highlight=False)

# ----------------------------------------------------------------------------------------------------- the law


@dataclass
class Point:
    """One setting of the statistical model, the failures that the router made and those that were predicted."""

    block_size: int
    head_dim: int
    num_planted: int = 1
    num_blocks: int = 2
    top_k: int = 1
    planting: str = "model"
    """``model``: as the law assumes. ``unit``: all keys of norm 1, planted ones at a fixed angle to the query.
    ``shared``: the planted keys have their noise in common."""
    num_trials: int = 0
    num_failures: int = 0

    @property
    def snr(self) -> float:
        """What the law says, from the means and from the sizes alone."""
        return delta_mu_eff(self.num_planted) * math.sqrt(self.head_dim / (2 * self.block_size))

    @property
    def planted_variance(self) -> int:
        """Variance of the sum of the planted keys' dot products, times d. The law takes it to be m."""
        return {"model": self.num_planted, "unit": 0, "shared": self.num_planted**2}[self.planting]

    @property
    def predicted(self) -> float:
        """Probability of failure.

        Both scores have the variance ``1 / (d B)`` in the law. Of a pair, this is ``Phi(-SNR)``; where the planted keys
        vary otherwise, the difference of the scores has the variance ``(2 B - m + V) / (d B^2)`` instead.
        """
        if self.num_blocks > 2:
            return miss_probability(math.sqrt(2) * self.snr, self.num_blocks - 1, self.top_k)
        spread = (2 * self.block_size - self.num_planted + self.planted_variance) / (2 * self.block_size)
        return normal_tail(self.snr / math.sqrt(spread))

    @property
    def measured(self) -> float:
        return self.num_failures / self.num_trials

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.predicted * (1 - self.predicted) / self.num_trials)

    @property
    def z(self) -> float:
        """Distance of measurement and prediction, in standard errors."""
        return (self.measured - self.predicted) / self.standard_error


def delta_mu_eff(num_planted: int) -> float:
    return MU_SIGNAL + (num_planted - 1) * MU_CLUSTER


def normal_tail(x: float) -> float:
    """``Phi(-x)``."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def binomial_pmf(num_trials: int, probability: Tensor) -> Tensor:
    """Probabilities of 0 to ``num_trials`` successes: ``[...]`` to ``[..., num_trials + 1]``, float64."""
    probability = probability.double()[..., None].clamp(1e-300, 1 - 1e-16)
    count = torch.arange(num_trials + 1, dtype=torch.float64)
    ways = math.lgamma(num_trials + 1) - torch.lgamma(count + 1) - torch.lgamma(num_trials - count + 1)
    return (ways + count * probability.log() + (num_trials - count) * torch.log1p(-probability)).exp()


def miss_probability(shift: float, num_noise: int, top_k: int) -> float:
    """How often the signal block is not among the ``top_k`` best of itself and ``num_noise`` blocks of noise.

    Scores in units of their standard deviation: those of noise ``N(0, 1)``, the signal's ``N(shift, 1)``, which is
    ``sqrt(2) * SNR``. The pairs are not independent, for they share the signal's score. Given that score x, each
    block of noise beats it with probability ``Phi(-x)``, independently, so that at least top_k do has the probability
    of a binomial tail, which is integrated over x.
    """
    x = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    is_chosen = binomial_pmf(num_noise, torch.special.ndtr(-(x + shift)))[:, :top_k].sum(1)
    return float(torch.trapezoid(density * (1 - is_chosen), x))


def p_value(point: Point) -> float:
    """How often the prediction gives a count as far out, on either side: twice the smaller exact binomial tail."""
    pmf = binomial_pmf(point.num_trials, torch.tensor(point.predicted, dtype=torch.float64))
    at_most, at_least = pmf[: point.num_failures + 1].sum(), pmf[point.num_failures :].sum()
    return min(1.0, 2 * float(torch.minimum(at_most, at_least)))


def draw(point: Point, num_sets: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[num_sets, 1, R, d]``, keys ``[num_sets, 1, num_blocks * B, d]`` and each query's own block ``[R]``.

    The R queries of a set of keys are orthogonal and have planted keys of their own. Gaussian noise is independent
    along orthogonal directions, and what is planted along one query is nothing to the others: R independent trials for
    the price of one. The other plantings take one query for a set.
    """
    size, dim, num_planted = point.block_size, point.head_dim, point.num_planted
    per_block = size // num_planted
    num_queries = min(dim, point.num_blocks * per_block) if point.planting == "model" else 1
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    query = basis[:num_queries].contiguous()
    noise = torch.randn(num_sets, point.num_blocks * size, dim, generator=generator)
    key = F.normalize(noise, dim=-1) if point.planting == "unit" else noise.mul_(dim**-0.5)
    own_block = torch.arange(num_queries) % point.num_blocks
    first = own_block * size + torch.arange(num_queries) // point.num_blocks * num_planted
    common = key[:, first].clone()
    for i in range(num_planted):
        mu, planted = MU_SIGNAL if i == 0 else MU_CLUSTER, first + i
        if point.planting == "unit":
            sideways = key[:, planted] - (key[:, planted] @ query.T) * query
            key[:, planted] = mu * query + math.sqrt(1 - mu**2) * F.normalize(sideways, dim=-1)
        elif point.planting == "shared":
            key[:, planted] = mu * query + common
        else:
            key[:, planted] += mu * query
    return query.expand(num_sets, 1, -1, -1), key[:, None], own_block


def measure(point: Point, num_trials: int, seed: int) -> None:
    """Let the router choose, at least ``num_trials`` times, and count how often the query's block was not chosen."""
    generator = torch.Generator().manual_seed(seed)
    floats_per_set = point.num_blocks * point.block_size * point.head_dim
    while point.num_trials < num_trials:
        # A few megabytes of keys at a time.
        query, key, own_block = draw(point, max(1, 2**21 // floats_per_set), generator)
        chosen = tg.moba_route(query, key, point.block_size, point.top_k, is_causal=False).block_indices
        is_chosen = (chosen == own_block[:, None]).any(dim=-1)
        point.num_trials += is_chosen.numel()
        point.num_failures += int((~is_chosen).sum())


def law_points() -> list[Point]:
    pairs = [Point(b, d, m) for m in NUMS_PLANTED for d in HEAD_DIMS for b in BLOCK_SIZES]
    best = [Point(b, 64, m, num_blocks=32, top_k=k) for m in (1, 4) for k in (1, 4, 8) for b in BLOCK_SIZES]
    others = [Point(b, 64, 4, planting=planting) for planting in ("unit", "shared") for b in BLOCK_SIZES]
    return pairs + best + others


def measure_law(num_trials: int) -> list[Point]:
    points = law_points()
    columns = [TextColumn(f"{'the law':<22}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        for seed, point in enumerate(progress.track(points)):
            # One trial for each set of keys is dear.
            measure(point, num_trials if point.planting == "model" else num_trials // 4, seed)
    return points


def groups_of(points: list[Point]) -> dict[str, list[Point]]:
    groups = {name: [p for p in points if p.num_blocks == 2 and p.planting == kind] for kind, name in PLANTINGS.items()}
    return groups | {"top 1, 4, 8 of 32 blocks": [p for p in points if p.num_blocks > 2]}


def print_law(points: list[Point]) -> bool:
    """Print how well prediction and measurement agree; returns whether they do, within sampling error."""
    groups = groups_of(points)
    table = Table("d", "m", title="Share of choices that were wrong, and Phi(-SNR)", title_justify="left")
    for size in BLOCK_SIZES:
        table.add_column(f"B = {size}", justify="right")
    pairs = iter(groups[PLANTINGS["model"]])
    for num_planted in NUMS_PLANTED:
        for dim in HEAD_DIMS:
            cells = [f"{p.measured:.4f} [dim]{p.predicted:.4f}[/dim]" for _, p in zip(BLOCK_SIZES, pairs, strict=False)]
            table.add_row(str(dim), str(num_planted), *cells, end_section=dim == HEAD_DIMS[-1])
    console.print(table)

    table = Table("keys and choice", title="Beside the law's assumptions: d = 64, m = 4", title_justify="left")
    for size in BLOCK_SIZES:
        table.add_column(f"B = {size}", justify="right")
    table.add_row("Phi(-SNR)", *(f"{normal_tail(Point(size, 64, 4).snr):.4f}" for size in BLOCK_SIZES))
    rest = [p for p in points if p.num_planted == 4 and (p.num_blocks > 2 or p.planting != "model")]
    for first in range(0, len(rest), len(BLOCK_SIZES)):
        row = rest[first : first + len(BLOCK_SIZES)]
        name = f"top {row[0].top_k} of 32 blocks" if row[0].num_blocks > 2 else PLANTINGS[row[0].planting]
        table.add_row(name, *(f"{p.measured:.4f} [dim]{p.predicted:.4f}[/dim]" for p in row))
    console.print(table)

    table = Table("keys and choice", title="Agreement", title_justify="left")
    for heading in ("points", "trials each", "mean z²", "min p", "mean z² of plain Phi(-SNR)"):
        table.add_column(heading, justify="right")
    is_law = True
    for name, group in groups.items():
        # Where hardly a failure is expected z is far from normal; the exact p-values see those points too.
        spoken = [p for p in group if p.predicted * p.num_trials > 20]
        min_p = min(map(p_value, group))
        plain = [(p.measured - normal_tail(p.snr)) / p.standard_error for p in spoken]
        table.add_row(
            name,
            str(len(group)),
            f"{min(p.num_trials for p in group):,}",
            f"{mean(p.z**2 for p in spoken):.2f}",
            f"{min_p:.4f}",
            f"{mean(z**2 for z in plain):,.2f}",
        )
        is_law &= min_p > FALSE_ALARM / len(points) and has_usual_spread(spoken)
    console.print(table)
    console.print(
        "Pairs of blocks follow Phi(-SNR). It is not the probability of missing the top k of many blocks: that is the "
        "order statistic of miss_probability. Planted keys at fixed angles vary less than the law takes them to and "
        "those with common noise vary more; with the variance put right, (2B - m + V) / (dB²), they follow it too."
    )
    return bool(is_law)


def has_usual_spread(points: list[Point]) -> bool:
    """Whether the sum of z² is one that a right prediction gives, but for one case in ``1 / FALSE_ALARM``."""
    total = torch.tensor([sum(p.z**2 for p in points) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(torch.tensor([len(points) / 2], dtype=torch.float64), total)) > FALSE_ALARM


# -------------------------------------------------------------------------------------------------- the models

CONTEXT = 2048
KEYS_READ = 512
NUM_NAMES, NUM_VALUES = 4096, 32  # names that facts may have: single tokens, or pairs of 64 and 64
NUM_QUESTIONS, BATCH = 64, 8
DIM = 64
TRAINED_SIZES = (512, 128, 32)
KERNEL_SIZES = (0, 3, 5)


def draw_facts(cue: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contexts of facts, and questions about some of them.

    A fact is a name, of ``cue`` tokens, and a value, a token drawn at random. No name comes twice in a context, but
    with a cue of 2 each half of it is in ten other names. There is no other noise than the other facts.

    Returns:
        context int64 ``[BATCH, CONTEXT]``, names asked for ``[BATCH, NUM_QUESTIONS, cue]``, answers and positions of
        the values in the context ``[BATCH, NUM_QUESTIONS]``.
    """
    num_facts = CONTEXT // (cue + 1)
    number = torch.rand(BATCH, NUM_NAMES, generator=generator).argsort(dim=1)[:, :num_facts]
    name = number[..., None] if cue == 1 else torch.stack([number // 64, 64 + number % 64], dim=2)
    value = torch.randint(NUM_VALUES, (BATCH, num_facts), generator=generator)
    facts = torch.cat([name, NUM_NAMES + value[..., None]], dim=2).flatten(1)
    context = F.pad(facts, (0, CONTEXT - facts.shape[1]), value=NUM_NAMES + NUM_VALUES)
    asked = torch.rand(BATCH, num_facts, generator=generator).argsort(dim=1)[:, :NUM_QUESTIONS]
    names = name.gather(1, asked[..., None].expand(-1, -1, cue))
    return context, names, value.gather(1, asked), asked * (cue + 1) + cue


class FactReader(nn.Module):
    """One layer of block attention: a context and names ``[B, Q, cue]`` to logits ``[B, Q, NUM_VALUES]``.

    A token is its embedding and that of the token before, side by side, so that the key of a value knows the last token
    of its name. A question sees the context alone: whatever the block size, it reads ``KEYS_READ`` of its keys.

    The weights are the same for all block and kernel sizes at the start.
    """

    def __init__(self, block_size: int, kernel_size: int) -> None:
        super().__init__()
        self.block_size, self.top_k = block_size, KEYS_READ // block_size
        self.embedding = nn.Embedding(NUM_NAMES + NUM_VALUES + 1, DIM)
        self.query_proj = nn.Linear(2 * DIM, DIM, bias=False)
        self.key_proj = nn.Linear(2 * DIM, DIM, bias=False)
        self.value_proj = nn.Linear(2 * DIM, DIM, bias=False)
        self.logits = nn.Linear(DIM, NUM_VALUES, bias=False)
        # Zero is no convolution, and the gradient at zero is not zero.
        self.key_conv = nn.Parameter(torch.zeros(1, DIM, kernel_size)) if kernel_size else None
        # So short a training needs a start from which routing learns at once: a query finds the keys whose tokens
        # follow its own last token.
        with torch.no_grad():
            self.key_proj.weight[:, DIM:] = self.query_proj.weight[:, :DIM]

    def query_and_key(self, context: Tensor, names: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, 1, Q, DIM]`` and ``[B, 1, CONTEXT, DIM]``, and the tokens' channels ``[B, CONTEXT, 2 * DIM]``."""
        tokens = self.embedding(context)
        x = torch.cat([tokens, F.pad(tokens, (0, 0, 1, 0))[:, :-1]], dim=2)
        asked = self.embedding(names)
        before = asked[:, :, -2] if names.shape[2] > 1 else torch.zeros_like(asked[:, :, -1])
        query = self.query_proj(torch.cat([asked[:, :, -1], before], dim=2))[:, None]
        key = self.key_proj(x)[:, None]
        if self.key_conv is not None:
            key = tg.key_conv(key, self.key_conv)
        return query, key, x

    def forward(self, context: Tensor, names: Tensor) -> Tensor:
        query, key, x = self.query_and_key(context, names)
        value = self.value_proj(x)[:, None]
        out = tg.moba_attention(query, key, value, self.block_size, self.top_k, is_causal=False, scale=1.0)
        return self.logits(out[:, 0])


@dataclass
class Run:
    """One training and what it came to, on contexts that it was not trained on."""

    cue: int
    block_size: int
    kernel_size: int
    seed: int
    losses: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    found: float = math.nan
    """Share of questions whose fact's block was among those chosen."""
    snr: float = math.nan
    """Of the block scores of the trained model."""

    @property
    def found_by_law(self) -> float:
        """What ``found`` would be if scores of blocks were normal and independent, with the measured SNR."""
        return 1 - miss_probability(
            math.sqrt(2) * self.snr, CONTEXT // self.block_size - 1, KEYS_READ // self.block_size
        )


def rate(step: int, num_steps: int) -> float:
    """Learning rate relative to its peak: a short rise, then a straight line to zero."""
    return min((step + 1) / (0.05 * num_steps), 1 - step / num_steps, 1.0)


def train(run: Run, num_steps: int) -> None:
    torch.manual_seed(run.seed)
    model = FactReader(run.block_size, run.kernel_size)
    kernels = [p for name, p in model.named_parameters() if name == "key_conv"]
    others = [p for name, p in model.named_parameters() if name != "key_conv"]
    groups = [{"params": others, "lr": 5e-3}, {"params": kernels, "lr": 3e-2}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, num_steps))
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(num_steps):
        context, names, answers, _ = draw_facts(run.cue, generator)
        loss = F.cross_entropy(model(context, names).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
    with torch.no_grad():
        evaluate(run, model, torch.Generator().manual_seed(2**20 + run.seed))


def evaluate(run: Run, model: FactReader, generator: torch.Generator, num_batches: int = 8) -> None:
    right, found, snr = [], [], []
    for _ in range(num_batches):
        context, names, answers, positions = draw_facts(run.cue, generator)
        right.append((model(context, names).argmax(dim=2) == answers).float().mean().item())
        query, key, _ = model.query_and_key(context, names)
        block = positions // run.block_size
        chosen = tg.moba_route(query, key, run.block_size, model.top_k, is_causal=False).block_indices[:, 0]
        found.append((chosen == block[..., None]).any(dim=2).float().mean().item())
        scores = (query @ tg.block_centroids(key, run.block_size).transpose(2, 3))[:, 0]  # [B, Q, blocks]
        is_signal = F.one_hot(block, scores.shape[2]).bool()
        noise = scores[~is_signal].view(*block.shape, -1)
        gap = scores[is_signal].view(block.shape) - noise.mean(dim=2)
        snr.append((gap.mean() / (2 * noise.var(dim=2).mean()).sqrt()).item())
    run.accuracy, run.found, run.snr = mean(right), mean(found), mean(snr)


def train_all(num_steps: int, num_seeds: int) -> list[Run]:
    runs = [
        Run(cue, size, kernel, seed)
        for seed in range(num_seeds)
        for cue in (1, 2)
        for kernel in KERNEL_SIZES
        for size in TRAINED_SIZES
    ]
    columns = [TextColumn("{task.description:<22}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("accuracy {task.fields[accuracy]:.3f}"), console=console) as progress:
        bar = progress.add_task("", total=len(runs), accuracy=math.nan)
        for run in runs:
            progress.update(bar, description=f"cue {run.cue}, B {run.block_size}, kconv{run.kernel_size}")
            train(run, num_steps)
            progress.update(bar, advance=1, accuracy=run.accuracy)
    return runs


def seeds_of(runs: list[Run], cue: int, kernel_size: int, block_size: int) -> list[Run]:
    return [r for r in runs if (r.cue, r.kernel_size, r.block_size) == (cue, kernel_size, block_size)]


def settings() -> Iterator[tuple[int, int, int]]:
    return ((cue, kernel, size) for cue in (1, 2) for kernel in KERNEL_SIZES for size in TRAINED_SIZES)


def print_runs(runs: list[Run]) -> None:
    table = Table("name", "kernel", "B", title="Facts read out of 2048 tokens", title_justify="left")
    for heading in ("top k", "accuracy", "by seed", "block found", "SNR", "found, by the law"):
        table.add_column(heading, justify="right")
    for cue, kernel, size in settings():
        seeds = seeds_of(runs, cue, kernel, size)
        table.add_row(
            f"{cue} token{'s' if cue > 1 else ''}",
            f"kconv{kernel}",
            str(size),
            str(KEYS_READ // size),
            f"{mean(r.accuracy for r in seeds):.1%}",
            " ".join(f"{r.accuracy:.3f}" for r in seeds),
            f"{mean(r.found for r in seeds):.1%}",
            f"{mean(r.snr for r in seeds):.2f}",
            f"{mean(r.found_by_law for r in seeds):.1%}",
            end_section=size == TRAINED_SIZES[-1],
        )
    console.print(table)
    console.print(
        f"Guessing is right in {1 / NUM_VALUES:.1%}, blocks chosen blindly hold the fact in {KEYS_READ / CONTEXT:.0%}. "
        "SNR: of the trained model's block scores; by the law: what miss_probability makes of it."
    )
    for cue in (1, 2):
        for claim, pairs in (
            ("blocks of 32 better than of 512", [((k, 512), (k, 32)) for k in KERNEL_SIZES]),
            ("kconv3 better than kconv0", [((0, b), (3, b)) for b in TRAINED_SIZES]),
            ("kconv5 better than kconv3", [((3, b), (5, b)) for b in TRAINED_SIZES]),
        ):
            found = [
                (b.accuracy - a.accuracy, b.found - a.found)
                for old, new in pairs
                for a, b in zip(seeds_of(runs, cue, *old), seeds_of(runs, cue, *new), strict=True)
            ]
            # A margin of 0.03 is more than sampling error: an accuracy is a share of 4,096 questions.
            shown = sum(accuracy > 0.03 for accuracy, _ in found)
            console.print(
                f"Names of {cue}: {claim} by over 3 points in {shown} of {len(found)} comparisons; on average "
                f"accuracy {100 * mean(a for a, _ in found):+.1f}, "
                f"block found {100 * mean(f for _, f in found):+.1f} points."
            )


# ---------------------------------------------------------------------------------------------------- picture


def draw_pairs(axes: Axes, points: list[Point]) -> None:
    groups = groups_of(points)
    snr = torch.linspace(0, 4.2, 200).tolist()
    axes.plot(snr, [normal_tail(x) for x in snr], color="#2e4057", linewidth=1, label="Phi(-SNR)")
    for num_planted, color, marker in zip(NUMS_PLANTED, ("#d1495b", "#edae49", "#00798c"), "osD", strict=True):
        chosen = [p for p in groups[PLANTINGS["model"]] if p.num_planted == num_planted and p.num_failures]
        bars(axes, chosen, color, marker, f"m = {num_planted}")
    for planting, marker in (("unit", "v"), ("shared", "^")):
        name = PLANTINGS[planting]
        bars(axes, groups[name], "#7d8590", marker, name, filled=False)
    axes.set(
        xlabel="SNR", ylabel="scores below a block of noise", yscale="log", ylim=(2e-4, 0.7), title="Pairs of blocks"
    )


def bars(axes: Axes, points: list[Point], color: str, marker: str, label: str, filled: bool = True) -> None:
    axes.errorbar(
        [p.snr for p in points],
        [p.measured for p in points],
        [1.96 * math.sqrt(p.measured * (1 - p.measured) / p.num_trials) for p in points],
        fmt=marker,
        color=color,
        markersize=4,
        linewidth=1,
        label=label,
        markerfacecolor=color if filled else "none",
    )


def draw_best(axes: Axes, points: list[Point]) -> None:
    for top_k, color in ((1, "#d1495b"), (4, "#edae49"), (8, "#00798c")):
        snr = torch.linspace(0, 3, 60).tolist()
        axes.plot(snr, [miss_probability(math.sqrt(2) * x, 31, top_k) for x in snr], color=color, linewidth=1)
        chosen = [p for p in points if p.num_blocks > 2 and p.top_k == top_k and p.num_failures]
        bars(axes, chosen, color, "o", f"top {top_k}")
    axes.set(xlabel="SNR", ylabel="not chosen", yscale="log", ylim=(2e-4, 1.1), title="Best of 32 blocks")


def draw_runs(axes: Axes, runs: list[Run]) -> None:
    for kernel, color in zip(KERNEL_SIZES, ("#b4bac4", "#d1495b", "#2e4057"), strict=True):
        for cue, style in ((1, "--"), (2, "-")):
            seeds = [seeds_of(runs, cue, kernel, size) for size in TRAINED_SIZES]
            middle = [mean(r.accuracy for r in group) for group in seeds]
            axes.plot(TRAINED_SIZES, middle, style, color=color, label=f"kconv{kernel}, names of {cue}")
            for size, group in zip(TRAINED_SIZES, seeds, strict=True):
                axes.plot([size] * len(group), [r.accuracy for r in group], ".", color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TRAINED_SIZES, [str(size) for size in TRAINED_SIZES])
    axes.set(
        xlabel="block size, 512 keys read each time", ylabel="answers right", ylim=(0, None), title="Trained models"
    )
    axes.invert_xaxis()


def draw_picture(points: list[Point], runs: list[Run], path: Path) -> None:
    """Write the picture: failures against the law, of pairs and of many blocks, and what the models learnt."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    pairs, best, trained = figure.subplots(1, 3)
    draw_pairs(pairs, points)
    draw_best(best, points)
    draw_runs(trained, runs)
    for axes in (pairs, best, trained):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16000, help="choices at each point of the law (default: 16000)")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each model (default: 150)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (default: 2)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/routing_snr.png"), help="default: build/routing_snr.png"
    )
    options = parser.parse_args()
    for name, minimum in (("trials", 400), ("steps", 1), ("seeds", 1)):
        if getattr(options, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {getattr(options, name)}")

    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    began = time.perf_counter()
    points = measure_law(options.trials)
    is_law = print_law(points)
    runs = train_all(options.steps, options.seeds)
    print_runs(runs)
    draw_picture(points, runs, options.output)
    console.print(f"Picture: {options.output}. {time.perf_counter() - began:.0f} seconds in all.")

    has_learnt = max(run.accuracy for run in runs) > 4 / NUM_VALUES
    if not is_law:
        console.print("The router's failures are not those that the law predicts")
    if not has_learnt:
        console.print("No model learnt")
    return 0 if is_law and has_learnt else 1


if __name__ == "__main__":
    sys.exit(main())
