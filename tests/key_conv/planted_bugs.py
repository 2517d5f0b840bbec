"""Bugs to plant in the CUDA sources of the key convolution; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.cuda.planted_bug import OVERWRITTEN, READ_OUT_OF_BOUNDS, UNINITIALIZED, UNPUBLISHED, PlantedBug
from tests.key_conv.helpers import KeyConvCase, assert_key_conv_close, check_key_conv, make_inputs, run_key_conv

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# --- cases ------------------------------------------------------------------------------------------------------------

# Several runs of tokens, in several thread blocks.
DENSE = KeyConvCase(num_tokens=300, head_dim=24, width=4, has_state=True)
NO_STATE = KeyConvCase(num_tokens=70, head_dim=24, width=3)
WIDE = KeyConvCase(num_tokens=70, head_dim=24, width=7)
PACKED = KeyConvCase(lengths=(9, 0, 1, 50, 33, 2), head_dim=24, width=5)
# As many taps as a kernel for any width has.
PACKED_FOUR = KeyConvCase(lengths=(9, 0, 1, 50, 33, 2), head_dim=24, width=4)


def nonfinite_case() -> None:
    """A key further back than the taps reach, within the registers' window, is not finite."""
    for case in (NO_STATE, replace(PACKED, width=3)):
        inputs = make_inputs(case, BFLOAT16, CPU)
        key = inputs.key.detach().clone()
        key.select(0 if case.lengths else 2, 10)[0] = torch.inf
        inputs.key = key.requires_grad_()
        assert_key_conv_close(run_key_conv(inputs), inputs, case)


def empty_case() -> None:
    """No tokens, but a weight; memory that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    check_key_conv(KeyConvCase(num_tokens=0), BFLOAT16, CPU)
    check_key_conv(KeyConvCase(num_tokens=0, has_bias=True), BFLOAT16, CPU)


def options_case() -> None:
    """A bias, and sums as they are."""
    for case in (replace(PACKED, has_bias=True), replace(DENSE, has_bias=True, activation=None)):
        check_key_conv(case, BFLOAT16, CPU)


def outside_case() -> None:
    """Boundaries that leave out the first tokens and the last."""
    inputs = make_inputs(PACKED, torch.float32, CPU)
    inputs.cu_seqlens = torch.tensor([3, 9, 9, 10, 60, 90])
    result = run_key_conv(inputs)
    for name in ("out", "d_key"):
        is_missing = torch.ones(95, dtype=torch.bool)
        is_missing[3:90] = False
        assert result[name][is_missing].isnan().all(), f"{name}: a token of no sequence is not NaN"
        assert result[name][~is_missing].isfinite().all(), f"{name}: a token of a sequence is not finite"
    assert result["d_weight"].isfinite().all(), "d_weight: not finite"


KEY_CONV_CASES: dict[str, Callable[[], Any]] = {
    "key_conv": lambda: check_key_conv(DENSE, BFLOAT16, CPU),
    "key_conv float32": lambda: check_key_conv(DENSE, torch.float32, CPU),
    "key_conv without state": lambda: check_key_conv(NO_STATE, BFLOAT16, CPU),
    "key_conv wide": lambda: check_key_conv(WIDE, BFLOAT16, CPU),
    "key_conv packed": lambda: check_key_conv(PACKED, BFLOAT16, CPU),
    "key_conv packed, 4 taps": lambda: check_key_conv(PACKED_FOUR, BFLOAT16, CPU),
    "key_conv unaligned": lambda: check_key_conv(DENSE, BFLOAT16, CPU, layout="offset"),
    "key_conv offset": lambda: check_key_conv(NO_STATE, BFLOAT16, CPU, layout="offset"),
    "key_conv nonfinite": nonfinite_case,
    "key_conv empty": empty_case,
    "key_conv outside": outside_case,
    "key_conv options": options_case,
}

# --- bugs -------------------------------------------------------------------------------------------------------------

WRONG_OUT = "AssertionError: out"
WRONG_GRADIENT = "AssertionError: d_"
WRONG_KEY = "AssertionError: d_key"
WRONG_WEIGHT = "AssertionError: d_weight"
WRONG_BIAS = "AssertionError: d_bias"
WRONG_STATE = "AssertionError: d_state"
MISALIGNED = "RuntimeError: MISALIGNED"

ROWS = "key_conv/key_conv_rows_cuda.cuh"
FORWARD = "key_conv/key_conv_forward_cuda.cu"
BACKWARD = "key_conv/key_conv_backward_cuda.cu"
KEY_CONV_UNITS = {ROWS: ["key_conv_forward_cuda.cu"]}

# fmt: off
KEY_CONV_BUGS = [
    PlantedBug("key_conv: taps turned round", ROWS,
               "source[c * width + width - 1 - l]", "source[c * width + l]",
               "key_conv", WRONG_OUT),
    PlantedBug("key_conv: the state one row late", ROWS,
               "row + shape.width - 1) + place.column", "row + shape.width - 2) + place.column",
               "key_conv", f"{WRONG_OUT}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("key_conv: keys past the end read", ROWS,
               "if (row < shape.num_tokens) {", "if (row <= shape.num_tokens + 16) {", "key_conv",
               f"{READ_OUT_OF_BOUNDS}|{WRONG_GRADIENT}", ["key_conv_backward_cuda.cu"]),
    PlantedBug("key_conv: a boundary belongs to the sequence before", ROWS,
               "shape.cu_seqlens[middle] <= token", "shape.cu_seqlens[middle] < token", "key_conv packed", WRONG_OUT),
    PlantedBug("key_conv: the last sequence has no end", ROWS,
               "end < shape.num_tokens ? end : shape.num_tokens", "shape.num_tokens", "key_conv outside", WRONG_OUT),
    PlantedBug("key_conv: pairs turned round", ROWS,
               "values[2 * i] = pair.x; values[2 * i + 1] = pair.y;",
               "values[2 * i] = pair.y; values[2 * i + 1] = pair.x;", "key_conv", WRONG_OUT),
    PlantedBug("key_conv: a sigmoid of twice the number", ROWS,
               "x * -kKeyConvLog2E", "x * (-2.0f * kKeyConvLog2E)", "key_conv", WRONG_OUT),
    PlantedBug("key_conv forward: a vector where rows allow none", FORWARD,
               "&& params.key.has_aligned_rows(16) &&", "&&", "key_conv offset", MISALIGNED),
    PlantedBug("key_conv backward: a vector where rows allow none", BACKWARD,
               "return keys.has_aligned_rows(kBytes);", "return true;",
               "key_conv offset", MISALIGNED),
    PlantedBug("key_conv forward: history one row late", FORWARD,
               "run.first - kHistory + j, row);", "run.first - kHistory + j + 1, row);", "key_conv", WRONG_OUT),
    PlantedBug("key_conv forward: rows do not move on", FORWARD,
               "rows[j][c] = rows[j + kStep][c];", "rows[j][c] = rows[j][c];", "key_conv", WRONG_OUT),
    PlantedBug("key_conv forward: rows of the last tokens do not move on", FORWARD,
               "rows[j][c] = rows[j + 1][c];", "rows[j][c] = rows[j][c];", "key_conv without state", WRONG_OUT),
    PlantedBug("key_conv forward: rows after the last requested", FORWARD,
               "num_left -= kStep; if (num_left >= kStep) load_next();", "num_left -= kStep; load_next();",
               "key_conv", READ_OUT_OF_BOUNDS),
    PlantedBug("key_conv forward: residual dropped", FORWARD,
               "fmaf(sums[c], sigmoid(sums[c]), rows[kWidth - 1][c])", "sums[c] * sigmoid(sums[c])",
               "key_conv", WRONG_OUT),
    PlantedBug("key_conv forward: the last tap left out", FORWARD,
               "for (int l = 1; l < kWidth; ++l)", "for (int l = 1; l < kWidth - 1; ++l)", "key_conv", WRONG_OUT),
    PlantedBug("key_conv forward, any rows: history one row late", FORWARD,
               "const int64_t row = first - kHistory + j;", "const int64_t row = first - kHistory + j + 1;",
               "key_conv unaligned", WRONG_OUT),
    PlantedBug("key_conv forward, any rows: rows do not move on", FORWARD,
               "window[j] = window[j + kStep];", "window[j] = window[j];", "key_conv unaligned", WRONG_OUT),
    PlantedBug("key_conv forward: the sequence before reaches in", FORWARD,
               "window[j].clear();", ";", "key_conv packed", WRONG_OUT),
    PlantedBug("key_conv forward: tokens of no sequence unmarked", FORWARD,
               "sequence.has(t + i) ? 0.0f : NAN", "0.0f", "key_conv outside", WRONG_OUT),
    PlantedBug("key_conv forward: all taps of the registers multiplied", FORWARD,
               "if (l < shape.width) {", "{", "key_conv nonfinite", WRONG_OUT),
    PlantedBug("key_conv forward, any rows: residual dropped", FORWARD,
               "fmaf(sums[c], sigmoid(sums[c]), current[c])", "sums[c] * sigmoid(sums[c])",
               "key_conv packed", WRONG_OUT),
    PlantedBug("key_conv forward, any rows: the last tap left out", FORWARD,
               "for (int l = 1; l < kTaps; ++l)", "for (int l = 1; l < kTaps - 1; ++l)",
               "key_conv packed, 4 taps", WRONG_OUT),
    PlantedBug("key_conv forward: a run one token short", FORWARD,
               "const int64_t end = first + args.tokens_per_run;",
               "const int64_t end = first + args.tokens_per_run - 1;", "key_conv", f"{WRONG_OUT}|{UNINITIALIZED}"),
    PlantedBug("key_conv backward: slope without its second part", BACKWARD,
               "= grad[c] * gate * fmaf(s, 1.0f - gate, 1.0f)", "= grad[c] * gate", "key_conv", WRONG_GRADIENT),
    PlantedBug("key_conv backward: tokens after the run left out", BACKWARD,
               "int64_t t = last - 1 + kHistory;", "int64_t t = last - 1;", "key_conv", WRONG_GRADIENT),
    PlantedBug("key_conv backward: rows do not move on", BACKWARD,
               "keys[kStep + j][c] = keys[kStep + j - kCount][c];", "", "key_conv", WRONG_GRADIENT),
    PlantedBug("key_conv backward: slopes do not move on", BACKWARD,
               "slopes[kStep + j][c] = slopes[kStep + j - kCount][c];", "", "key_conv", WRONG_KEY),
    PlantedBug("key_conv backward: the key's own token left out", BACKWARD,
               "for (int l = 0; l < kWidth; ++l) { #pragma unroll for (int c = 0; c < kVector; ++c) grad[c] =",
               "for (int l = 1; l < kWidth; ++l) { for (int c = 0; c < kVector; ++c) grad[c] =", "key_conv", WRONG_KEY),
    PlantedBug("key_conv backward: rows before the first taken at once", BACKWARD,
               "(first > kHistory ? first : kHistory) + kStep - 1", "first + kStep - 1",
               "key_conv without state", f"{READ_OUT_OF_BOUNDS}|{WRONG_GRADIENT}"),
    PlantedBug("key_conv backward: rows before the run requested", BACKWARD,
               "if (t - kStep >= lowest) load_next();", "load_next();", "key_conv without state", READ_OUT_OF_BOUNDS),
    PlantedBug("key_conv backward: the state's gradient not written", BACKWARD,
               "first == 0 && args.grad_state.data != nullptr ? -kHistory : first", "first", "key_conv", WRONG_STATE),
    PlantedBug("key_conv backward: weights summed over tokens after the run too", BACKWARD,
               "if (t < last) { state.add_slopes", "if (t < shape.num_tokens) { state.add_slopes",
               "key_conv float32", WRONG_WEIGHT + "|RuntimeError: RACE"),
    PlantedBug("key_conv backward, any rows: slope without its second part", BACKWARD,
               "? grad[c] * gate * fmaf(s, 1.0f - gate, 1.0f)", "? grad[c] * gate", "key_conv packed", WRONG_GRADIENT),
    PlantedBug("key_conv backward, any rows: tokens after the run left out", BACKWARD,
               "int64_t t = last - 1 + shape.width - 1;", "int64_t t = last - 1;", "key_conv packed", WRONG_KEY),
    PlantedBug("key_conv backward: the sequence after reaches in", BACKWARD,
               "if (t + 1 >= sequence.end) {", "if (false) {", "key_conv packed", WRONG_KEY),
    PlantedBug("key_conv backward: the sequence before reaches in", BACKWARD,
               "if (is_packed && t - l < sequence.start) row.clear();", "", "key_conv packed", WRONG_GRADIENT),
    PlantedBug("key_conv backward: tokens of no sequence unmarked", BACKWARD,
               "const float absent = is_there ? 0.0f : NAN;", "const float absent = 0.0f;",
               "key_conv outside", WRONG_KEY),
    PlantedBug("key_conv backward, any rows: residual dropped", BACKWARD,
               "fmaf(taps[0][c], d_s[c], grad[c])", "taps[0][c] * d_s[c]", "key_conv packed", WRONG_KEY),
    PlantedBug("key_conv backward, any rows: taps of later tokens one off", BACKWARD,
               "fmaf(taps[l][c], later[l - 1][c], result[c])", "fmaf(taps[l - 1][c], later[l - 1][c], result[c])",
               "key_conv packed", WRONG_KEY),
    PlantedBug("key_conv backward, any rows: the state's gradient not written", BACKWARD,
               "first == 0 && args.grad_state.data != nullptr ? 1 - shape.width : first", "first",
               "key_conv unaligned", WRONG_STATE),
    PlantedBug("key_conv backward, any rows: weights summed over tokens after the run too", BACKWARD,
               "if (t < last) { float result", "if (t < shape.num_tokens) { float result",
               "key_conv packed", WRONG_WEIGHT + "|RuntimeError: RACE"),
    PlantedBug("key_conv backward: sums of all runs not published", BACKWARD,
               "Publishes every run's sums to the first run's threads. __syncthreads();", "", "key_conv", UNPUBLISHED),
    PlantedBug("key_conv backward: sums overwritten while read", BACKWARD,
               "may be overwritten. if (l > 0) __syncthreads();", "", "key_conv", OVERWRITTEN),
    PlantedBug("key_conv backward: the last runs left out", BACKWARD,
               "r < args.runs_per_block; ++r", "r + 30 < args.runs_per_block; ++r", "key_conv", WRONG_WEIGHT),
    PlantedBug("key_conv backward: pieces of the first head", BACKWARD,
               "shape.num_heads + head) * args.sums_per_head *", "shape.num_heads) * args.sums_per_head *",
               "key_conv", f"{WRONG_WEIGHT}|{UNINITIALIZED}|RuntimeError: RACE"),
    PlantedBug("key_conv backward: the last piece left out", BACKWARD,
               "piece < args.num_pieces; ++piece", "piece + 1 < args.num_pieces; ++piece", "key_conv", WRONG_WEIGHT),
    PlantedBug("key_conv backward: sums by distance, not by tap", BACKWARD,
               "* args.width + args.width - 1 - l] = sum;", "* args.width + l] = sum;", "key_conv", WRONG_WEIGHT),
    PlantedBug("key_conv backward: the weight's gradient of no token not cleared", BACKWARD,
               "clear(params.grad_weight.data, channels * problem.kernel_width);", "", "key_conv empty", WRONG_WEIGHT),
    PlantedBug("key_conv backward: the bias's gradient of no token not cleared", BACKWARD,
               "clear(params.grad_bias.data, channels);", "", "key_conv empty", WRONG_BIAS),
    PlantedBug("key_conv: the bias of the first head", ROWS,
               "bias[place.head * shape.head_dim + place.column + c]", "bias[place.column + c]",
               "key_conv options", WRONG_OUT),
    PlantedBug("key_conv forward: no bias", FORWARD,
               "fmaf(taps[0][c], current[c], bias[c])", "taps[0][c] * current[c]", "key_conv options", WRONG_OUT),
    PlantedBug("key_conv forward: SiLU in any case", FORWARD,
               "if (kHasOptions && !args.has_silu) {", "if (false) {", "key_conv options", WRONG_OUT),
    PlantedBug("key_conv backward: no bias", BACKWARD,
               "fmaf(taps[0][c], keys[0][c], bias[c])", "taps[0][c] * keys[0][c]", "key_conv options", WRONG_GRADIENT),
    PlantedBug("key_conv backward: the slope of SiLU in any case", BACKWARD,
               "if (kHasOptions && !args.has_silu) d_s[c] =", "if (false) d_s[c] =",
               "key_conv options", WRONG_GRADIENT),
    PlantedBug("key_conv backward: the last token is not the bias's", BACKWARD,
               "sums[kTaps][c] += d_s[c];", "sums[kTaps][c] = d_s[c];", "key_conv options", WRONG_BIAS),
    PlantedBug("key_conv backward: the bias's sum where the last tap's is", BACKWARD,
               "piece[(is_bias ? shape.width : l) *", "piece[(is_bias ? shape.width - 1 : l) *",
               "key_conv options", f"{WRONG_WEIGHT}|{WRONG_BIAS}|{UNINITIALIZED}"),
    PlantedBug("key_conv backward: the bias's gradient of the first head", BACKWARD,
               "args.grad_bias[static_cast<int64_t>(head) * args.head_dim + d] = sum;", "args.grad_bias[d] = sum;",
               "key_conv options", f"{WRONG_BIAS}|RuntimeError: RACE"),
]
# fmt: on
