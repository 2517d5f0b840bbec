"""An indexer learns to find blocks that mean keys miss.

    python examples/trained_indexer.py    # under a minute on two cores

Every sequence has eight needles: single keys in blocks of 16 whose other keys point the other way. Later queries each
ask for one of them, and attention gives almost all of its weight to that key. The mean key of its block says the
opposite, so a choice by mean keys leaves the block out. A small indexer, two projections to 16 channels, is trained by
``tg.index_loss`` alone: first on the mass of dense attention in all blocks (the warm-up), then on that of sparse
attention in the blocks that it chose itself (MiniMax Sparse Attention, arXiv 2606.13392). New sequences are drawn in
every step and for the table:

    found    queries whose needle's block is among their 4 of up to 32
    error    of the output of sparse attention against dense attention, relative
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import topgather as tg

NUM_TOKENS, BLOCK_SIZE, TOP_K = 512, 16, 4
NUM_NEEDLES, DIM, INDEX_DIM = 8, 16, 16


@dataclass
class Sequences:
    """Some sequences: what the layer sees, and what attention makes of it."""

    x: Tensor  # [B, N, 2 * DIM]: what a token is asked by, and what it asks for
    query: Tensor  # [B, 1, N, DIM]
    key: Tensor
    value: Tensor
    asked: Tensor  # [B, N]: block of the needle that a query asks for, -1 where it asks for none


def draw(batch: int, generator: torch.Generator) -> Sequences:
    """Needles in the first half, queries that ask for them in the second."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    half, blocks = NUM_TOKENS // 2, NUM_TOKENS // 2 // BLOCK_SIZE
    rows = torch.arange(batch)[:, None]
    keys, wanted = 0.3 * randn(batch, NUM_TOKENS, DIM), 0.3 * randn(batch, NUM_TOKENS, DIM)
    addresses = nn.functional.normalize(randn(batch, NUM_NEEDLES, DIM), dim=-1)
    block = torch.rand(batch, blocks, generator=generator).argsort(-1)[:, :NUM_NEEDLES]
    place = block * BLOCK_SIZE + torch.randint(BLOCK_SIZE, block.shape, generator=generator)
    for offset in range(BLOCK_SIZE):
        keys[rows, block * BLOCK_SIZE + offset] -= 0.5 * addresses
    keys[rows, place] = 2 * addresses
    number = torch.randint(NUM_NEEDLES, (batch, half), generator=generator)
    wanted[:, half:] = 2 * addresses[rows, number]
    asked = torch.cat([torch.full((batch, half), -1), block[rows, number]], dim=1)
    x = torch.cat([keys, wanted], dim=-1)
    return Sequences(x, 2 * wanted[:, None], 2 * keys[:, None], randn(batch, 1, NUM_TOKENS, DIM), asked)


class Indexer(nn.Module):
    """Index queries and keys of a token, one head each."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(2 * DIM, INDEX_DIM, bias=False)
        self.key = nn.Linear(2 * DIM, INDEX_DIM, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(x)[:, None], self.key(x)[:, None]


def attend(data: Sequences, routing: tg.BlockRouting | None) -> tuple[Tensor, Tensor]:
    """Output and lse over the chosen blocks, or over all."""
    return tg.moba_attention(data.query, data.key, data.value, BLOCK_SIZE, scale=1.0, routing=routing, return_lse=True)


def step(indexer: Indexer, optimizer: torch.optim.Optimizer, data: Sequences, is_sparse: bool) -> float:
    index_query, index_key = indexer(data.x)
    routing = tg.index_route(index_query, index_key, BLOCK_SIZE, TOP_K) if is_sparse else None
    lse = attend(data, routing)[1]
    loss = tg.index_loss(index_query, index_key, data.query, data.key, lse, routing, BLOCK_SIZE, scale=1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def score(data: Sequences, routing: tg.BlockRouting) -> tuple[float, float]:
    """Share of needles whose block is chosen, and the relative error of the output, of the queries that ask."""
    asks = data.asked >= 0
    chosen = routing.block_indices[:, 0]
    found = (chosen == data.asked[..., None]).any(-1)[asks].float().mean()
    out, dense = (attend(data, each)[0][:, 0][asks] for each in (routing, None))
    return float(found), float((out - dense).norm() / dense.norm())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=80, help="of the warm-up, and as many of the sparse stage")
    num_steps = options.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    began = time.perf_counter()
    test = draw(8, torch.Generator().manual_seed(2))
    indexer = Indexer()
    optimizer = torch.optim.Adam(indexer.parameters(), lr=0.02)
    print(f"{NUM_TOKENS} tokens, {NUM_TOKENS // BLOCK_SIZE} blocks of {BLOCK_SIZE}, {TOP_K} chosen")
    print(f"{'the choice':<32}{'found':>8}{'error':>8}{'loss':>8}")

    def line(name: str, routing: tg.BlockRouting, loss: float | None = None) -> None:
        found, error = score(test, routing)
        print(f"{name:<32}{found:>8.1%}{error:>8.2f}{'' if loss is None else f'{loss:>8.3f}'}", flush=True)

    def by_indexer() -> tg.BlockRouting:
        with torch.no_grad():
            return tg.index_route(*indexer(test.x), BLOCK_SIZE, TOP_K)

    line("mean keys", tg.moba_route(test.query, test.key, BLOCK_SIZE, TOP_K))
    line("indexer, untrained", by_indexer())
    for name, is_sparse in (("indexer, after the warm-up", False), ("indexer, after the sparse stage", True)):
        loss = 0.0
        for _ in range(num_steps):
            loss = step(indexer, optimizer, draw(1, generator), is_sparse)
        line(name, by_indexer(), loss)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
