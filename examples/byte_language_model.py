"""Train one small language model twice, with dense attention and with block attention (MoBA), and compare.

The text is the manual that every Python carries (``pydoc_data.topics``), read byte by byte at a context of
8192 tokens. The two runs share everything: weights at the start, batches and their order, number of steps.
Only one line differs:

    dense  F.scaled_dot_product_attention(query, key, value, is_causal=True)
    MoBA   tg.moba_attention(query, key, value, block_size=128, top_k=8)

With MoBA (arXiv 2502.13189) a token attends to its own block of 128 tokens and to the 7 earlier blocks whose
mean key suits its query best: never to more than 1024 of 8192 tokens.

    python examples/byte_language_model.py
    python examples/byte_language_model.py --context 16384 --steps 30

It prints a table, writes a picture, and exits with status 1 if a loss did not fall. Needs torch 2.9 for its
Muon optimizer; topgather itself does not.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import topgather as tg

BLOCK_SIZE = 128
TOP_K = 8
SEED = 0
NUM_BYTES = 256
COLORS = {"dense": "#b4bac4", "MoBA": "#d1495b"}

console = Console(highlight=False)

# -------------------------------------------------------------------------------------------------- attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value ``[B, H, N, D]`` to output ``[B, H, N, D]``."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every token sees all earlier ones."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def moba_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every token sees its own block and the earlier ones that suit it best."""
    return tg.moba_attention(query, key, value, block_size=BLOCK_SIZE, top_k=TOP_K)


# ------------------------------------------------------------------------------------------------------ model


class ByteLanguageModel(nn.Module):
    """A transformer that predicts the next byte: tokens ``[B, N]`` to logits ``[B, N, 256]``."""

    def __init__(self, dim: int = 128, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        # A token is its byte and the three before it, side by side: spelling is then learnt at once, and
        # attention is left with what is further away.
        self.embedding = nn.Embedding(NUM_BYTES, dim // 4)
        self.layers = nn.ModuleList(Layer(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.logits = nn.Linear(dim, NUM_BYTES, bias=False)
        nn.init.zeros_(self.logits.weight)

    def forward(self, tokens: Tensor, attention: Attention) -> Tensor:
        num_tokens = tokens.shape[1]
        bytes_before = [F.pad(tokens, (distance, 0))[:, :num_tokens] for distance in range(4)]
        x = self.embedding(torch.stack(bytes_before, dim=2)).flatten(2)
        rotation = rotary_angles(torch.arange(num_tokens), self.head_dim)
        for layer in self.layers:
            x = layer(x, rotation, attention)
        return self.logits(self.norm(x))


class Layer(nn.Module):
    """One transformer layer: attention, then a perceptron, each added to what came in."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(dim)
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_proj = nn.Linear(dim, dim, bias=False)
        self.value_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(dim // num_heads)
        self.key_norm = nn.RMSNorm(dim // num_heads)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim, bias=False)
        self.mlp_out = nn.Linear(4 * dim, dim, bias=False)
        # So short a training needs a start from which attention learns at once. Queries and keys begin alike,
        # and sharp: a query finds the keys made of the same bytes.
        self.key_proj.load_state_dict(self.query_proj.state_dict())
        nn.init.constant_(self.query_norm.weight, 1.7)
        nn.init.constant_(self.key_norm.weight, 1.7)
        # A layer that starts by adding nothing bears a high learning rate.
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Attention,
        tokens_before: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        normed = self.attention_norm(x)
        query = rotate(self.query_norm(self.split_heads(self.query_proj(normed))), rotation)
        # A key is made from the token before its own (arXiv 2209.11895 calls such keys smeared): a query that
        # matches it reads, in the value, the byte that came next the last time.
        previous = F.pad(normed, (0, 0, 1, 0))[:, :-1] if tokens_before is None else tokens_before(normed)
        key = rotate(self.key_norm(self.split_heads(self.key_proj(previous))), rotation)
        value = self.split_heads(self.value_proj(normed))
        out = attention(query, key, value)
        x = x + self.out_proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())

    def split_heads(self, x: Tensor) -> Tensor:
        """``[B, N, H * D]`` to ``[B, H, N, D]``, a view: topgather takes any strides."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding (arXiv 2104.09864), each ``[N, D / 4]``."""
    frequencies = 10000 ** -torch.linspace(0, 1, head_dim // 4)
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn half of the channels, pair by pair, by their token's angle, so that scores also see distances."""
    cos, sin = rotation
    first, second, third, fourth = x.chunk(4, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, third, fourth], dim=-1)


# ------------------------------------------------------------------------------------------------------- text


def load_text() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes: the first nine tenths of the manual and the rest.

    The manual repeats whole passages under several topics. Each paragraph is kept once, so that the held-out
    part is new to the model.
    """
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    tokens = torch.tensor(list("\n\n".join(paragraphs).encode()))
    num_train = len(tokens) * 9 // 10
    return tokens[:num_train], tokens[num_train:]


# --------------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """One training: its model and what it measured."""

    name: str
    model: ByteLanguageModel
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, nats per byte."""
    seconds: list[float] = field(default_factory=list)
    """Training time up to the end of each step."""
    tokens_per_second: float = 0.0
    held_out_loss: float = math.nan

    @property
    def final_loss(self) -> float:
        """Training loss, averaged over the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @property
    def has_learnt(self) -> bool:
        """Whether both losses lie at least a quarter below that of a guess without knowledge, log 256."""
        return max(self.final_loss, self.held_out_loss) < 0.75 * math.log(NUM_BYTES)


def train(name: str, attention: Attention, text: Tensor, held_out: Tensor, context: int, num_steps: int) -> Run:
    """Train a fresh model for ``num_steps`` steps of one sequence each, then measure its held-out loss."""
    torch.manual_seed(SEED)
    run = Run(name, ByteLanguageModel())
    model = run.model
    # Muon (torch.optim) for the matrices inside the layers, AdamW for all else.
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.0),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, num_steps)) for o in optimizers]
    order = torch.Generator().manual_seed(SEED)

    columns = [TextColumn(f"{name:<5}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        bar = progress.add_task(name, total=num_steps, loss=math.nan)
        began = time.perf_counter()
        for _ in range(num_steps):
            start = int(torch.randint(len(text) - context, (), generator=order))
            loss = next_byte_loss(model, attention, text[start : start + context + 1])
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - began)
            progress.update(bar, advance=1, loss=run.losses[-1])
    run.tokens_per_second = context * num_steps / run.seconds[-1]

    with torch.no_grad():
        windows = held_out.unfold(0, context + 1, context)
        run.held_out_loss = sum(float(next_byte_loss(model, attention, w)) for w in windows) / len(windows)
    return run


def rate(step: int, num_steps: int) -> float:
    """Learning rate relative to its peak: a short rise, then a straight line to zero."""
    return min((step + 1) / (0.05 * num_steps), 1 - step / num_steps, 1.0)


def next_byte_loss(model: ByteLanguageModel, attention: Attention, window: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of predicting each byte of ``window [N + 1]`` from those before it."""
    logits = model(window[None, :-1], attention)
    return F.cross_entropy(logits.flatten(0, 1), window[1:])


# ---------------------------------------------------------------------------------------------------- results


def print_table(dense: Run, moba: Run) -> None:
    """The figures of both runs side by side."""
    table = Table("attention", title_justify="left")
    for heading in ("train loss", "held-out loss", "tokens/s", "speed-up"):
        table.add_column(heading, justify="right")
    for run in (dense, moba):
        table.add_row(
            run.name,
            f"{run.final_loss:.3f}",
            f"{run.held_out_loss:.3f}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.tokens_per_second / dense.tokens_per_second:.2f}x",
        )
    console.print(table)
    change = moba.held_out_loss / dense.held_out_loss - 1
    console.print(
        f"Losses in nats per byte; a model that knows nothing has log 256 = {math.log(NUM_BYTES):.3f}. "
        f"MoBA's held-out loss lies {abs(change):.1%} {'above' if change > 0 else 'below'} dense. "
        "Speed is that of whole training steps, attention and all else."
    )


def draw(dense: Run, moba: Run, window: Tensor, path: Path) -> None:
    """Write the picture: both losses over steps and over time, and the blocks that a few queries chose."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_step, by_time, chosen = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    for run, width in ((dense, 4.0), (moba, 1.5)):  # the wide line shows on both sides of the narrow one
        style = {"color": COLORS[run.name], "label": run.name, "linewidth": width}
        by_step.plot(range(1, len(run.losses) + 1), run.losses, **style)
        by_time.plot(run.seconds, run.losses, **style)
    by_step.set(xlabel="step", ylabel="training loss, nats per byte", title="Loss by step")
    by_time.set(xlabel="seconds of training", title="Loss by time")
    for axes in (by_step, by_time):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    draw_chosen_blocks(chosen, moba, window)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_chosen_blocks(axes: Axes, run: Run, window: Tensor, num_queries: int = 8) -> None:
    """Mark the blocks chosen by queries spread over the context, a row for each head of the last layer."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recording_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query, key))
        return moba_attention(query, key, value)

    with torch.no_grad():
        run.model(window[None, :-1], recording_attention)
    query, key = seen[-1]
    block_indices = tg.moba_route(query, key, block_size=BLOCK_SIZE, top_k=TOP_K).block_indices[0]  # [H, N, top_k]

    num_heads, num_tokens = block_indices.shape[:2]
    num_blocks = math.ceil(num_tokens / BLOCK_SIZE)
    positions = torch.linspace(0, num_tokens - 1, num_queries + 1).long()[1:]
    image = torch.zeros(num_queries, num_heads, num_blocks)
    for row, position in enumerate(positions.tolist()):
        own_block = position // BLOCK_SIZE
        image[row, :, own_block + 1 :] = 3
        for head in range(num_heads):
            blocks = block_indices[head, position]
            image[row, head, blocks[blocks >= 0].long()] = 1
        image[row, :, own_block] = 2
    colors = ListedColormap(["#f3f1ec", COLORS["MoBA"], "#2e4057", "#ffffff"])
    axes.imshow(image.flatten(0, 1), cmap=colors, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    for row in range(1, num_queries):
        axes.axhline(row * num_heads - 0.5, color="#b8b4aa", linewidth=0.8)
    axes.set_yticks([(row + 0.5) * num_heads - 0.5 for row in range(num_queries)], positions.tolist())
    axes.set(
        xlabel=f"block of {BLOCK_SIZE} tokens",
        ylabel=f"position of the query ({num_heads} heads each)",
        title="Blocks chosen in the last layer (dark: the own block)",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192, help="tokens in a sequence (default: 8192)")
    parser.add_argument("--steps", type=int, default=70, help="training steps of each run (default: 70)")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo.png"), help="the picture (default: build/demo.png)"
    )
    options = parser.parse_args()

    text, held_out = load_text()
    if not 2 <= options.context < len(held_out):
        parser.error(f"--context must be from 2 to {len(held_out) - 1}, the held-out text, got {options.context}")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not hasattr(torch.optim, "Muon"):
        sys.exit(f"this example needs torch 2.9 or newer for torch.optim.Muon, found {torch.__version__}")

    console.print(
        f"{len(text):,} bytes to train on, {len(held_out):,} held out; context {options.context}, "
        f"{options.steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    dense = train("dense", dense_attention, text, held_out, options.context, options.steps)
    moba = train("MoBA", moba_attention, text, held_out, options.context, options.steps)
    print_table(dense, moba)
    draw(dense, moba, held_out[: options.context + 1], options.output)
    console.print(f"Loss curves and chosen blocks: {options.output}")

    forgetful = [run.name for run in (dense, moba) if not run.has_learnt]
    if forgetful:
        console.print(f"The loss did not fall by a quarter: {', '.join(forgetful)}")
    return 1 if forgetful else 0


if __name__ == "__main__":
    sys.exit(main())
