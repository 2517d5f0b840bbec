"""How often the block that holds a needle is chosen: the routing law of FlashMoBA (arXiv 2511.11571).

docs/block-attention.md states it and what it does not cover.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .._common import checks

# Means of docs/block-attention.md and examples/routing_snr.py.
SIGNAL = 0.5
CLUSTER = 0.3


@dataclass(frozen=True)
class Needle:
    """What a query looks for: a few keys of one block that belong to it, among keys that do not.

    Dot products of random unit vectors of dimension d have a variance of 1/d, and a mean of 0. Those with the needle's
    first key have a mean of ``signal``, those with its other keys one of ``cluster``.

    Args:
        num_tokens: keys of the needle, at least 1.
        signal: mean dot product with its first key.
        cluster: mean dot product with its other keys.

    Raises:
        TypeError: ``num_tokens`` is not an int.
        ValueError: ``num_tokens`` is below 1.
    """

    num_tokens: int = 4
    signal: float = SIGNAL
    cluster: float = CLUSTER

    def __post_init__(self) -> None:
        checks.check_count("num_tokens", self.num_tokens)

    def signal_to_noise(self, head_dim: int, block_size: int) -> float:
        """``SNR`` of the law: of two blocks the wrong one scores higher with probability ``Phi(-SNR)``.

        Args:
            head_dim: channels of a head.
            block_size: keys per block.
        """
        num_tokens = min(self.num_tokens, block_size)
        effective = self.signal + (num_tokens - 1) * self.cluster
        return effective * math.sqrt(head_dim / (2 * block_size))

    def recall(self, seq_len: int, head_dim: int, block_size: int, top_k: int) -> float:
        """Probability with which the last query of a causal sequence chooses the needle's block.

        The needle stands in a block before the query's own, which takes one of ``top_k``. Given the score x of its
        block, in standard deviations, each other block beats it with ``Phi(-x)``; the block is chosen where fewer than
        ``top_k - 1`` do. That is integrated over x.

        Args:
            seq_len: tokens of the sequence.
            head_dim: channels of a head.
            block_size: keys per block.
            top_k: blocks per query, the own one included.
        """
        num_others = -(-seq_len // block_size) - 2  # neither the own block nor the needle's
        if num_others < 0 or top_k - 1 > num_others:
            return 1.0
        if top_k == 1:
            return 0.0
        shift = math.sqrt(2) * self.signal_to_noise(head_dim, block_size)
        x = torch.linspace(-9, 9, 601, dtype=torch.float64, device="cpu")
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        beats = torch.special.ndtr(-(x + shift)).clamp(1e-300, 1 - 1e-16)[:, None]
        count = torch.arange(top_k - 1, dtype=torch.float64, device="cpu")
        ways = math.lgamma(num_others + 1) - torch.lgamma(count + 1) - torch.lgamma(num_others - count + 1)
        terms = (ways + count * beats.log() + (num_others - count) * torch.log1p(-beats)).exp()
        return min(1.0, float(torch.trapezoid(density * terms.sum(1), x)))
