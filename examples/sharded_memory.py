"""Train a memory layer whose table is sharded over two processes, and compare with one process.

The task is to learn random facts by heart: which of 16 answers belongs to each of 1024 random questions. A memory
layer (Memory Layers at Scale, arXiv 2412.09764) looks the answers up in a table of 4096 rows. Each process holds half
of the table's columns and trains on half of the questions; all other parameters are sharded by ``fully_shard``, which
averages their gradients over the processes.

    torchrun --nproc-per-node 2 examples/sharded_memory.py

Any number of processes will do. Process 0 also trains the same model alone on all questions. The sharded model is then
saved with ``torch.distributed.checkpoint`` and loaded into a new sharded one and into one that is in a single process.
It prints a table, and exits with status 1 if the losses of the two trainings or the loaded models differ. Needs a torch
whose ``fully_shard`` takes ``ignored_params``; topgather itself does not.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import topgather as tg
from topgather.distributed import MemoryColwise

NUM_QUESTIONS = 1024
NUM_ANSWERS = 16
DIM = 32
NUM_KEYS = 64
VALUE_DIM = 64
SEED = 0


class Model(nn.Module):
    """Questions ``[T, DIM]`` to scores of answers ``[T, NUM_ANSWERS]``."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = tg.nn.MemoryPool(NUM_KEYS, VALUE_DIM)
        self.memory = tg.nn.ProductKeyMemory(DIM, self.pool, num_heads=2, top_k=8, key_dim=32)
        self.norm = nn.RMSNorm(DIM)
        self.answers = nn.Linear(DIM, NUM_ANSWERS)

    def forward(self, questions: Tensor) -> Tensor:
        return self.answers(self.norm(self.memory(questions)))


def make_model(seed: int, device: str) -> Model:
    torch.manual_seed(seed)
    return Model().to(device)


def shard(model: Model, mesh: DeviceMesh) -> Model:
    """The table by columns, everything else as FSDP2 does."""
    parallelize_module(model, mesh, {"pool": MemoryColwise(equal_token_counts=True)})
    fully_shard(model, mesh=mesh, ignored_params={model.pool.values})
    return model


def train(model: Model, questions: Tensor, answers: Tensor, num_steps: int, num_ranks: int) -> list[float]:
    """Losses of each step, on all the questions that this process has."""
    groups = tg.nn.memory_parameter_groups(model, lr=3e-3, values_lr=3e-2)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(num_steps):
        loss = F.cross_entropy(model(questions), answers)
        optimizer.zero_grad()
        loss.backward()
        # Other gradients are means over the processes, the table's is a sum.
        model.pool.values.grad.div_(num_ranks)
        optimizer.step()
        losses.append(loss.item())
    return losses


def mean_of_ranks(numbers: list[float]) -> list[float]:
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def is_true_everywhere(answer: bool) -> bool:
    """Whether it is so on every rank."""
    return mean_of_ranks([float(answer)]) == [1.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    arguments = parser.parse_args()

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.device_count() >= num_ranks else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    if NUM_QUESTIONS % num_ranks != 0:
        parser.error(f"the number of processes must divide {NUM_QUESTIONS}, got {num_ranks}")
    mesh = init_device_mesh(device, (num_ranks,), mesh_dim_names=("memory",))

    torch.manual_seed(SEED)
    questions = torch.randn(NUM_QUESTIONS, DIM).to(device)
    answers = torch.randint(NUM_ANSWERS, (NUM_QUESTIONS,)).to(device)
    own_questions, own_answers = questions.chunk(num_ranks)[rank], answers.chunk(num_ranks)[rank]

    model = shard(make_model(SEED, device), mesh)
    start = time.perf_counter()
    losses = mean_of_ranks(train(model, own_questions, own_answers, arguments.steps, num_ranks))
    seconds = time.perf_counter() - start

    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) if rank == 0 else ""]
        dist.broadcast_object_list(folders, src=0)
        folder = Path(folders[0])
        checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
        loaded = shard(make_model(SEED + 1, device), mesh)
        state = get_model_state_dict(loaded)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(loaded, state)
        with torch.no_grad():
            scores, scores_loaded = model(own_questions), loaded(own_questions)
        is_loaded = is_true_everywhere(torch.equal(scores, scores_loaded))
        is_right = is_loaded
        if rank == 0:
            is_right = report(model, losses, seconds, is_loaded, folder, questions, answers, scores)
        is_right = is_true_everywhere(is_right)
    dist.destroy_process_group()
    # DTensor's caches keep the mesh, and with it gloo's threads, to the end of the process. A thread that lets go of
    # the last collective's tensor while Python shuts down aborts the process, so Python does not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if is_right else 1)


def report(
    model: Model,
    losses: list[float],
    seconds: float,
    is_loaded: bool,
    folder: Path,
    questions: Tensor,
    answers: Tensor,
    scores: Tensor,
) -> bool:
    """Train alone and load the checkpoint alone; print what came out, and return whether all is as it should be."""
    alone = make_model(SEED, questions.device.type)
    start = time.perf_counter()
    losses_alone = train(alone, questions, answers, len(losses), 1)
    seconds_alone = time.perf_counter() - start

    from_checkpoint = make_model(SEED + 2, questions.device.type)
    state = from_checkpoint.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    from_checkpoint.load_state_dict(state)
    with torch.no_grad():
        difference = (from_checkpoint(questions[: len(scores)]) - scores).abs().max().item()
    is_loaded_alone = difference < 1e-4

    apart = max(abs(one - other) / other for one, other in zip(losses, losses_alone, strict=True))
    rows = (
        (f"{dist.get_world_size()} processes", model.pool.values.to_local().nbytes, losses, seconds),
        ("1 process", alone.pool.values.nbytes, losses_alone, seconds_alone),
    )
    print(f"{NUM_QUESTIONS} facts, a table of {NUM_KEYS**2} x {VALUE_DIM}, {len(losses)} steps")
    print(f"{'training':<14}{'table of each':>14}{'first loss':>12}{'last loss':>12}{'seconds':>9}")
    for name, num_bytes, own_losses, own_seconds in rows:
        size = f"{num_bytes / 2**10:.0f} KiB"
        print(f"{name:<14}{size:>14}{own_losses[0]:>12.5f}{own_losses[-1]:>12.5f}{own_seconds:>9.1f}")
    print(f"losses differ by at most {apart:.1e} of their size")
    print(f"checkpoint loaded into {rows[0][0]}: {'equal' if is_loaded else 'DIFFERENT'}")
    print(f"checkpoint loaded into 1 process: {'equal' if is_loaded_alone else 'DIFFERENT'}")
    return apart < 1e-2 and losses[-1] < losses[0] and is_loaded and is_loaded_alone


if __name__ == "__main__":
    main()
