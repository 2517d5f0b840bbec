"""The router follows the statistical law of block choice (FlashMoBA, arXiv 2511.11571).

Of two blocks of B keys whose dot products with a query are independent normal with variance 1/d, the one in which m
keys' means are larger by delta scores lower with probability ``Phi(-SNR)``, ``SNR = m * delta * sqrt(d / (2 * B))``.
``examples/routing_snr.py`` draws the whole picture.
"""

import math

import pytest
import torch

import topgather as tg

# A right router is further out for one seed in two million, and the seeds are fixed. Of 16,384 choices with failures
# of 0.31 and 0.24, 5 standard errors are 0.018 and 0.017: an SNR that is an eighth too large or too small is outside.
MOST_STANDARD_ERRORS = 5.0
NUM_QUERIES = 32


@pytest.mark.parametrize(("block_size", "num_planted"), [(32, 1), (64, 2)])
def test_pairs_of_blocks_are_confused_as_often_as_the_law_says(
    block_size: int, num_planted: int, device: torch.device
) -> None:
    head_dim, delta, num_sets = 64, 0.5, 512
    draw = torch.Generator().manual_seed(block_size)
    # Orthogonal queries see independent parts of the noise, and nothing of what is planted for one another.
    query = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=draw)).Q[:NUM_QUERIES].contiguous()
    key = torch.randn(num_sets, 2 * block_size, head_dim, generator=draw) * head_dim**-0.5
    number = torch.arange(NUM_QUERIES)
    own_block = number % 2
    for i in range(num_planted):
        key[:, own_block * block_size + number // 2 * num_planted + i] += delta * query

    query = query.expand(num_sets, 1, -1, -1).contiguous().to(device)
    chosen = tg.moba_route(query, key[:, None].to(device), block_size, top_k=1, is_causal=False).block_indices
    num_trials = num_sets * NUM_QUERIES
    measured = (chosen.cpu()[:, 0, :, 0] != own_block).sum().item() / num_trials

    snr = num_planted * delta * math.sqrt(head_dim / (2 * block_size))
    predicted = 0.5 * math.erfc(snr / math.sqrt(2))
    standard_error = math.sqrt(predicted * (1 - predicted) / num_trials)
    assert abs(measured - predicted) < MOST_STANDARD_ERRORS * standard_error, (measured, predicted)
