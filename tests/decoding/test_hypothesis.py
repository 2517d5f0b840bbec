"""Random splits of random sequences into appends, and random lives of a cache."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES
from tests.decoding.helpers import DecodeCase, assert_same_contents, check_decode, make_cache, make_tokens, padded

CPU = torch.device("cpu")
BOUNDED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def supported(dtype: torch.dtype, device_kind: str) -> torch.dtype:
    """``dtype`` itself, or what the device has in its place."""
    return widest_dtype(device_kind) if dtype == torch.float64 else dtype


@st.composite
def cases(draw: st.DrawFn) -> DecodeCase:
    batch = draw(st.integers(1, 3))
    # Mostly few tokens at a time, sometimes a prefill.
    size = st.one_of(st.integers(0, 3), st.integers(0, 80))
    steps = draw(st.lists(st.tuples(*[size] * batch), min_size=1, max_size=6))
    num_kv_heads = draw(st.integers(1, 2))
    return DecodeCase(
        tuple(steps),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.integers(1, 20)),
        block_size=draw(st.integers(1, 20)),
        top_k=draw(st.one_of(st.none(), st.integers(1, 5))),
        pages=draw(st.integers(0, 3)),
        scale=draw(st.sampled_from([None, 0.5, -1.0, 0.0])),
    )


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@BOUNDED
def test_any_split_gives_the_rows_of_whole_sequences(
    case: DecodeCase, dtype: torch.dtype, seed: int, device: torch.device, device_kind: str
) -> None:
    check_decode(case, supported(dtype, device_kind), device, seed=seed)


@given(case=cases(), dtype=st.sampled_from(DTYPES), data=st.data())
@BOUNDED
def test_any_split_leaves_the_same_cache(
    case: DecodeCase, dtype: torch.dtype, data: st.DataObject, device: torch.device, device_kind: str
) -> None:
    """Appended in steps, too far, and cut back, or all at once: the same bits."""
    dtype = supported(dtype, device_kind)
    tokens = make_tokens(case, dtype, device)
    cache, whole = make_cache(case, dtype, device), make_cache(case, dtype, device)
    starts = [0] * case.batch
    for counts in case.steps:
        cache.append(padded(tokens.key, starts, counts), padded(tokens.value, starts, counts), list(counts))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
        if data.draw(st.booleans()):
            starts = [data.draw(st.integers(max(0, start - 9), start)) for start in starts]
            cache.truncate(starts)
    whole.append(padded(tokens.key, [0] * case.batch, starts), padded(tokens.value, [0] * case.batch, starts), starts)
    for sequence in range(case.batch):
        assert_same_contents(cache, sequence, whole, sequence)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 2))
@settings(max_examples=60)
def test_any_split_gives_block_centroids(steps: list[int], block_size: int, pages: int) -> None:
    """Of whole blocks, on the CPU bit for bit."""
    case = DecodeCase(tuple((step,) for step in steps), block_size=block_size, pages=pages, head_dim=5)
    tokens = make_tokens(case, torch.float32, CPU)
    cache = make_cache(case, torch.float32, CPU)
    start = 0
    for step in steps:
        cache.append(tokens.key[0][:, :, start : start + step], tokens.value[0][:, :, start : start + step])
        start += step
    num_whole = start // block_size
    expected = tg.block_centroids(tokens.key[0], block_size)[0, :, :num_whole]
    page_of = torch.tensor([0])
    if cache.page_table is not None:
        page_of = cache.page_table[0, : -(-start // cache.page_size)].long()
    found = cache.centroids[page_of].transpose(0, 1).flatten(1, 2)[:, :num_whole]
    assert torch.equal(found, expected)
