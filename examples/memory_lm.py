"""What a memory layer is good for: a recall test of facts, new facts without loss of old ones, and a language model.

First, recall: 32,768 facts, each a random key vector and one of 256 answers drawn at random, so that there is nothing
to learn but the facts. The model is one layer on a residual stream. Three layers are compared at equal active
parameters, those that a token is multiplied with, and so at equal operations:

    dense    Linear, GELU, Linear
    Memory   tg.nn.ProductKeyMemory(dim, pool, gated=False)
    Memory+  tg.nn.ProductKeyMemory(dim, pool)

A dense model holds at most about two bits for each of its parameters (arXiv 2404.05405), and the facts are six bits for
each. A memory (arXiv 2412.09764) reads 32 rows of a table of 16,384: it has many more parameters than it uses at a
time. Memory is trained once more with ``tg.optim.RowAdam``, which makes no gradient of the table.

Then, new facts: the trained Memory learns 2,048 facts more, without seeing the old ones again, in three ways:

    all parameters      full finetuning with Adam
    the table           RowAdam on all rows that a batch uses, everything else frozen
    4000 rows a batch   the same of those rows alone that the batch uses most and old facts least, by TF-IDF
                        (sparse memory finetuning, arXiv 2510.15103)

Then, language. The model of ``byte_language_model.py`` is trained twice on the same text, with Memory+ in place of the
last layer's perceptron the second time.

    python examples/memory_lm.py
    python examples/memory_lm.py --facts 65536 --steps 800

It prints three tables, writes two pictures, and exits with status 1 if Memory did not recall more, if finetuning of
rows forgot as much as that of all parameters, or if a language model did not learn. Needs torch 2.9 for its Muon
optimizer; topgather itself does not.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
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
COLORS = {
    "dense": "#b4bac4",
    "dense, 3x steps": "#7d8590",
    "Memory": "#2e4057",
    "Memory, RowAdam": "#66a182",
    "Memory+": "#d1495b",
    "all parameters": "#d1495b",
    "the table": "#2e4057",
}
SPARSE_COLOR = "#66a182"
BACKGROUND_BATCH = 64  # old facts in one batch of the background
NEW_BATCH = 512

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
    num_bytes: int = 0
    """Of gradients, optimizer states and what row optimizers recorded, before the last step."""
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
        for step in range(num_steps):
            loss, score = step_of()
            run.model.zero_grad()
            loss.backward()
            if step == num_steps - 1:
                run.num_bytes = training_bytes(run.model, optimizers)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            run.scores.append(score)
            run.seconds.append(time.perf_counter() - began)
            progress.update(bar, advance=1, score=score)


def training_bytes(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """What a step holds besides the parameters and activations."""
    tensors = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    recorded = 0
    for optimizer in optimizers:
        tensors += [state for states in optimizer.state.values() for state in states.values() if torch.is_tensor(state)]
        if isinstance(optimizer, tg.optim.RowOptimizer):
            for group in optimizer.param_groups:
                for table in group["params"]:
                    recorded += 16 * int(optimizer.row_counts(table).sum())  # each entry's row and weight, and
                    recorded += BATCH * table.size(1) * table.element_size()  # the gradient of the lookup's result
    return sum(tensor.nbytes for tensor in tensors) + recorded


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


def make_facts(num_facts: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num_facts, DIM, generator=draw), torch.randint(NUM_ANSWERS, (num_facts,), generator=draw)


def shuffled(num_facts: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of the facts' numbers, without end."""
    while True:
        yield from torch.randperm(num_facts).split(batch_size)


@torch.no_grad()
def recall_of(model: nn.Module, keys: Tensor, answers: Tensor) -> float:
    guesses = torch.cat([model(batch).argmax(dim=1) for batch in keys.split(BATCH)])
    return (guesses == answers).float().mean().item()


def recall_facts(
    name: str, layer: nn.Module, num_facts: int, num_steps: int, lr: float, values_lr: float, by_rows: bool = False
) -> Run:
    """Learn the facts, the same for every layer and in the same order, and ask for all of them."""
    torch.manual_seed(SEED)
    keys, answers = make_facts(num_facts, SEED)
    run = Run(name, FactModel(layer))
    batches = shuffled(num_facts, BATCH)

    def step_of() -> tuple[Tensor, float]:
        batch = next(batches)
        logits = run.model(keys[batch])
        is_right = logits.argmax(dim=1) == answers[batch]
        return F.cross_entropy(logits, answers[batch]), is_right.float().mean().item()

    rest, layer_keys, values = tg.nn.memory_parameter_groups(run.model, lr=lr, values_lr=values_lr)
    if by_rows:
        rows = tg.optim.RowAdam(values["params"], lr=values["lr"])
        train(run, [torch.optim.Adam([rest, layer_keys]), rows], step_of, num_steps)
        rows.detach()
    else:
        train(run, [torch.optim.Adam([rest, layer_keys, values])], step_of, num_steps)
    run.model.eval()
    if isinstance(layer, tg.nn.ProductKeyMemory):
        layer.track_usage = True
    run.result = recall_of(run.model, keys, answers)
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
    for name, lr, values_lr, by_rows in (
        ("Memory", 6e-3, 2e-2, False),
        ("Memory, RowAdam", 6e-3, 2e-2, True),
        ("Memory+", 3e-3, 1e-2, False),
    ):
        torch.manual_seed(SEED)
        layer = makers[name.removesuffix(", RowAdam")]()
        runs.append(recall_facts(name, layer, num_facts, num_steps, lr, values_lr, by_rows))
    return runs


def print_facts(runs: list[Run], num_facts: int) -> None:
    table = Table("layer")
    for heading in ("active", "all parameters", "steps", "seconds", "MB", "recall", "rows", "KL"):
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
            f"{run.num_bytes / 2**20:.1f}",
            f"{run.result:.1%}",
            *use,
        )
    console.print(table)
    console.print(
        f"Recall of {num_facts:,} facts of {int(math.log2(NUM_ANSWERS))} bits; {1 / NUM_ANSWERS:.1%} by guessing. "
        "MB: gradients, optimizer states and what RowAdam recorded, in a step. Rows: share used in answering all of "
        "them once. KL: of their use from even use, in nats."
    )


# --------------------------------------------------------------------------------------------------- new facts


@dataclass
class Finetuning:
    """One way to learn new facts: recall of both kinds after each so many steps."""

    name: str
    new: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)
    seconds: float = 0.0


@torch.no_grad()
def background_use(model: FactModel, keys: Tensor) -> tuple[Tensor, int]:
    """In how many batches of old facts each row of the table is used, and of how many."""
    model, uses = copy.deepcopy(model), []
    for batch in keys.split(BACKGROUND_BATCH):
        model.layer.track_usage = False  # count from nothing
        model.layer.track_usage = True
        model(batch)
        uses.append((model.layer.usage_weights + model.layer.usage_units) > 0)
    return torch.stack(uses).sum(dim=0), len(uses)


def finetune(name: str, model: FactModel, num_rows: int | None, lr: float, facts: dict, num_steps: int) -> Finetuning:
    """Learn new facts alone with a copy of ``model``: of all parameters, or of ``num_rows`` rows for each batch."""
    torch.manual_seed(SEED)
    model = copy.deepcopy(model).eval()  # the statistics of queries stay as they are
    values = model.layer.pool.values
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.Adam(model.parameters(), lr) if num_rows is None else tg.optim.RowAdam([values], lr)
    run = Finetuning(name)
    batches = shuffled(len(facts["new"][0]), NEW_BATCH)
    for step in range(num_steps + 1):
        if step % 4 == 0 or step == num_steps:
            run.new.append(recall_of(model, *facts["new"]))
            run.old.append(recall_of(model, *facts["old"]))
        if step == num_steps:
            break
        began = time.perf_counter()
        batch = next(batches)
        keys, answers = facts["new"]
        model.zero_grad()
        F.cross_entropy(model(keys[batch]), answers[batch]).backward()
        if isinstance(optimizer, tg.optim.RowOptimizer) and num_rows:
            rows = tg.optim.tfidf_rows(optimizer.row_counts(values), *facts["use"], num_rows)
            optimizer.set_trainable_rows(values, rows)
        optimizer.step()
        run.seconds += time.perf_counter() - began
    if isinstance(optimizer, tg.optim.RowOptimizer):
        optimizer.detach()
    return run


def compare_finetuning(model: FactModel, num_facts: int, num_new: int, num_steps: int) -> list[Finetuning]:
    model = copy.deepcopy(model).eval()
    old = make_facts(num_facts, SEED)
    facts = {
        "old": (old[0][:4096], old[1][:4096]),
        "new": make_facts(num_new, SEED + 1),
        "use": background_use(model, old[0]),
    }
    model.layer.track_usage = False
    num_rows = model.layer.pool.values.size(0) * 4000 // 2**14
    return [
        finetune("all parameters", model, None, 3e-3, facts, num_steps),
        finetune("the table", model, 0, 2e-2, facts, num_steps),
        finetune(f"{num_rows} rows a batch", model, num_rows, 3e-2, facts, num_steps),
    ]


def print_finetuning(runs: list[Finetuning], num_new: int, num_steps: int) -> None:
    table = Table("what is trained")
    for heading in ("new facts", "old facts", "seconds"):
        table.add_column(heading, justify="right")
    table.add_row("nothing", f"{runs[0].new[0]:.1%}", f"{runs[0].old[0]:.1%}", "")
    for run in runs:
        table.add_row(run.name, f"{run.new[-1]:.1%}", f"{run.old[-1]:.1%}", f"{run.seconds:.1f}")
    console.print(table)
    console.print(f"Recall after {num_steps} steps on {num_new:,} new facts alone, {NEW_BATCH} a step.")


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


def draw_finetuning(runs: list[Finetuning], path: Path) -> None:
    """Write the picture of new facts against old ones: a curve goes right as one learns, and down as one forgets."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        color = COLORS.get(run.name, SPARSE_COLOR)
        axes.plot(run.new, run.old, color=color, label=run.name, marker=".", linewidth=1.8)
    axes.set(xlabel="new facts recalled", ylabel="old facts recalled", ylim=(0, 1.03), title="Finetuning on new facts")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot(axes: Axes, run: Run, positions) -> None:
    axes.plot(positions, run.scores, color=COLORS[run.name], label=run.name, linewidth=1.8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=32768, help="facts to recall (default: 32768)")
    parser.add_argument("--steps", type=int, default=400, help="steps of the recall test (default: 400)")
    parser.add_argument("--new-facts", type=int, default=2048, help="facts to learn afterwards (default: 2048)")
    parser.add_argument("--new-steps", type=int, default=60, help="steps of learning them (default: 60)")
    parser.add_argument("--text-steps", type=int, default=60, help="steps of each language model (default: 60)")
    parser.add_argument("--context", type=int, default=4096, help="bytes of text in a step (default: 4096)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/memory_lm.png"), help="the picture (default: build/memory_lm.png)"
    )
    options = parser.parse_args()

    text, held_out = load_text()
    if not 2 <= options.context < len(held_out):
        parser.error(f"--context must be from 2 to {len(held_out) - 1}, the held-out text, got {options.context}")
    for name in ("facts", "steps", "new_facts", "new_steps", "text_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not hasattr(torch.optim, "Muon"):
        sys.exit(f"this example needs torch 2.9 or newer for torch.optim.Muon, found {torch.__version__}")

    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    facts = compare_facts(options.facts, options.steps)
    print_facts(facts, options.facts)
    trained = next(run.model for run in facts if run.name == "Memory, RowAdam")
    finetunings = compare_finetuning(trained, options.facts, options.new_facts, options.new_steps)
    print_finetuning(finetunings, options.new_facts, options.new_steps)
    texts = [
        learn_text(name, name != "dense", text, held_out, options.context, options.text_steps)
        for name in ("dense", "Memory+")
    ]
    print_text(texts, options.context)
    draw(facts, texts, options.output)
    of_finetuning = options.output.with_stem(options.output.stem + "_finetuning")
    draw_finetuning(finetunings, of_finetuning)
    console.print(f"Recall and losses: {options.output}; new facts: {of_finetuning}")

    most_dense = max(run.result for run in facts if run.name.startswith("dense"))
    failed = [run.name for run in facts if run.name.startswith("Memory") and run.result <= most_dense]
    failed += [f"language model, {run.name}" for run in texts if not run.result < 0.75 * math.log(NUM_BYTES)]
    whole, *of_rows = finetunings
    failed += [f"finetuning of {run.name}" for run in of_rows if run.old[-1] <= whole.old[-1]]
    if failed:
        console.print(f"Did not learn as it should: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
