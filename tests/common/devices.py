"""The kinds of device the tests run on, and which tests run on which.

``cpu``            the CPU kernels;
``emulated_cuda``  the CUDA kernels, run on CPU tensors by the emulator in ``tests/emulation``, every access checked;
``cuda``           the CUDA kernels on a GPU.

The same cases run on all three. What is left out is left out by a rule of this file, never by a skip inside a test:

1. a kind that this run does not have (no ``TOPGATHER_EMULATION``, no GPU), or that a test is not marked for;
2. float64 on CUDA, where no kernel takes it; ``all_ops/test_bad_types.py`` sees it refused;
3. on the emulator, some ten thousand times slower than a GPU, the tests of ``NOT_EMULATED``, each with its reason and
   the smaller test that stands in for it;
4. on the emulator, of the tests of ``THINNED``, every n-th diagonal of the table of parameters: the items whose
   parameters' positions add up to a multiple of n. With n of 3, every combination of the other parameters keeps one of
   the three dtypes, each in turn.
"""

import random
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

import topgather as tg
from tests.common import emulated

TESTS = Path(__file__).resolve().parents[1]

KINDS = ["cpu", "emulated_cuda", "cuda"]
CUDA_KINDS = ["emulated_cuda", "cuda"]
CPU_TARGETS: list[str] = tg._native.available_cpu_targets()
"""Instruction sets that this machine has, the portable build first."""

# Why not, and what stands in.
HYPOTHESIS = "hundreds of examples"
NOT_EMULATED: dict[str, tuple[str, str]] = {
    "block_attention/test_attention.py::test_counts_past_16_bits": ("minutes", "test_more_of_everything"),
    "block_attention/test_varlen.py::test_many_short_sequences_beside_a_long_one": (
        "minutes",
        "test_short_sequences_beside_a_long_one",
    ),
    "block_attention/test_hypothesis.py::test_attention_equals_the_oracle": (HYPOTHESIS, "test_random_problems"),
    "block_attention/test_hypothesis.py::test_routing_keeps_its_contract": (HYPOTHESIS, "test_random_problems"),
    "block_attention/test_hypothesis.py::test_routing_of_any_scores_is_exact": (HYPOTHESIS, "test_nan_and_inf_scores"),
    "block_attention/test_hypothesis.py::test_any_users_routing": (HYPOTHESIS, "test_random_problems"),
    "block_attention/test_hypothesis.py::test_varlen_equals_dense": (HYPOTHESIS, "test_random_packed_problems"),
    "block_attention/test_hypothesis.py::test_nonfinite_masks_equal_the_oracle": (
        HYPOTHESIS,
        "test_nonfinite_inputs_reach_exactly_the_queries_that_see_them",
    ),
    "block_attention/test_hypothesis.py::test_centroids": (HYPOTHESIS, "test_values_and_gradients"),
    "memory/test_hypothesis.py::test_search_keeps_its_contract": (HYPOTHESIS, "test_every_list_length_of_the_search"),
    "memory/test_hypothesis.py::test_search_among_any_scores_is_exact": (HYPOTHESIS, "test_ties_go_to_the_lower_index"),
    "memory/test_hypothesis.py::test_search_among_scores_that_are_not_finite": (HYPOTHESIS, "test_nan_and_inf"),
    "memory/test_hypothesis.py::test_lookups_equal_the_oracle": (HYPOTHESIS, "test_layouts"),
    "grid/test_hypothesis.py::test_attention_equals_the_oracle": (HYPOTHESIS, "test_layouts"),
    "grid/test_hypothesis.py::test_nonfinite_masks_equal_the_oracle": (
        HYPOTHESIS,
        "test_a_token_that_is_not_finite_reaches_exactly_its_group",
    ),
    "grid/test_hypothesis.py::test_grid_size_bounds_the_tokens_of_a_group": (
        HYPOTHESIS,
        "test_grid_size_is_another_way_to_say_stride",
    ),
    "decoding/test_hypothesis.py::test_any_split_gives_the_rows_of_whole_sequences": (
        HYPOTHESIS,
        "test_rows_of_attention_over_whole_sequences",
    ),
    "decoding/test_hypothesis.py::test_any_split_leaves_the_same_cache": (
        HYPOTHESIS,
        "test_centroids_are_those_of_whole_sequences",
    ),
    "key_conv/test_hypothesis.py::test_equals_the_oracle": (HYPOTHESIS, "test_random_problems"),
    "key_conv/test_hypothesis.py::test_nonfinite_masks_equal_the_oracle": (
        HYPOTHESIS,
        "test_a_key_that_is_not_finite_reaches_exactly_who_sees_it",
    ),
    "key_conv/test_hypothesis.py::test_any_split_equals_the_whole": (
        HYPOTHESIS,
        "test_any_split_of_a_sequence_equals_the_whole",
    ),
    "block_attention/test_nn.py::test_it_learns": (
        "40 steps",
        "test_equals_dense_attention_where_all_blocks_are_chosen",
    ),
}
THINNED: dict[str, int] = {
    "block_attention/test_attention.py::test_long_enough_to_be_split": 2,
    "block_attention/test_attention.py::test_layouts_against_reference": 3,
    "block_attention/test_attention.py::test_enough_blocks_equals_dense_attention": 2,
    "block_attention/test_shared_choices.py::test_the_bits_of_expanded_choices": 3,
    "block_attention/test_cuda_contract.py::test_deterministic_bits_do_not_depend_on_the_schedule": 2,
    "block_attention/test_attention.py::test_against_reference": 3,
    "block_attention/test_routing.py::test_contract_on_random_scores": 3,
    "block_attention/test_routing.py::test_tie_rule_on_exact_scores": 3,
    "block_attention/test_varlen.py::test_equals_each_sequence_alone": 3,
    "block_attention/test_cuda_contract.py::test_faulty_rows_are_nan_and_their_neighbours_keep_their_bits": 3,
    "block_attention/test_cuda_contract.py::test_boundaries_that_do_not_delimit_the_tokens": 3,
    "memory/test_topk.py::test_against_all_pairs": 3,
    "memory/test_topk.py::test_layouts": 3,
    "memory/test_topk.py::test_ties_go_to_the_lower_index": 3,
    "memory/test_topk.py::test_nan_and_inf": 3,
    "memory/test_lookup.py::test_lookup_against_reference": 3,
    "memory/test_lookup.py::test_experts_against_reference": 3,
    "memory/test_lookup.py::test_dot_against_reference": 3,
    "memory/test_lookup.py::test_runs_of_thousands_of_entries": 2,
    "memory/test_lookup.py::test_layouts": 3,
    "memory/test_lookup.py::test_empty": 3,
    "memory/test_sparse.py::test_subsets_of_gradients_of_experts": 3,
    "decoding/test_decode.py::test_rows_of_attention_over_whole_sequences": 3,
    "decoding/test_decode.py::test_layouts_of_new_tokens": 3,
    "decoding/test_decode.py::test_numbers_that_are_not_finite": 3,
    "decoding/test_cache.py::test_reordered_goes_on_from_what_was_chosen": 3,
    "decoding/test_cache.py::test_truncated_is_as_if_never_appended": 2,
    "decoding/test_cache.py::test_convolved_keys_are_those_of_whole_sequences": 2,
    "grid/test_attention.py::test_against_reference": 3,
    "grid/test_attention.py::test_large_groups": 3,
    "grid/test_attention.py::test_scale": 3,
    "grid/test_attention.py::test_equals_masked_dense_attention": 2,
    "grid/test_attention.py::test_layouts": 3,
    "grid/test_attention.py::test_empty": 3,
    "grid/test_attention.py::test_a_token_that_is_not_finite_reaches_exactly_its_group": 3,
    "all_ops/test_compile.py::test_opcheck": 2,
    # Each op with one of the numbers of threads, which the CUDA kernels do not know.
    "all_ops/test_determinism.py::test_concurrent_calls_give_the_same_bits": 2,
    "all_ops/test_huge_scores.py::test_weights_add_up": 3,
    "key_conv/test_key_conv.py::test_against_reference": 3,
    "key_conv/test_key_conv.py::test_layouts": 3,
    "key_conv/test_key_conv.py::test_any_split_of_a_sequence_equals_the_whole": 3,
    "grid/test_cuda_contract.py::test_every_size_of_a_group": 3,
    "grid/test_cuda_contract.py::test_every_tile_shape": 3,
    "grid/test_cuda_contract.py::test_more_groups_than_pieces_of_a_sum": 3,
}


def is_available(kind: str) -> bool:
    """Whether this run can use devices of this kind."""
    if kind == "emulated_cuda":
        return emulated.is_built()
    return kind == "cpu" or (torch.cuda.is_available() and bool(tg._native.has_cuda))


def widest_dtype(kind: str) -> torch.dtype:
    """float64, and float32 on CUDA: for tests that want as few roundings as can be had."""
    return torch.float64 if kind == "cpu" else torch.float32


def schedule_of(test_id: str) -> dict[str, Any]:
    """How the emulator orders threads and lands asynchronous copies in this test: the same in every run."""
    draw = random.Random(crc32(test_id.encode()))
    return {
        "order": draw.choice(["ascending", "descending", "random"]),
        "cp_async": draw.choice(["at_wait", "at_issue", "mixed"]),
        "seed": draw.randrange(2**31),
        "shared_limit": draw.choice([99, 227]) * 1024,
        "compute_capability": draw.choice([80, 90, 120]),
    }


def file_of(item: pytest.Item) -> str:
    """The item's file, as seen from ``tests/``: files of different folders share their names."""
    return item.path.relative_to(TESTS).as_posix()


def name_of(item: pytest.Item) -> str:
    return f"{file_of(item)}::{getattr(item, 'originalname', item.name)}"


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def is_there(item: pytest.Item) -> bool:
    """Whether this run has the device, its kernels take the dtype, and the emulator is up to the test."""
    if item.get_closest_marker("gpu") is not None and not is_available("cuda"):
        return False
    parameters = parameters_of(item)
    kind = parameters.get("device_kind", parameters.get("cuda_kind", "cpu"))
    if not is_available(kind):
        return False
    if kind == "cuda" and item.get_closest_marker("emulator") is not None:
        return False
    if kind in CUDA_KINDS and any(value is torch.float64 for value in parameters.values()):
        return False
    return kind != "emulated_cuda" or name_of(item) not in NOT_EMULATED


def is_on_diagonal(item: pytest.Item, values: dict[str, list[Any]]) -> bool:
    """``values`` has every parameter's values, in the order they are met."""
    parameters = parameters_of(item)
    if "emulated_cuda" not in (parameters.get("device_kind"), parameters.get("cuda_kind")):
        return True
    positions = (values[name].index(value) for name, value in parameters.items() if not name.endswith("_kind"))
    return sum(positions) % THINNED[name_of(item)] == 0


def select(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The items that the rules above let run, and those left out."""
    values: dict[str, dict[str, list[Any]]] = {name: {} for name in THINNED}
    for item in items:
        if name_of(item) in THINNED:
            for name, value in parameters_of(item).items():
                known = values[name_of(item)].setdefault(name, [])
                if value not in known:
                    known.append(value)
    selected: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        thinned = values.get(name_of(item))
        runs = is_there(item) and (thinned is None or is_on_diagonal(item, thinned))
        (selected if runs else left_out).append(item)
    return selected, left_out
