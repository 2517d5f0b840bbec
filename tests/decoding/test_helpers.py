"""The checks of ``helpers.py`` find wrong data."""

from collections.abc import Callable

import pytest
import torch

from tests.common.tensors import DTYPES
from tests.decoding.helpers import (
    DecodeCase,
    Rows,
    assert_rows,
    assert_same_contents,
    filled_cache,
    make_cache,
    make_tokens,
    run_steps,
)

CPU = torch.device("cpu")
CASE = DecodeCase(((30, 9), (1, 1)), pages=1)


def one_step_further(rows: Rows) -> None:
    rows.out[:] = rows.out.roll(1, dims=2)


def another_head(rows: Rows) -> None:
    rows.out[:] = rows.out.flip(1)


def a_weight_dropped(rows: Rows) -> None:
    rows.out[0, 1, 20] *= 0.98


def lse_of_base_two(rows: Rows) -> None:
    rows.lse /= torch.tensor(2.0).log()


def another_block(rows: Rows) -> None:
    rows.block_indices[0, 0, 29, 0] = (rows.block_indices[0, 0, 29, 0] + 1) % 3


def no_own_block(rows: Rows) -> None:
    rows.block_indices[0, 2, 3] = -1


WRONG: list[Callable[[Rows], None]] = [
    one_step_further, another_head, a_weight_dropped, lse_of_base_two, another_block, no_own_block
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", WRONG)
def test_wrong_rows_are_found(spoil: Callable[[Rows], None], dtype: torch.dtype) -> None:
    tokens = make_tokens(CASE, dtype, CPU)
    rows = run_steps(CASE, tokens, make_cache(CASE, dtype, CPU))[0]
    assert_rows(rows, tokens, 0, CASE)
    spoil(rows)
    with pytest.raises(AssertionError):
        assert_rows(rows, tokens, 0, CASE)


@pytest.mark.parametrize("name", ["key_pages", "value_pages", "centroids"])
def test_other_contents_are_found(name: str) -> None:
    cache, _ = filled_cache(CASE, torch.float32, CPU)
    other = cache.copy()
    assert_same_contents(cache, 0, other, 0)
    page = int(other.page_table[0, 3]) if other.page_table is not None else 0
    getattr(other, name)[page, 1, 0, 3] += 1
    with pytest.raises(AssertionError):
        assert_same_contents(cache, 0, other, 0)
