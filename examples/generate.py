"""Train a transformers model with block attention, and let it write: ``attn_implementation="moba"`` from end to end.

A small Llama of Hugging Face transformers reads the manual that every Python carries (``pydoc_data.topics``) byte by
byte. It trains on short sequences with dense attention first; one call, ``set_moba``, switches it to block attention
for long ones, as the MoBA paper does (arXiv 2502.13189, section 3.2). Then ``model.generate`` continues a prompt of
several thousand bytes that it never saw, with a topgather.MobaCache in the place of transformers' own cache.

    pip install '.[transformers,demo]'  # in a checkout
    python examples/generate.py
    python examples/generate.py --steps 400 --prompt 8192

It prints what the model wrote and what a token cost with each cache, and exits with status 1 if the loss did not fall,
or if generation with the cache differs from computing every token from scratch.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, logging

from topgather.integrations import transformers as moba

BLOCK_SIZE = 64
TOP_K = 4
NUM_BYTES = 256
SEED = 0

console = Console(highlight=False)


def load_text() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes: the first nine tenths of the manual and the rest, each paragraph once."""
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    tokens = torch.tensor(list("\n\n".join(paragraphs).encode()))
    num_train = len(tokens) * 9 // 10
    return tokens[:num_train], tokens[num_train:]


def make_model(max_tokens: int) -> LlamaForCausalLM:
    """A Llama of 0.7 million parameters with grouped heads; it starts with dense attention."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        moba_block_size=BLOCK_SIZE,
        moba_top_k=TOP_K,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


# --------------------------------------------------------------------------------------------------- training


def train(model: LlamaForCausalLM, text: Tensor, contexts: tuple[int, int], num_steps: int) -> list[float]:
    """The loss of every step, nats per byte.

    Two thirds of the steps are dense, on several sequences of ``contexts[0]`` bytes; the last third is block-sparse, on
    one of ``contexts[1]`` bytes, as many in a step.
    """
    model.train()
    # Muon (torch.optim) for the matrices inside the layers, AdamW for all else.
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.0),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, num_steps)) for o in optimizers]
    order = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    columns = [TextColumn("{task.description:<7}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        bar = progress.add_task("dense", total=num_steps, loss=math.nan)
        batch_size, context = max(1, contexts[1] // contexts[0]), contexts[0]
        for step in range(num_steps):
            if step == 2 * num_steps // 3:
                moba.set_moba(model)  # the switch
                batch_size, context = 1, contexts[1]
                progress.update(bar, description="sparse")
            starts = torch.randint(len(text) - context, (batch_size,), generator=order)
            ids = torch.stack([text[start : start + context] for start in starts])
            loss = model(ids, labels=ids, use_cache=False).loss
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=losses[-1])
    return losses


def rate(step: int, num_steps: int) -> float:
    """Learning rate relative to its peak: a short rise, then a straight line to zero."""
    return min((step + 1) / (0.05 * num_steps), 1 - step / num_steps, 1.0)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, text: Tensor, context: int, num_windows: int = 4) -> float:
    """Loss on windows of a text, nats per byte."""
    windows = text.unfold(0, context, context)[:num_windows]
    return sum(model(window[None], labels=window[None], use_cache=False).loss.item() for window in windows) / len(
        windows
    )


# ------------------------------------------------------------------------------------------------- generation


def write(model: LlamaForCausalLM, prompt: Tensor, num_tokens: int, **options: Any) -> Tensor:
    """Continue ``prompt [N]``; returns the new tokens."""
    ids = prompt[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens, **options
    )
    return out[0, len(prompt) :]


@torch.no_grad()
def recompute(model: LlamaForCausalLM, prompt: Tensor, num_tokens: int) -> Tensor:
    """The likeliest token, time and again, the whole sequence anew for each."""
    ids = prompt[None]
    for _ in range(num_tokens):
        best = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids[0, len(prompt) :]


class Stopwatch(LogitsProcessor):
    """Changes nothing, and notes when each token's logits arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores

    @property
    def seconds_per_token(self) -> float:
        """The median, the prompt's own time left out."""
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(self.times[1:]))


def seconds_per_token(model: LlamaForCausalLM, prompt: Tensor, num_tokens: int = 32) -> float:
    """What one more token costs once the prompt is in the cache."""
    stopwatch = Stopwatch()
    write(model, prompt, num_tokens + 2, do_sample=False, logits_processor=LogitsProcessorList([stopwatch]))
    return stopwatch.seconds_per_token


def compare(model: LlamaForCausalLM, prompts: list[Tensor]) -> None:
    """Print milliseconds a token for each way and length of prompt."""
    table = Table("one more token, after", title_justify="left")
    for heading in ("recompute", "sdpa + DynamicCache", "moba + MobaCache", "against sdpa"):
        table.add_column(heading, justify="right")
    for prompt in prompts:
        moba.set_moba(model, enabled=False)
        dense = seconds_per_token(model, prompt)
        moba.set_moba(model)
        sparse = seconds_per_token(model, prompt)
        began = time.perf_counter()
        recompute(model, prompt, 2)
        anew = (time.perf_counter() - began) / 2
        cells = [f"{1000 * each:,.1f} ms" for each in (anew, dense, sparse)]
        table.add_row(f"{len(prompt):,} bytes", *cells, f"{dense / sparse:.2f}x")
    console.print(table)


def as_text(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="bytes of a dense training sequence (default: 512)")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default: 240)")
    parser.add_argument("--prompt", type=int, default=4096, help="bytes of the prompt (default: 4096)")
    parser.add_argument("--new", type=int, default=400, help="bytes to write (default: 400)")
    options = parser.parse_args()

    logging.set_verbosity_error()
    text, held_out = load_text()
    longest = 4 * options.prompt  # of the second prompt that is timed
    if not 8 <= options.context <= options.prompt + options.new < len(held_out):
        parser.error(
            f"--context must be at least 8, and at most --prompt and --new, which fit {len(held_out)} together"
        )
    if options.steps < 2 or options.new < 1:
        parser.error(f"--steps must be at least 2 and --new at least 1, got {options.steps} and {options.new}")
    if not hasattr(torch.optim, "Muon"):
        sys.exit(f"this example needs torch 2.9 or newer for torch.optim.Muon, found {torch.__version__}")

    moba.register()
    model = make_model(longest + options.new + 64)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{num_parameters:,} parameters, {len(text):,} bytes to train on; blocks of {BLOCK_SIZE} tokens, {TOP_K} a "
        f"query; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    losses = train(model, text, (options.context, options.prompt + options.new), options.steps)
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    held_out_loss = loss_of(model, held_out, options.prompt)
    console.print(
        f"Loss {losses[0]:.3f} at the start, {sum(last) / len(last):.3f} at the end, "
        f"{held_out_loss:.3f} on held-out text"
    )

    prompt = held_out[: options.prompt]
    torch.manual_seed(SEED)
    began = time.perf_counter()
    written = write(model, prompt, options.new, do_sample=True, temperature=0.7)
    speed = options.new / (time.perf_counter() - began)
    shown = Text.assemble((as_text(prompt[-200:]), "dim"), (as_text(written), "bold"))
    console.print(Panel(shown, title=f"continued after {len(prompt):,} bytes, {speed:,.0f} tokens/s", width=100))

    num_checked = min(options.new, 32)
    same = torch.equal(write(model, prompt, num_checked, do_sample=False), recompute(model, prompt, num_checked))
    console.print(
        f"{num_checked} tokens with the cache {'equal' if same else 'DIFFER from'} those recomputed from scratch"
    )
    compare(model, [prompt, held_out.repeat(1 + longest // len(held_out))[:longest]])

    has_learnt = held_out_loss < 0.75 * math.log(NUM_BYTES)
    if not has_learnt:
        console.print(f"The loss did not fall by a quarter of log {NUM_BYTES} = {math.log(NUM_BYTES):.3f}")
    return 0 if has_learnt and same else 1


if __name__ == "__main__":
    sys.exit(main())
