"""What a memory layer is good for: a recall test of facts, and a language model with a memory in it.

First, recall: 32,768 facts, each a random key vector and one of 256 answers drawn at random, so that there is nothing
to learn but the facts. The model is one layer on a residual stream. Three layers are compared at equal active
parameters, those that a token is multiplied with, and so at equal operations:

    dense    Linear, GELU, Linear
    Memory   tg.nn.ProductKeyMemory(dim, pool, gated=False)
    Memory+  tg.nn.ProductKeyMemory(dim, pool)

A dense model holds at most about two bits for each of its parameters (arXiv 2404.05405), and the facts are six bits for
each. A memory (arXiv 2412.09764) reads 32 rows of a table of 16,384: it has many more parameters than it uses at a
time.

Then, language. The model of ``byte_language_model.py`` is trained twice on the same text, with Memory+ in place of the
last layer's perceptron the second time.

    python examples/memory_lm.py
    python examples/memory_lm.py --facts 65536 --steps 800

It prints two tables, writes a picture, and exits with status 1 if Memory did not recall more or a language model did
not learn. Needs torch 2.9 for its Muon optimizer; topgather itself does not.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from byte_language_model import (
    NUM_BYTES,
    ByteLanguageModel,
    Layer,
    console,
    load_text,
    moba_attention,
    next_byte_loss,
    rate,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import topgather as tg

DIM = 64
NUM_ANSWERS = 256
BATCH = 2048
NUM_KEYS = 128
SEED = 0
COLORS = {"dense": "#b4bac4", "dense, 3x steps": "#7d8590", "Memory": "#2e4057", "Memory+": "#d1495b"}

# ---------------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """One training: its model and what it measured."""

    name: str
    model: nn.Module
    scores: list[float] = field(default_factory=list)
    """Of each step: the share of answers that were right, or the training loss."""
    seconds: list[float] = field(default_factory=list)
    """Training time up to the end of each step."""
    result: float = math.nan
    """The whole of the facts, or the held-out text."""


def train(
    run: Run, optimizers: list[torch.optim.Optimizer], step_of: Callable[[], tuple[Tensor, float]], num_steps: int
) -> None:
    """Take ``num_steps`` steps; ``step_of`` returns the loss of a batch and the score to note."""
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, num_steps)) for o in optimizers]
    columns = [TextColumn(f"{run.name:<15}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[score]:.3f}"), console=console) as progress:
        bar = progress.add_task(run.name, total=num_steps, score=math.nan)
        began = time.perf_counter()
        for _ in range(num_steps):
            loss, score = step_of()
            run.model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            run.scores.append(score)
            run.seconds.append(time.perf_counter() - began)
            progress.update(bar, advance=1, score=score)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: all, but of a table only the rows that it reads."""
    unread = 0
    for module in model.modules():
        if isinstance(module, tg.nn.ProductKeyMemory):
            unread += module.pool.values.numel() - module.num_heads * module.top_k * module.pool.value_dim
    return num_parameters(model) - unread


# ------------------------------------------------------------------------------------------------------- facts


class FactModel(nn.Module):
    """Keys ``[B, DIM]`` to logits ``[B, NUM_ANSWERS]``: one layer, added to what came in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.layer = layer
        self.out_norm = nn.RMSNorm(DIM)
        self.logits = nn.Linear(DIM, NUM_ANSWERS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.out_norm(x + self.layer(self.norm(x))))


def memory_layer(gated: bool, key_dim: int) -> "tg.nn.ProductKeyMemory":
    pool = tg.nn.MemoryPool(NUM_KEYS, DIM)
    return tg.nn.ProductKeyMemory(DIM, pool, top_k=8, key_dim=key_dim, gated=gated, query_norm="batch")


def dense_layer(hidden_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, DIM))


def recall_facts(name: str, layer: nn.Module, num_facts: int, num_steps: int, lr: float, values_lr: float) -> Run:
    """Learn the facts, the same for every layer and in the same order, and ask for all of them."""
    draw = torch.Generator().manual_seed(SEED)
    keys = torch.randn(num_facts, DIM, generator=draw)
    answers = torch.randint(NUM_ANSWERS, (num_facts,), generator=draw)
    run = Run(name, FactModel(layer))
    order: list[Tensor] = []

    def step_of() -> tuple[Tensor, float]:
        if not order:
            order.extend(torch.randperm(num_facts, generator=draw).split(BATCH))
        batch = order.pop()
        logits = run.model(keys[batch])
        is_right = logits.argmax(dim=1) == answers[batch]
        return F.cross_entropy(logits, answers[batch]), is_right.float().mean().item()

    groups = tg.nn.memory_parameter_groups(run.model, lr=lr, values_lr=values_lr)
    train(run, [torch.optim.Adam(groups)], step_of, num_steps)
    run.model.eval()
    if isinstance(layer, tg.nn.ProductKeyMemory):
        layer.track_usage = True
    with torch.no_grad():
        guesses = torch.cat([run.model(batch).argmax(dim=1) for batch in keys.split(BATCH)])
    run.result = (guesses == answers).float().mean().item()
    return run


def compare_facts(num_facts: int, num_steps: int) -> list[Run]:
    # Memory+ gets fewer channels for its queries, for it has two projections more; dense as many channels as fit.
    makers: dict[str, Callable[[], nn.Module]] = {
        "Memory": lambda: memory_layer(gated=False, key_dim=32),
        "Memory+": lambda: memory_layer(gated=True, key_dim=20),
    }
    most_active = max(num_active_parameters(maker()) for maker in makers.values())
    hidden_dim = -(-(most_active - DIM) // (2 * DIM + 1))
    runs = []
    for name, factor in (("dense", 1), ("dense, 3x steps", 3)):
        torch.manual_seed(SEED)
        runs.append(recall_facts(name, dense_layer(hidden_dim), num_facts, factor * num_steps, lr=2e-2, values_lr=0.0))
    for name, lr, values_lr in (("Memory", 6e-3, 2e-2), ("Memory+", 3e-3, 1e-2)):
        torch.manual_seed(SEED)
        runs.append(recall_facts(name, makers[name](), num_facts, num_steps, lr, values_lr))
    return runs


def print_facts(runs: list[Run], num_facts: int) -> None:
    table = Table("layer")
    for heading in ("active", "all parameters", "steps", "seconds", "recall", "rows", "KL"):
        table.add_column(heading, justify="right")
    for run in runs:
        layer = run.model.layer
        use = ("", "")
        if isinstance(layer, tg.nn.ProductKeyMemory):
            usage = layer.usage()
            use = (f"{usage.share_touched:.1%}", f"{usage.kl_divergence:.2f}")
        table.add_row(
            run.name,
            f"{num_active_parameters(run.model):,}",
            f"{num_parameters(run.model):,}",
            str(len(run.scores)),
            f"{run.seconds[-1]:.1f}",
            f"{run.result:.1%}",
            *use,
        )
    console.print(table)
    console.print(
        f"Recall of {num_facts:,} facts of {int(math.log2(NUM_ANSWERS))} bits; {1 / NUM_ANSWERS:.1%} by guessing. "
        "Rows: share used in answering all of them once. KL: of their use from even use, in nats."
    )


# ---------------------------------------------------------------------------------------------------- language


class Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class MemoryLayer(Layer):
    """A transformer layer with Memory+ in place of its perceptron."""

    def __init__(self, dim: int, num_heads: int, pool: "tg.nn.MemoryPool") -> None:
        super().__init__(dim, num_heads)
        self.mlp_in, self.mlp_out = nn.Identity(), Nothing()
        self.memory = tg.nn.ProductKeyMemory(dim, pool, top_k=8, key_dim=112, query_norm="batch")
        nn.init.zeros_(self.memory.value_proj.weight)  # it starts by adding nothing, as the perceptron does

    def forward(self, x: Tensor, *rest) -> Tensor:
        x = super().forward(x, *rest)
        return x + self.memory(self.mlp_norm(x))


def learn_text(name: str, has_memory: bool, text: Tensor, held_out: Tensor, context: int, num_steps: int) -> Run:
    """Train a fresh language model for ``num_steps`` steps of one sequence each."""
    torch.manual_seed(SEED)
    dim, num_heads = 128, 4
    model = ByteLanguageModel(dim, num_heads)
    if has_memory:
        model.layers[-1] = MemoryLayer(dim, num_heads, tg.nn.MemoryPool(64, dim))
    run = Run(name, model)
    rest, keys, values = tg.nn.memory_parameter_groups(model, lr=0.02, values_lr=0.2)
    is_matrix = {id(parameter): parameter.ndim == 2 for parameter in model.layers.parameters()}
    matrices = [parameter for parameter in rest["params"] if is_matrix.get(id(parameter), False)]
    others = [parameter for parameter in rest["params"] if not is_matrix.get(id(parameter), False)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.0),
        torch.optim.AdamW([{**rest, "params": others}, keys, values], betas=(0.9, 0.95)),
    ]
    draw = torch.Generator().manual_seed(SEED)

    def step_of() -> tuple[Tensor, float]:
        start = int(torch.randint(len(text) - context, (), generator=draw))
        loss = next_byte_loss(model, moba_attention, text[start : start + context + 1])
        return loss, loss.item()

    train(run, optimizers, step_of, num_steps)
    model.eval()
    with torch.no_grad():
        windows = held_out.unfold(0, context + 1, context)
        run.result = sum(float(next_byte_loss(model, moba_attention, w)) for w in windows) / len(windows)
    return run


def print_text(runs: list[Run], context: int) -> None:
    table = Table("last layer")
    for heading in ("active", "all parameters", "train loss", "held-out loss", "tokens/s"):
        table.add_column(heading, justify="right")
    for run in runs:
        last = run.scores[-max(1, len(run.scores) // 10) :]
        table.add_row(
            run.name,
            f"{num_active_parameters(run.model):,}",
            f"{num_parameters(run.model):,}",
            f"{sum(last) / len(last):.3f}",
            f"{run.result:.3f}",
            f"{context * len(run.scores) / run.seconds[-1]:,.0f}",
        )
    console.print(table)
    console.print(
        f"Losses in nats per byte; a model that knows nothing has log 256 = {math.log(NUM_BYTES):.3f}. So short a text "
        "has few facts to look up: the memory only has to do as well as the perceptron in whose place it stands."
    )


# ----------------------------------------------------------------------------------------------------- picture


def draw(facts: list[Run], texts: list[Run], path: Path) -> None:
    """Write the picture: recall over steps and over time, and the language models' losses."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_step, by_time, losses = figure.subplots(1, 3)
    for run in sorted(facts, key=lambda run: -len(run.scores)):  # short curves over the long one that they start like
        steps = range(1, len(run.scores) + 1)
        plot(by_step, run, steps)
        plot(by_time, run, run.seconds)
    for run in texts:
        plot(losses, run, range(1, len(run.scores) + 1))
    by_step.set(xlabel="step", ylabel="share of a batch's facts recalled", title="Recall by step")
    by_time.set(xlabel="seconds of training", title="Recall by time")
    losses.set(xlabel="step", ylabel="training loss, nats per byte", title="Language model, last layer")
    for axes in (by_step, by_time, losses):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot(axes: Axes, run: Run, positions) -> None:
    axes.plot(positions, run.scores, color=COLORS[run.name], label=run.name, linewidth=1.8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=32768, help="facts to recall (default: 32768)")
    parser.add_argument("--steps", type=int, default=400, help="steps of the recall test (default: 400)")
    parser.add_argument("--text-steps", type=int, default=60, help="steps of each language model (default: 60)")
    parser.add_argument("--context", type=int, default=4096, help="bytes of text in a step (default: 4096)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/memory_lm.png"), help="the picture (default: build/memory_lm.png)"
    )
    options = parser.parse_args()

    text, held_out = load_text()
    if not 2 <= options.context < len(held_out):
        parser.error(f"--context must be from 2 to {len(held_out) - 1}, the held-out text, got {options.context}")
    for name in ("facts", "steps", "text_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not hasattr(torch.optim, "Muon"):
        sys.exit(f"this example needs torch 2.9 or newer for torch.optim.Muon, found {torch.__version__}")

    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    facts = compare_facts(options.facts, options.steps)
    print_facts(facts, options.facts)
    texts = [
        learn_text(name, name != "dense", text, held_out, options.context, options.text_steps)
        for name in ("dense", "Memory+")
    ]
    print_text(texts, options.context)
    draw(facts, texts, options.output)
    console.print(f"Recall and losses: {options.output}")

    most_dense = max(run.result for run in facts if run.name.startswith("dense"))
    failed = [run.name for run in facts if run.name.startswith("Memory") and run.result <= most_dense]
    failed += [f"language model, {run.name}" for run in texts if not run.result < 0.75 * math.log(NUM_BYTES)]
    if failed:
        console.print(f"Did not learn as it should: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
