"""``FlopCounterMode`` counts the ops on what was chosen, against counts made pair by pair."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import topgather as tg
from topgather._common.spec import OPS

# They make no products.
WITHOUT = {"block_centroids", "moba_cache_append"}


def counts(counter: FlopCounterMode) -> dict[str, int]:
    found = counter.get_flop_counts()["Global"]
    return {str(op).removeprefix("topgather."): number for op, number in found.items() if "topgather" in str(op)}


def test_every_op_that_makes_products_is_counted() -> None:
    registry = FlopCounterMode(display=False).flop_registry
    assert {name for name in OPS if getattr(torch.ops.topgather, name) not in registry} == WITHOUT


def pairs_of(block_indices: torch.Tensor, block_size: int, num_queries: int, num_keys: int, is_causal: bool) -> int:
    """Of one batch entry or sequence, ``[H, N, K]``."""
    total = 0
    for head in block_indices.tolist():
        for i, blocks in enumerate(head):
            last = i + num_keys - num_queries if is_causal else num_keys - 1
            chosen = {block for block in blocks if block >= 0}
            total += sum(key // block_size in chosen for key in range(min(num_keys, last + 1)))
    return total


@pytest.mark.parametrize("is_causal", [True, False])
def test_block_attention_is_counted_on_what_was_chosen(is_causal: bool) -> None:
    query = torch.randn(2, 4, 20, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, 27, dim, requires_grad=True) for dim in (8, 12))
    routing = tg.moba_route(query, key, 4, 3, is_causal)
    pairs = sum(pairs_of(entry, 4, 20, 27, is_causal) for entry in routing.block_indices)
    with FlopCounterMode(display=False) as counter:
        tg.moba_attention(query, key, value, 4, 3, is_causal).sum().backward()
    scored = sum((i + 7) // 4 if is_causal else 7 for i in range(20)) * 2 * 4
    assert counts(counter) == {
        "moba_route": 2 * scored * 8,
        "moba_attention": 2 * pairs * (8 + 12),
        "moba_attention_backward": 2 * pairs * (3 * 8 + 2 * 12),
    }


def test_choices_that_heads_share_count_for_each_head() -> None:
    query, key = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    own = (torch.arange(8, dtype=torch.int32) // 4)[None, None, :, None]
    with FlopCounterMode(display=False) as counter:
        tg.moba_attention(query, key, key, 4, routing=tg.BlockRouting(own.contiguous(), 4))
    assert counts(counter)["moba_attention"] == 4 * 2 * (1 + 2 + 3 + 4) * 2 * 16


def test_packed_sequences_and_decoding_count_as_dense() -> None:
    query, key = torch.randn(2, 2, 12, 8), torch.randn(2, 1, 12, 8)
    with FlopCounterMode(display=False) as dense:
        tg.moba_attention(query, key, key, 4, 2)
    bounds = torch.tensor([0, 12, 24], dtype=torch.int32)
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, key)]
    with FlopCounterMode(display=False) as packed:
        tg.moba_attention_varlen(*rows, bounds, bounds, 12, 12, 4, 2)
    assert counts(packed) == counts(dense)
    cache = tg.PagedMobaCache(2, 1, 8, page_size=4, num_pages=8, block_size=4, max_seq_len=16)
    with FlopCounterMode(display=False) as decoded:
        for i in range(12):
            cache.append(key[:, :, i : i + 1], key[:, :, i : i + 1])
            tg.moba_decode(query[:, :, i : i + 1], cache, top_k=2)
    assert counts(decoded) == {
        "moba_decode_route": counts(dense)["moba_route"],
        "moba_decode": counts(dense)["moba_attention"],
    }


def test_a_choice_that_cannot_be_read_counts_as_full() -> None:
    query, key = torch.randn(1, 2, 16, 8, device="meta"), torch.randn(1, 1, 16, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        tg.moba_attention(query, key, key, 4, 2)
    assert counts(counter)["moba_attention"] == 2 * 2 * 16 * 2 * 4 * 16


def test_other_ops() -> None:
    values, x = torch.randn(9, 6, requires_grad=True), torch.randn(5, 4)
    indices, weights = torch.randint(9, (5, 3)), torch.randn(5, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        tg.memory_lookup(values, indices, weights).sum().backward()
        tg.product_key_topk(x[:, None], torch.randn(1, 2, 3, 2), 2)
    assert counts(counter) == {
        "memory_lookup": 2 * 5 * 3 * 6,
        "memory_backward": 2 * 2 * 5 * 3 * 6,
        "product_key_topk": 2 * 5 * 4 * 3,
    }
    key, weight = torch.randn(1, 2, 7, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        tg.key_conv(key, weight)[0].sum().backward()
    assert counts(counter) == {"key_conv": 2 * 7 * 8 * 3, "key_conv_backward": 3 * 2 * 7 * 8 * 3}


def test_a_window_counts_once() -> None:
    """A query sees the newest 5 keys and its blocks, keys of both once."""
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 20, 8)
    routing = tg.moba_route(query, key, 4, 2)
    pairs = 0
    for head in routing.block_indices[0].tolist():
        for i, blocks in enumerate(head):
            pairs += sum(i - j < 5 or j // 4 in blocks for j in range(i + 1))
    with FlopCounterMode(display=False) as counter:
        tg.moba_attention(query, key, key, 4, routing=routing, window=5)
    assert counts(counter) == {"moba_attention": 2 * pairs * 16}
    cache = tg.MobaCache(1, 1, 8, block_size=4, max_seq_len=32)
    with FlopCounterMode(display=False) as decoded:
        for i in range(20):
            cache.append(key[:, :, i : i + 1], key[:, :, i : i + 1])
            tg.moba_decode(query[:, :, i : i + 1], cache, top_k=2, window=5)
    assert counts(decoded)["moba_decode"] == 2 * pairs * 16


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_indexer(is_causal: bool) -> None:
    index_query = torch.randn(1, 2, 12, 4, requires_grad=True)
    index_key = torch.randn(1, 1, 15, 4, requires_grad=True)
    query, key = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 15, 8)
    everything = sum(min(15, i + 4) if is_causal else 15 for i in range(12))
    with FlopCounterMode(display=False) as counter:
        routing = tg.index_route(index_query, index_key, 4, 2, is_causal=is_causal)
        _, lse = tg.moba_attention(query, key, key, 4, is_causal=is_causal, return_lse=True)
        losses = tg.index_loss(index_query, index_key, query, key, lse, routing, 4, is_causal=is_causal)
        losses.sum().backward()
    pairs = pairs_of(routing.block_indices[0], 4, 12, 15, is_causal)
    found = counts(counter)
    assert found["index_route"] == 2 * everything * 2 * 4
    assert found["index_loss"] == 2 * pairs * (4 + 2 * 8)
    assert found["index_loss_backward"] == 2 * pairs * (3 * 4 + 2 * 8)
    with FlopCounterMode(display=False) as dense:
        tg.index_loss(index_query, index_key, query, key, lse, None, 4, is_causal=is_causal)
    assert counts(dense)["index_loss"] == 2 * 2 * everything * (4 + 2 * 8)


@pytest.mark.parametrize("is_window", [True, False])
def test_grid_attention_is_counted_by_groups(is_window: bool) -> None:
    image = torch.randn(1, 2, 5, 7, 4, requires_grad=True)

    def group(i: int) -> tuple[int, int]:
        row, column = divmod(i, 7)
        return (row // 2, column // 3) if is_window else (row % 2, column % 3)

    pairs = 2 * sum(group(i) == group(j) for i in range(35) for j in range(35))
    with FlopCounterMode(display=False) as counter:
        if is_window:
            tg.window_attention(image, image, image, (2, 3)).sum().backward()
        else:
            tg.grid_attention(image, image, image, stride=(2, 3)).sum().backward()
    assert counts(counter) == {"grid_attention": 4 * pairs * 4, "grid_attention_backward": 10 * pairs * 4}


@pytest.mark.parametrize("is_first", [True, False])
def test_formulas_are_there_whichever_is_imported_first(is_first: bool) -> None:
    """The package does not load the counter, which loads triton, by itself."""
    imports = ["import torch.utils.flop_counter", "import topgather"]
    script = (
        f"import sys; {'; '.join(imports if is_first else imports[::-1][:1])}\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == {is_first}\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "import torch\n"
        "assert torch.ops.topgather.moba_attention in flop_registry\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
