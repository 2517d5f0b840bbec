"""Train at four times the context of one process's share, over processes, and compare with one process.

The model is that of ``byte_language_model.py``. Its sequence is spread over four processes: each has a quarter of the
tokens, their activations, keys and values. Attention (MoBA, arXiv 2502.13189) chooses among the blocks of all of them;
every other step keys and values are gathered, in the steps between queries travel to the blocks they chose.

    python examples/long_context.py
    torchrun --nproc-per-node 4 examples/long_context.py

It prints what a token costs in bytes sent, both ways, counted and by ``topgather.distributed.plan``, and exits with
status 1 if the losses differ from those of one process that has the whole sequence. Needs torch 2.9 for its Muon
optimizer; topgather itself does not.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from byte_language_model import (
    BLOCK_SIZE,
    SEED,
    TOP_K,
    Attention,
    ByteLanguageModel,
    console,
    load_text,
    moba_attention,
    rate,
    rotary_angles,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import topgather.distributed as tgd

METHODS = ("gather", "exchange")
PLACEMENT = "zigzag"  # all processes then search equally many keys

# ---------------------------------------------------------------------------------------------------- the model


def summed_loss(
    model: ByteLanguageModel,
    window: Tensor,
    attention: Attention,
    tokens_before: Callable[[Tensor], Tensor] | None = None,
    share: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Tensor:
    """The loss of predicting each byte of ``window [N + 1]``, summed over the tokens that ``share`` leaves of them.

    All that depends on where a token stands is made for the whole sequence and then cut: bytes before it, its position,
    the byte that comes next. Everything between goes token by token, but for attention and ``tokens_before``.
    """
    tokens, targets = window[:-1], share(window[1:])
    bytes_before = torch.stack([F.pad(tokens, (distance, 0))[: len(tokens)] for distance in range(4)], dim=1)
    x = model.embedding(share(bytes_before)[None]).flatten(2)
    rotation = rotary_angles(share(torch.arange(len(tokens))), model.head_dim)
    for layer in model.layers:
        x = layer(x, rotation, attention, tokens_before)
    return F.cross_entropy(model.logits(model.norm(x))[0], targets, reduction="sum")


class OverProcesses:
    """This process's part of a sequence, and what reaches into the others'."""

    def __init__(self, dim: int) -> None:
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
        self.method = METHODS[0]
        # Taps of a convolution that is a shift by one token: key + (1 * the one before - 1 * key).
        self.shift = torch.tensor([1.0, -1.0]).expand(1, dim, 2).contiguous()

    def share(self, tokens: Tensor) -> Tensor:
        """Those of this process, along dimension 0."""
        return tgd.shard_sequence(tokens, self.mesh, 0, PLACEMENT)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tgd.moba_attention(
            query, key, value, self.mesh, BLOCK_SIZE, TOP_K, placement=PLACEMENT, method=self.method
        )

    def tokens_before(self, x: Tensor) -> Tensor:
        """``[B, n, dim]`` of the tokens before these."""
        return tgd.key_conv(x[:, None], self.shift, self.mesh, placement=PLACEMENT, activation=None)[:, 0]


# --------------------------------------------------------------------------------------------------- training


class Trainer:
    """A fresh model and its optimizers, the same wherever it is made."""

    def __init__(self, num_steps: int) -> None:
        torch.manual_seed(SEED)
        self.model = ByteLanguageModel()
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not matrix for matrix in matrices)]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
            torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, num_steps))
            for optimizer in self.optimizers
        ]

    def step(self, loss: Tensor, *, is_shared: bool) -> float:
        """Take a step down ``loss``, of which each process has a part where ``is_shared``; returns the whole."""
        self.model.zero_grad()
        loss.backward()
        whole = loss.detach()
        if is_shared:
            dist.all_reduce(whole)
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return whole.item()


def windows_of(text: Tensor, context: int, num_steps: int) -> list[Tensor]:
    order = torch.Generator().manual_seed(SEED)
    starts = torch.randint(len(text) - context, (num_steps,), generator=order).tolist()
    return [text[start : start + context + 1] for start in starts]


def train(name: str, num_steps: int, loss_of_step: Callable[[int, Trainer], float]) -> tuple[list[float], float]:
    """Losses of all steps and the seconds they took; a bar on process 0."""
    trainer, losses = Trainer(num_steps), []
    columns = [TextColumn(f"{name:<12}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    began = time.perf_counter()
    with Progress(*columns, loss_column, console=console, disable=dist.get_rank() != 0) as progress:
        bar = progress.add_task(name, total=num_steps, loss=math.nan)
        for step in range(num_steps):
            losses.append(loss_of_step(step, trainer))
            progress.update(bar, advance=1, loss=losses[-1])
    return losses, time.perf_counter() - began


def run(context: int, num_steps: int) -> bool:
    """Train over the processes and, on the first, alone; whether the losses are the same."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    windows = windows_of(load_text()[0], context, num_steps)
    over = OverProcesses(dim=128)
    sent = dict.fromkeys(METHODS, 0)

    def shared_step(step: int, trainer: Trainer) -> float:
        over.method = METHODS[step % 2]
        with tgd.count_bytes() as counts:
            loss = summed_loss(trainer.model, windows[step], over.attention, over.tokens_before, over.share)
            whole = trainer.step(loss / context, is_shared=True)
        sent[over.method] += sum(counts.values())
        return whole

    def step_alone(step: int, trainer: Trainer) -> float:
        return trainer.step(summed_loss(trainer.model, windows[step], moba_attention) / context, is_shared=False)

    losses, seconds = train(f"{num_ranks} processes", num_steps, shared_step)
    of_all = torch.tensor([sent[method] for method in METHODS], dtype=torch.float64)
    dist.all_reduce(of_all)
    is_right = True
    if rank == 0:
        # The others wait in the barrier, so that this one has the machine for itself.
        losses_alone, seconds_alone = train("1 process", num_steps, step_alone)
        apart = max(abs(one - other) / other for one, other in zip(losses, losses_alone, strict=True))
        is_right = apart < 1e-2 and losses[-1] < losses[0]
        print_tables(context, num_steps, of_all.tolist(), (losses, seconds), (losses_alone, seconds_alone))
        console.print(f"losses differ by at most {apart:.1e} of their size")
    answer = torch.tensor(float(is_right))
    dist.broadcast(answer, 0)
    return bool(answer)


def print_tables(
    context: int,
    num_steps: int,
    sent: list[float],
    over: tuple[list[float], float],
    alone: tuple[list[float], float],
) -> None:
    num_ranks = dist.get_world_size()
    table = Table("training", title=f"a context of {context} tokens, {num_steps} steps")
    for heading in ("tokens of each", "first loss", "last loss", "seconds"):
        table.add_column(heading, justify="right")
    for name, count, (losses, seconds) in ((f"{num_ranks} processes", num_ranks, over), ("1 process", 1, alone)):
        table.add_row(name, str(context // count), f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{seconds:.1f}")
    console.print(table)
    plan = tgd.plan(
        context, num_ranks, 4, 32, block_size=BLOCK_SIZE, top_k=TOP_K, dtype=torch.float32, placement=PLACEMENT
    )
    table = Table("way", title="bytes sent a token, in two layers, forward and backward")
    table.add_column("counted", justify="right")
    table.add_column("by the plan", justify="right")
    for index, method in enumerate(METHODS):
        num_tokens = context * len(range(index, num_steps, 2))
        planned = 2 * getattr(plan, method).num_bytes * num_ranks / context
        mark = "at most " if method == "exchange" else ""
        table.add_row(method, f"{sent[index] / num_tokens:,.0f}", f"{mark}{planned:,.0f}")
    console.print(table)


# ------------------------------------------------------------------------------------------------- processes


def of_process(rank: int, num_ranks: int, port: int, context: int, num_steps: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }
    run_in_group(context, num_steps)


def run_in_group(context: int, num_steps: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    is_right = run(context, num_steps)
    dist.destroy_process_group()
    # As in sharded_memory.py: gloo's threads outlive the group, and may abort a process that shuts down.
    sys.stdout.flush()
    os._exit(0 if is_right else 1)


def free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(store.port)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096, help="tokens of all processes (default: 4096)")
    parser.add_argument("--steps", type=int, default=12, help="training steps (default: 12)")
    parser.add_argument("--processes", type=int, default=4, help="where torchrun starts none (default: 4)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_in_group(arguments.context, arguments.steps)
    port = free_port()
    context = multiprocessing.get_context("spawn")
    given = (arguments.processes, port, arguments.context, arguments.steps)
    processes = [context.Process(target=of_process, args=(rank, *given)) for rank in range(arguments.processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(process.exitcode or 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main())
