"""The one table of tolerances, by op, result and dtype, each with its reason.

An entry counts roundings. The bound it makes on an element is

    (storage * u(dtype) + accumulation * u(accumulation dtype) * sqrt(length) * score_factor) * magnitude

where u is the unit roundoff (half the machine epsilon) and ``magnitude`` is |reference| plus the root sum of
squares of the terms that make the element up (``helpers.attention_magnitudes``): independent rounding errors
add like a random walk, so cancellation between terms does not shrink them. ``length`` is the number of terms
in the longest accumulation, and ``score_factor`` is 1 + the largest |score|, because an error e in a score
multiplies its weight by 1 + e, and a score's own error is proportional to its size. Factors above the count
of roundings are the margin from one standard deviation to the largest of up to a million elements (about 5 of
them).
"""

from dataclasses import dataclass
from math import sqrt

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# What gradual underflow costs: weights below the smallest normal number (float16, which weights may be
# rounded to: below its smallest subnormal) may count as 0, times values, scales and sums of moderate size.
UNDERFLOW = {
    torch.float64: 2.0**-1000,
    torch.float32: 2.0**-100,
    torch.float16: 2.0**-20,
    torch.bfloat16: 2.0**-100,
}


@dataclass(frozen=True)
class Tolerance:
    """Roundings an element goes through, in the storage dtype and in the accumulation dtype."""

    storage: float
    accumulation: float
    reason: str

    def relative(self, dtype: torch.dtype, length: int, score_factor: float = 1.0) -> float:
        """Bound on |error| / magnitude."""
        accumulated = UNIT_ROUNDOFF[accumulation_dtype(dtype)] * sqrt(max(length, 1)) * score_factor
        return self.storage * UNIT_ROUNDOFF[dtype] + self.accumulation * accumulated

    def absolute(self, dtype: torch.dtype) -> float:
        """Bound on |error| where results and weights underflow."""
        return UNDERFLOW[dtype]


TOLERANCES = {
    ("block_centroids", "forward"): Tolerance(
        storage=0,
        accumulation=4,
        reason="stored in the accumulation dtype; only the sum over the block's tokens rounds",
    ),
    ("block_centroids", "backward"): Tolerance(
        storage=2,
        accumulation=4,
        reason="one division by the number of tokens, one rounding to the dtype of key",
    ),
    ("block_scores", "forward"): Tolerance(
        storage=0,
        accumulation=8,
        reason="centroid and dot product both accumulate in float32 (float64 for float64); the tie margin "
        "must hold for every pair of every query, hence twice the factor",
    ),
    ("index_scores", "forward"): Tolerance(
        storage=0,
        accumulation=8,
        reason="dot products and what is summed of them accumulate in float32 (float64 for float64); as block_scores",
    ),
    ("index_loss", "loss"): Tolerance(
        storage=0,
        accumulation=4,
        reason="of 16-bit numbers, too, all is made in float32 and stored there; lse is taken as it is given",
    ),
    ("index_loss", "gradients"): Tolerance(
        storage=1,
        accumulation=8,
        reason="made in float32 of scores and weights made anew, summed over queries or keys, rounded once",
    ),
    ("moba_attention", "out"): Tolerance(
        storage=4,
        accumulation=2,
        reason="the result is rounded once; the weights may be rounded to the storage dtype for the product with value",
    ),
    ("moba_attention", "lse"): Tolerance(
        storage=0,
        accumulation=1,
        reason="products of half-precision numbers are exact in float32, which lse is summed and stored in",
    ),
    ("moba_attention", "d_query"): Tolerance(
        storage=4,
        accumulation=1,
        reason="the result is rounded once; the weights, the score gradients and the saved out (in the row's "
        "dot product with grad_out) may each be rounded to the storage dtype; the magnitude has each",
    ),
    ("moba_attention", "d_key"): Tolerance(
        storage=4,
        accumulation=1,
        reason="as d_query: the same score gradients, summed over queries and heads",
    ),
    ("moba_attention", "d_value"): Tolerance(
        storage=4,
        accumulation=2,
        reason="the result is rounded once; the recomputed weights may be rounded to the storage dtype",
    ),
    ("attention", "weights"): Tolerance(
        storage=4,
        accumulation=12,
        reason="in float32 a millionth of a row's sum, whatever the size of scores, since recomputed weights are the "
        "forward's; of 16-bit types weights, a choice's and a row's out, and what is returned may each be rounded",
    ),
    ("moba_decode", "out"): Tolerance(
        storage=4,
        accumulation=2,
        reason="as moba_attention, whose rows these are, and whose kernels a prefill takes",
    ),
    ("moba_decode", "lse"): Tolerance(
        storage=0,
        accumulation=1,
        reason="as moba_attention: summed and stored in float32 (float64 for float64)",
    ),
    ("key_conv", "out"): Tolerance(
        storage=2,
        accumulation=4,
        reason="sum, SiLU and residual in float32, rounded once; for bfloat16 the sigmoid is good to 2^-14, a 64th of "
        "that",
    ),
    ("key_conv", "d_key"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a sum of W slopes of SiLU times weights in float32, rounded once",
    ),
    ("key_conv", "d_weight"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a sum over all tokens, pieces of it added in float32; rounded to the dtype of weight",
    ),
    ("key_conv", "d_bias"): Tolerance(
        storage=1,
        accumulation=4,
        reason="as d_weight",
    ),
    ("key_conv", "d_state"): Tolerance(
        storage=1,
        accumulation=4,
        reason="as d_key",
    ),
    ("product_key_topk", "scores"): Tolerance(
        storage=0,
        accumulation=8,
        reason="two dot products in float32 (float64 for float64) and their sum, stored so; the margin must hold for "
        "every one of n * n pairs, hence twice the factor",
    ),
    ("product_key_topk", "d_query"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a sum over top_k keys, rounded once",
    ),
    ("product_key_topk", "d_keys"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a sum over all that chose the key, rounded once",
    ),
    ("memory_lookup", "out"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a weighted sum in float32, rounded once",
    ),
    ("memory_lookup", "d_values"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a sum over the entries that name the row, pieces of it added in float32, rounded once",
    ),
    ("memory_lookup", "d_weights"): Tolerance(
        storage=1,
        accumulation=4,
        reason="a dot product in float32, rounded to the dtype of weights",
    ),
    ("memory_dot", "out"): Tolerance(
        storage=0,
        accumulation=4,
        reason="a dot product, stored in the dtype it is summed in",
    ),
    ("quantized_lookup", "out"): Tolerance(
        storage=0,
        accumulation=8,
        reason="a weighted sum in float32, of weights that were rounded with scales",
    ),
    ("quantized_lookup", "d_weights"): Tolerance(
        storage=0,
        accumulation=8,
        reason="a dot product in float32, of each group times its scale",
    ),
    ("expert_lookup", "out"): Tolerance(
        storage=1,
        accumulation=8,
        reason="a dot product, an activation that rounds a few times itself, a weighted sum; in float32, rounded once",
    ),
    ("expert_lookup", "d_x"): Tolerance(
        storage=1,
        accumulation=8,
        reason="two dot products in float32, the activation's slope, a weighted sum, rounded once",
    ),
    ("expert_lookup", "d_values_in"): Tolerance(
        storage=1,
        accumulation=8,
        reason="as d_x, summed over the entries that name the row",
    ),
    ("expert_lookup", "d_values"): Tolerance(
        storage=1,
        accumulation=8,
        reason="as out, summed over the entries that name the row",
    ),
    ("expert_lookup", "d_weights"): Tolerance(
        storage=1,
        accumulation=8,
        reason="a dot product times the activation of another, rounded to the dtype of weights",
    ),
    ("grid_attention", "out"): Tolerance(
        storage=4,
        accumulation=2,
        reason="as moba_attention: rounded once, and the weights may be for the product with value",
    ),
    ("grid_attention", "lse"): Tolerance(
        storage=0,
        accumulation=1,
        reason="as moba_attention: summed and stored in float32 (float64 for float64)",
    ),
    ("grid_attention", "d_query"): Tolerance(
        storage=4,
        accumulation=1,
        reason="as moba_attention: the result, the weights, the score gradients and the saved out may each be rounded",
    ),
    ("grid_attention", "d_key"): Tolerance(
        storage=4,
        accumulation=1,
        reason="as d_query: the same score gradients, summed over the group's queries",
    ),
    ("grid_attention", "d_value"): Tolerance(
        storage=4,
        accumulation=2,
        reason="as moba_attention: the result is rounded once; the recomputed weights may be",
    ),
    ("grid_attention", "d_bias"): Tolerance(
        storage=4,
        accumulation=1,
        reason="as d_query: the same score gradients, summed over batch and groups; rounded to the dtype of bias",
    ),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are carried in, and what lse and centroids are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
