"""What the pictures show, read from what they hand to matplotlib."""

import subprocess
import sys

import pytest
import torch

import topgather as tg

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def shown(figure: Figure, panel: int = 0) -> torch.Tensor:
    """The numbers of a picture."""
    return torch.as_tensor(figure.axes[panel].images[0].get_array().data, dtype=torch.float64)


def own_blocks(tokens: int, block_size: int, heads: int = 1) -> tg.BlockRouting:
    blocks = torch.arange(tokens, dtype=torch.int32) // block_size
    return tg.BlockRouting(blocks.expand(1, heads, tokens)[..., None].contiguous(), block_size)


def test_every_head_has_a_panel() -> None:
    routing = own_blocks(8, 2, heads=3)
    routing.block_indices[0, 2] = 0
    figure = tg.viz.routing(routing)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["head 0", "head 1", "head 2"]
    own = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)
    assert torch.equal(shown(figure), own)
    assert torch.equal(shown(figure, 2)[:, 0], torch.ones(8, dtype=torch.float64))
    assert figure.axes[0].images[0].get_extent() == [0, 8, 8, 0]


def test_one_panel_of_a_head_or_of_their_mean() -> None:
    routing = own_blocks(8, 2, heads=2)
    routing.block_indices[0, 1] = 0
    assert torch.equal(shown(tg.viz.routing(routing, head=1))[:, 0], torch.ones(8, dtype=torch.float64))
    ax = Figure().add_subplot()
    figure = tg.viz.routing(routing, ax=ax)
    assert figure is ax.get_figure() and shown(figure)[-1].tolist() == [0.5, 0, 0, 0.5]


def test_long_sequences_are_drawn_in_bins_that_keep_the_share() -> None:
    """Each of 65536 queries chooses the first block and its own; the share of a bin is that of its blocks."""
    block = torch.arange(65536, dtype=torch.int32) // 64
    routing = tg.BlockRouting(torch.stack([torch.zeros_like(block), block], -1)[None, None], 64)
    routing.block_indices[0, 0, :64, 1] = -1
    picture = shown(tg.viz.routing(routing))
    assert picture.shape == (256, 256)
    assert torch.allclose(picture[1:, 0], torch.tensor(0.25, dtype=torch.float64))  # one block in four of a bin
    assert torch.allclose(picture.diagonal()[1:], torch.tensor(0.25, dtype=torch.float64))
    assert torch.count_nonzero(picture) == 511


def test_records_and_packed_sequences() -> None:
    query, key = torch.randn(1, 2, 32, 8), torch.randn(1, 1, 32, 8)
    with tg.record_routing() as record:
        for _ in range(2):
            tg.moba_attention(query, key, key, 8, 2)
    assert torch.equal(shown(tg.viz.routing(record, call=1)), shown(tg.viz.routing(record[1])))
    packed = tg.BlockRouting(torch.zeros(1, 8, 1, dtype=torch.int32), 2)
    figure = tg.viz.routing(packed, cu_seqlens=torch.tensor([0, 4, 8]))
    expected = torch.zeros(8, 4, dtype=torch.float64)
    expected[:4, 0], expected[4:, 2] = 1, 1
    assert torch.equal(shown(figure), expected)


def test_a_cache_chooses_as_attention_does() -> None:
    key, query = torch.randn(1, 1, 40, 8), torch.randn(1, 2, 40, 8)
    cache = tg.MobaCache(1, 1, 8, block_size=8, max_seq_len=64)
    cache.append(key, key)
    whole = tg.viz.routing(tg.moba_route(query, key, 8, 3), head=1)
    last = tg.viz.routing(cache, query=query[:, :, 30:], top_k=3, head=1)
    assert torch.equal(shown(last), shown(whole)[30:])
    assert last.axes[0].images[0].get_extent() == [0, 40, 40, 30]
    forced = tg.viz.routing(tg.moba_route(query, key, 8, 3, force_first=1, force_last=2), head=1)
    last = tg.viz.routing(cache, query=query[:, :, 30:], top_k=3, head=1, force_first=1, force_last=2)
    assert torch.equal(shown(last), shown(forced)[30:]) and not torch.equal(shown(forced), shown(whole))
    # A window of 10 keys reaches from position 30 into blocks 2 and 3, from 39 into 3 and 4.
    last = shown(tg.viz.routing(cache, query=query[:, :, 30:], top_k=3, head=1, window=10)) > 0
    expected = shown(whole)[30:] > 0
    for row, position in enumerate(range(30, 40)):
        expected[row, (position - 9) // 8 : position // 8 + 1] = True
    assert torch.equal(last, expected) and bool((expected != (shown(whole)[30:] > 0)).any())


def used_layer(num_keys: int = 8) -> tg.nn.ProductKeyMemory:
    layer = tg.nn.ProductKeyMemory(16, tg.nn.MemoryPool(num_keys, 4), 1, 2, 8, track_usage=True)
    layer(torch.randn(12, 16))
    return layer


def test_memory_usage_says_what_usage_says() -> None:
    layer = used_layer()
    usage = layer.usage()
    figure = tg.viz.memory_usage(layer)
    num_dead = round((1 - usage.share_touched) * 64)
    assert figure.axes[0].get_title() == f"{num_dead} of 64 rows unused, KL {usage.kl_divergence:.2f} nats"
    curve = figure.axes[0].lines[0].get_ydata()
    assert sum(curve) == pytest.approx(64) and list(curve) == sorted(curve, reverse=True)
    picture = shown(figure, 1)
    assert picture.shape == (8, 8) and int((picture > 0).sum()) == 64 - num_dead
    assert float(picture.mean()) == pytest.approx(1)


def test_layers_of_a_pool_add_up() -> None:
    first, second = used_layer(), used_layer()
    both = shown(tg.viz.memory_usage([first, second]), 1)
    assert torch.allclose(both * 2, shown(tg.viz.memory_usage(first), 1) + shown(tg.viz.memory_usage(second), 1))
    model = torch.nn.Sequential(first, second)
    ax = Figure().add_subplot()
    assert tg.viz.memory_usage(model, ax=ax) is ax.get_figure()
    assert shown(tg.viz.memory_usage(first, max_bins=4), 1).shape == (4, 4)


def test_bad_arguments() -> None:
    routing = own_blocks(8, 2)
    cache = tg.MobaCache(1, 1, 8, block_size=8, max_seq_len=64)
    for make, kind, text in (
        (lambda: tg.viz.routing(3), TypeError, "source"),
        (lambda: tg.viz.routing(routing, head=1), IndexError, "head"),
        (lambda: tg.viz.routing(routing, batch=1), IndexError, "batch"),
        (lambda: tg.viz.routing(routing, max_bins=0), ValueError, "max_bins"),
        (lambda: tg.viz.routing(tg.RoutingRecord([routing]), call=1), IndexError, "call"),
        (lambda: tg.viz.routing(cache), ValueError, "query must be given"),
        (lambda: tg.viz.routing(cache, query=torch.zeros(1, 1, 1, 8)), ValueError, "query must have at most 0"),
        (lambda: tg.viz.memory_usage(tg.nn.MemoryPool(4, 4)), ValueError, "track_usage"),
        (lambda: tg.viz.memory_usage([3]), TypeError, "layers"),
        (lambda: tg.viz.memory_usage([used_layer(), used_layer(4)]), ValueError, "one size"),
    ):
        with pytest.raises(kind, match=text):
            make()  # type: ignore[no-untyped-call]


def test_without_matplotlib_an_error_says_what_is_missing() -> None:
    script = (
        "import sys\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "import torch, topgather as tg\n"
        "try: tg.viz.routing(tg.BlockRouting(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 1))\n"
        "except ImportError as error: assert 'topgather.viz needs the package matplotlib' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
