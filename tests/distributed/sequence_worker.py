"""What the ranks of ``test_sequence.py`` run: every case on four processes, results left in a folder.

    python -m tests.distributed.sequence_worker FOLDER

Rank r leaves ``FOLDER/rank{r}.pt``, a dict from the name of a case to its results by name. Cases of two ranks run on
0, 1 and on 2, 3 alike, those of one on each.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import Tensor

from tests.common.tensors import random_tensor
from topgather._distributed import collectives, exchange
from topgather._distributed.plan import METHODS
from topgather.distributed import count_bytes, moba_attention, shard_sequence

WORLD_SIZE = 4
TENSORS = ("query", "key", "value")


@dataclass(frozen=True)
class SequenceCase:
    """A problem, and how its tokens are spread."""

    num_ranks: int = 4
    num_tokens: int = 90
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 6
    dtype: torch.dtype = torch.float64
    placement: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    """Tokens of each rank, where they are not those of ``shard_sequence``."""
    cu_seqlens: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    has_sinks: bool = False
    is_transposed: bool = False
    """Whether tokens come before heads in memory, as projections give them."""

    @property
    def tokens_dim(self) -> int:
        """Of queries, keys, values and outputs."""
        return 2 if self.cu_seqlens is None else 0

    def problem(self) -> dict[str, Tensor]:
        """All tokens' tensors and the gradient of the output, and of lse."""
        heads = {"query": self.num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
        dims = {"query": self.head_dim, "key": self.head_dim, "value": self.value_dim}
        heads |= {"grad_out": self.num_heads}
        dims |= {"grad_out": self.value_dim}
        made = {}
        for seed, name in enumerate(heads):
            if self.cu_seqlens is not None:
                shape: tuple[int, ...] = (self.num_tokens, heads[name], dims[name])
            else:
                shape = (2, heads[name], self.num_tokens, dims[name])
            made[name] = random_tensor(shape, self.dtype, torch.device("cpu"), seed)
        rows = (
            (self.num_heads, self.num_tokens) if self.cu_seqlens is not None else (2, self.num_heads, self.num_tokens)
        )
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        made["grad_lse"] = random_tensor(rows, lse_dtype, torch.device("cpu"), 9)
        if self.has_sinks:
            made["sinks"] = random_tensor((self.num_heads,), lse_dtype, torch.device("cpu"), 10)
        return made

    def arguments(self) -> dict[str, Any]:
        return {"block_size": 8, "top_k": 3, **self.options}

    def local(self, tensor: Tensor, group: Any, rank: int, dim: int) -> Tensor:
        if self.lengths is not None:
            return tensor.split(self.lengths, dim)[rank].contiguous()
        return shard_sequence(tensor, group, dim, self.placement)


CASES = {
    "alone": SequenceCase(1),
    "pair": SequenceCase(2),
    "four": SequenceCase(),
    "four_zigzag": SequenceCase(placement="zigzag"),
    "pair_zigzag": SequenceCase(2, num_tokens=31, placement="zigzag"),
    "not_causal": SequenceCase(options={"is_causal": False}),
    "not_causal_zigzag": SequenceCase(placement="zigzag", options={"is_causal": False}),
    "every_block": SequenceCase(options={"top_k": None}),
    "uneven": SequenceCase(lengths=(7, 0, 60, 23)),
    "fewer_tokens_than_ranks": SequenceCase(num_tokens=3),
    "fewer_tokens_than_ranks_zigzag": SequenceCase(num_tokens=3, placement="zigzag"),
    "no_tokens": SequenceCase(2, num_tokens=0),
    "a_head_at_a_time": SequenceCase(options={"max_gathered_bytes": 1}),
    "large_blocks": SequenceCase(options={"block_size": 40, "top_k": 2}),
    "scaled_and_capped": SequenceCase(2, options={"scale": 0.7, "softcap": 1.5}),
    "sinks": SequenceCase(has_sinks=True),
    "sinks_packed": SequenceCase(has_sinks=True, cu_seqlens=(0, 50, 90)),
    "packed": SequenceCase(cu_seqlens=(0, 10, 10, 45, 90)),
    "packed_zigzag": SequenceCase(placement="zigzag", cu_seqlens=(0, 20, 33, 90)),
    "packed_not_causal": SequenceCase(cu_seqlens=(0, 20, 33, 90), options={"is_causal": False}),
    "packed_on_edges": SequenceCase(num_tokens=96, cu_seqlens=(0, 24, 48, 96)),
    "packed_a_head_at_a_time": SequenceCase(2, cu_seqlens=(0, 20, 90), options={"max_gathered_bytes": 1}),
    "transposed": SequenceCase(2, is_transposed=True),
    "float32": SequenceCase(dtype=torch.float32, num_tokens=200, placement="zigzag"),
    "bfloat16": SequenceCase(dtype=torch.bfloat16, num_tokens=200, placement="zigzag"),
    "float16": SequenceCase(2, dtype=torch.float16),
}
Results = dict[str, Any]


def run(case: SequenceCase, group: Any, **changed: Any) -> Results:
    """Results and gradients of this rank's tokens."""
    rank, whole = dist.get_rank(group), case.problem()
    row_dim = 1 if case.cu_seqlens is not None else 2
    local = {name: case.local(whole[name], group, rank, case.tokens_dim) for name in (*TENSORS, "grad_out")}
    if case.is_transposed:
        local = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in local.items()}
    local["grad_lse"] = case.local(whole["grad_lse"], group, rank, row_dim)
    leaves = {name: local[name].requires_grad_() for name in TENSORS}
    if case.has_sinks:
        leaves["sinks"] = whole["sinks"].requires_grad_()
    given = {**case.arguments(), "placement": case.placement, **changed}
    if case.cu_seqlens is not None:
        given["cu_seqlens"] = torch.tensor(case.cu_seqlens)
    tensors = (leaves[name] for name in TENSORS)
    out, lse = moba_attention(*tensors, group, return_lse=True, sinks=leaves.get("sinks"), **given)
    finite = lse.isfinite()
    loss = (out * local["grad_out"]).sum() + (lse[finite] * local["grad_lse"][finite]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert out.stride(-1) == 1
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        "layout": out.stride(1) < out.stride(2) if out.dim() == 4 and out.size(2) > 1 else None,
        **{f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
    }


@contextmanager
def counted_bytes(counts: dict[str, int], num_ranks: int) -> Iterator[None]:
    """Adds up what this rank sends, agreements by themselves, and notes the most that it receives at a time."""
    gather, exchange = collectives._all_gather, dist.all_to_all_single

    def counting_gather(received: Tensor, sent: Tensor, **options: Any) -> Any:
        counts["most at a time"] = max(counts.get("most at a time", 0), received.nbytes)
        if sent.dtype == torch.int64:
            counts["agreements"] = counts.get("agreements", 0) + sent.numel() * 8 * (num_ranks - 1)
        else:
            counts["gather"] = counts.get("gather", 0) + sent.numel() * sent.element_size() * (num_ranks - 1)
        return gather(received, sent, **options)

    def counting_exchange(received: Tensor, sent: Tensor, received_sizes: Any, sent_sizes: Any, group: Any) -> Any:
        rank = dist.get_rank(group)
        counts["most at a time"] = max(counts.get("most at a time", 0), received.nbytes)
        numbers = sum(size for other, size in enumerate(sent_sizes) if other != rank)
        counts["exchange"] = counts.get("exchange", 0) + numbers * sent.element_size()
        return exchange(received, sent, received_sizes, sent_sizes, group=group)

    collectives._all_gather, dist.all_to_all_single = counting_gather, counting_exchange
    try:
        yield
    finally:
        collectives._all_gather, dist.all_to_all_single = gather, exchange


def refused(group: Any, query: Any = None, num_tokens: int = 6, **changed: Any) -> str:
    """What a call with these arguments raised, as its type and words."""
    tensor = torch.zeros(1, 2, num_tokens, 4)
    try:
        moba_attention(tensor if query is None else query, tensor, tensor, group, **{"block_size": 4, **changed})
    except (TypeError, ValueError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def refusals(group: Any) -> dict[str, str]:
    """Ranks that differ, and ranks of which one alone is wrong."""
    rank = dist.get_rank(group)
    is_last = rank == 3
    return {
        "block_size": refused(group, block_size=8 if is_last else 4),
        "is_causal": refused(group, is_causal=not is_last),
        "softcap": refused(group, softcap=2.0 if is_last else None),
        "method": refused(group, method="exchange" if is_last else None),
        "no method": refused(group, method="ring"),
        "one rank's dtype": refused(group, query=torch.zeros(1, 2, 6, 4, dtype=torch.int32) if is_last else None),
        "one rank's top_k": refused(group, top_k=0 if is_last else 2),
        "a tensor": refused(group, query=[1.0] if is_last else None),
        "zigzag": refused(group, placement="zigzag", num_tokens=10 if is_last else 6),
        "placement": refused(group, placement="striped"),
        "cu_seqlens": refused_packed(group),
        "fine": refused(group),
    }


def refused_packed(group: Any) -> str:
    tensor = torch.zeros(6, 2, 4)
    try:
        moba_attention(tensor, tensor, tensor, group, block_size=4, cu_seqlens=torch.tensor([0, 23]))
    except ValueError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def without_a_gradient_of_its_own(group: Any, method: str) -> Results:
    """A rank whose loss has no part of the output still sends what others wait for."""
    case = SequenceCase()
    whole = case.problem()
    leaves = [case.local(whole[name], group, dist.get_rank(group), 2).requires_grad_() for name in TENSORS]
    out = moba_attention(*leaves, group, method=method, **case.arguments())
    loss = out.sum() * (0.0 if dist.get_rank(group) == 1 else 1.0)
    return dict(zip((f"grad_{name}" for name in TENSORS), torch.autograd.grad(loss, leaves), strict=True))


def beside_a_rank_that_dies(group: Any) -> str:
    """What the first rank of a pair raises when the second one is gone in the middle of a call."""
    tensor = torch.zeros(1, 2, 6, 4)
    if dist.get_rank(group) == 1:
        exchange.choose = lambda *arguments, **options: os._exit(0)  # type: ignore[assignment]
    try:
        moba_attention(tensor, tensor, tensor, group, block_size=4, method="exchange")
    except RuntimeError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def all_cases(group_of: dict[int, Any]) -> Results:
    results: Results = {}
    for name, case in CASES.items():
        group = group_of[case.num_ranks]
        for method in METHODS:
            counts: dict[str, int] = {}
            with counted_bytes(counts, case.num_ranks), count_bytes() as public:
                results[name, method] = run(case, group, method=method)
            results[name, method]["bytes"], results[name, method]["public"] = counts, public
    results["refusals"] = refusals(group_of[4])
    case = CASES["four"]
    whole = case.problem()
    local = [case.local(whole[name], group_of[4], dist.get_rank(), 2) for name in TENSORS]
    for method in METHODS:
        results["again", method] = run(CASES["float32"], group_of[4], method=method)
        results["no gradient of its own", method] = without_a_gradient_of_its_own(group_of[4], method)
        with torch.no_grad():
            results["no gradient", method] = moba_attention(*local, group_of[4], method=method, **case.arguments())
    return results


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    group_of: dict[int, Any] = {WORLD_SIZE: dist.group.WORLD}
    for size in (1, 2):
        for first in range(0, WORLD_SIZE, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                group_of[size] = group
    try:
        results = all_cases(group_of)
        torch.save(results, folder / f"rank{rank}.pt")
        results["died"] = beside_a_rank_that_dies(group_of[2])
    except Exception:
        results = {"failed": traceback.format_exc()}
    torch.save(results, folder / f"rank{rank}.pt")
    os._exit(0)  # torch would wait for those that died


def main() -> None:
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
        process.kill()


if __name__ == "__main__":
    main()
