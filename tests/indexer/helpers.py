"""What the tests of the indexer share: problems, inputs, checks against the oracle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import Case, integer_tensor, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference


@dataclass(frozen=True)
class IndexCase(Case):
    """A problem size, of the indexer and, for the loss, of the attention it serves."""

    batch: int = 1
    num_index_heads: int = 2
    num_key_heads: int = 1
    query_len: int = 100
    key_len: int | None = None
    dim: int = 16
    block_size: int = 8
    top_k: int = 4
    reduction: str = "max"
    is_causal: bool = True
    force_first: int = 0
    force_last: int = 1
    num_choices: int | None = None
    has_weights: bool = False
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8

    @property
    def keys(self) -> int:
        """Tokens of the keys."""
        return self.query_len if self.key_len is None else self.key_len

    def scores(self) -> dict[str, Any]:
        """Options of a block's score, by argument."""
        return {"reduction": self.reduction, "is_causal": self.is_causal, "num_choices": self.num_choices}

    def route(self) -> dict[str, Any]:
        """Options of the choice, by argument."""
        forced = {"force_first": self.force_first, "force_last": self.force_last}
        return {"block_size": self.block_size, "top_k": self.top_k, **self.scores(), **forced}


def make_index(
    case: IndexCase, dtype: torch.dtype, device: torch.device, seed: int = 0, is_integer: bool = False
) -> dict[str, Tensor]:
    """Queries and keys of the indexer, and its weights where the case has some."""
    draw = integer_tensor if is_integer else random_tensor
    shape = (case.batch, case.num_index_heads, case.query_len, case.dim)
    made = {"index_query": draw(shape, dtype, device, 8 * seed)}
    made["index_key"] = draw((case.batch, case.num_key_heads, case.keys, case.dim), dtype, device, 8 * seed + 1)
    if case.has_weights:
        made["weights"] = draw(shape[:3], accumulation_dtype(dtype), device, 8 * seed + 2)
    return made


def make_attention(case: IndexCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Queries and keys of the attention, with values of one column."""
    query = random_tensor((case.batch, case.num_heads, case.query_len, case.head_dim), dtype, device, 8 * seed + 3)
    shape = (case.batch, case.num_kv_heads, case.keys, case.head_dim)
    return {"query": query, "key": random_tensor(shape, dtype, device, 8 * seed + 4)}


def assert_contract(block_indices: Tensor, inputs: dict[str, Tensor], case: IndexCase) -> None:
    """Membership up to rounding, and everything else exactly: forced blocks, order, padding, visibility."""
    on_cpu = {name: tensor.detach().cpu() for name, tensor in inputs.items()}
    chosen = block_indices.cpu()
    scores, sees = reference.index_scores(
        on_cpu["index_query"], on_cpu["index_key"], case.block_size, **case.scores(), weights=on_cpu.get("weights")
    )
    num_blocks = scores.shape[-1]
    assert chosen.dtype == torch.int32 and chosen.is_contiguous()
    assert chosen.shape == (*scores.shape[:3], case.top_k)
    used = chosen >= 0
    assert (used[..., :-1] | ~used[..., 1:]).all(), "a used slot follows an unused one"
    assert ((chosen[..., 1:] > chosen[..., :-1]) | ~used[..., 1:]).all(), "numbers do not ascend"
    visible = sees.sum(-1) if num_blocks else torch.zeros(case.query_len, dtype=torch.long)
    assert (used.sum(-1) == visible.clamp(max=case.top_k)).all(), "not as many blocks as are there"
    if num_blocks == 0:
        return
    slots = torch.where(used, chosen, num_blocks).long()
    is_chosen = torch.zeros(*scores.shape[:3], num_blocks + 1, dtype=torch.bool).scatter(-1, slots, True)
    is_chosen = is_chosen[..., :num_blocks]
    assert not (is_chosen & ~sees).any(), "a block that the query does not see"
    blocks = torch.arange(num_blocks)
    is_forced = (blocks < case.force_first) | (blocks >= (visible - case.force_last * case.is_causal)[:, None])
    is_forced = is_forced & sees
    assert (is_chosen | ~is_forced).all(), "a forced block is missing"
    is_free = (sees & ~is_forced).expand_as(scores)
    worst = torch.where(is_free & is_chosen, scores, torch.inf).amin(-1)
    best = torch.where(is_free & ~is_chosen, scores, -torch.inf).amax(-1)
    margin = TOLERANCES["index_scores", "forward"].relative(block_indices_dtype(inputs), length_of(case))
    size = magnitudes(on_cpu, case)
    wrong = best > worst + margin * size
    assert not wrong.any(), f"a better block is left out at {tuple(wrong.nonzero()[0].tolist())}"


def block_indices_dtype(inputs: dict[str, Tensor]) -> torch.dtype:
    """The dtype that scores were made of."""
    return inputs["index_query"].dtype


def length_of(case: IndexCase) -> int:
    """Terms of the longest sum behind a score."""
    heads = case.num_index_heads // (case.num_choices or case.num_index_heads)
    return case.dim if case.reduction == "max" else case.dim * case.block_size * heads


def magnitudes(inputs: dict[str, Tensor], case: IndexCase) -> float:
    """At least every sum of the sizes of a score's terms."""
    size = 1.0
    for name in ("index_query", "index_key"):
        norms = inputs[name].double().square().sum(-1).sqrt()
        size *= float(norms.max()) if norms.numel() else 0.0
    if case.reduction == "relu_sum":
        size *= case.block_size * case.num_index_heads
        size *= max(1.0, float(inputs["weights"].abs().amax())) if case.has_weights else 1.0
    return size


def check_route(case: IndexCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
    """Random scores: the contract; scores of small integers, which are exact: the reference's choice itself."""
    inputs = make_index(case, dtype, device, seed)
    assert_contract(tg.index_route(**inputs, **case.route()).block_indices, inputs, case)
    inputs = make_index(case, dtype, device, seed, is_integer=True)
    chosen = tg.index_route(**inputs, **case.route()).block_indices
    expected = reference.index_route(**inputs, **case.route())
    wrong = (chosen.cpu() != expected.cpu()).any(-1)
    assert not wrong.any(), f"choice: differs from the reference at {tuple(wrong.nonzero()[0].tolist())}"
