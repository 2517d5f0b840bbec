"""What usage() counts: right for counts of any size, cleared by a reset, once for what checkpointing runs twice."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import topgather as tg
from tests.common.torch_versions import needs_torch

NUM_KEYS, DIM = 4, 8
NUM_ROWS = NUM_KEYS**2


def make(kind: str = "memory", top_k: int = 4, **options: object) -> "tg.nn.ProductKeyMemory | tg.nn.PeerMemory":
    sizes = {"num_heads": 2, "top_k": top_k, "key_dim": 8, "track_usage": True, **options}
    if kind == "peer":
        return tg.nn.PeerMemory(DIM, NUM_KEYS, **sizes)
    return tg.nn.ProductKeyMemory(DIM, tg.nn.MemoryPool(NUM_KEYS, 6), **sizes)


KINDS = pytest.mark.parametrize("kind", ["memory", "peer"])


def counts_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers() if name.startswith("usage_")}


@pytest.mark.parametrize("calls", [1, 3])
def test_weights_are_summed_exactly(calls: int) -> None:
    """Rows that stand several times in a call, weights above and below 1: the sums are those of float64."""
    layer = make()
    generator = torch.Generator().manual_seed(0)
    use = torch.zeros(NUM_ROWS, dtype=torch.float64)
    for _ in range(calls):
        indices = torch.randint(0, NUM_ROWS // 2, (50, 8), generator=generator)
        weights = torch.randint(1, 2**20, (50, 8), generator=generator) / 2**16
        layer._count(indices, weights)
        use.index_add_(0, indices.flatten(), weights.double().flatten())
    share = use / use.sum()
    expected = math.log(NUM_ROWS) - float(torch.special.entr(share).sum())
    usage = layer.usage()
    assert usage.num_lookups == calls * 400
    assert usage.share_touched == float((use > 0).double().mean())
    assert usage.kl_divergence == pytest.approx(expected, rel=1e-12)
    total = layer.usage_weights.double() + layer.usage_units.double() / 2**30
    assert torch.equal(total, use)


@pytest.mark.parametrize("exponent", [20, 33, 45, 60, 62, 65])
def test_any_number_of_lookups(exponent: int) -> None:
    """As after 2 ** exponent lookups with a weight of 1, all of them of one row, or evenly of all."""
    layer = make(top_k=1)
    for rows in (1, NUM_ROWS):
        layer.reset_usage()
        layer.usage_weights[:rows] = 2**exponent // rows if exponent < 63 else 2**60
        layer.usage_lookups.fill_(2**exponent % 2**62)
        layer.usage_lookups_carried.fill_(2**exponent // 2**62)
        usage = layer.usage()
        assert usage.num_lookups == 2**exponent
        assert usage.share_touched == rows / NUM_ROWS
        assert usage.kl_divergence == pytest.approx(math.log(NUM_ROWS / rows), abs=1e-12)
        # And one more.
        layer._count(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        assert layer.usage().num_lookups == 2**exponent + 1
        assert layer.usage_weights[0] == (2**exponent // rows if exponent < 63 else 2**60) + 1


def test_counts_are_carried() -> None:
    layer = make()
    layer.usage_lookups.fill_(2**62 - 3)
    layer._count(torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), 0.75))
    assert layer.usage().num_lookups == 2**62 + 2
    assert int(layer.usage_weights[0]) == 3 and int(layer.usage_units[0]) == 3 * 2**28
    layer._count(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[float("inf"), 1e30, float("nan")]]))
    assert int(layer.usage_weights[1]) == 2048 and int(layer.usage_units[1]) == 1


@KINDS
def test_reset_parameters_clears(kind: str) -> None:
    layer = make(kind)
    layer(torch.randn(5, DIM))
    assert layer.usage().num_lookups == 40
    layer.reset_parameters()
    assert all((count == 0).all() for count in counts_of(layer).values())
    with torch.device("meta"):
        layer = make(kind)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        for buffer in module.buffers(recurse=False):
            buffer.fill_(77)
    for module in reversed(list(layer.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer(torch.randn(6, DIM))
    assert layer.usage().num_lookups == 48


@KINDS
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=needs_torch(2, 10, "repeats what a compiled checkpoint writes to buffers"))],
)
def test_checkpointing_counts_once(kind: str, use_reentrant: bool, compiled: bool) -> None:
    if compiled and use_reentrant:
        return  # torch compiles no reentrant checkpoints
    layer = make(kind)
    x = torch.randn(5, DIM, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    torch._dynamo.reset()
    out = torch.compile(run, backend="aot_eager")(x) if compiled else run(x)
    before = counts_of(layer)
    out.sum().backward()
    assert layer.usage().num_lookups == 40
    for name, count in counts_of(layer).items():
        assert torch.equal(count, before[name])


@KINDS
def test_compiled_counts_equal_eager_ones(kind: str) -> None:
    layer, x = make(kind), torch.randn(5, DIM)
    layer(x)
    expected = counts_of(layer)
    layer.reset_usage()
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    for name, count in counts_of(layer).items():
        assert torch.equal(count, expected[name]), name


def test_counts_are_no_state() -> None:
    """As the docstring says: not in the state dict, and whole through a change of dtype."""
    layer = make()
    assert not any("usage" in name for name in layer.state_dict())
    layer(torch.randn(5, DIM))
    expected = counts_of(layer)
    layer.bfloat16()
    for name, count in counts_of(layer).items():
        assert count.dtype == torch.int64 and torch.equal(count, expected[name])
    layer.track_usage = False
    assert not counts_of(layer)
    layer.track_usage = True
    assert layer.usage().num_lookups == 0


@KINDS
@pytest.mark.parametrize("how", ["turned on", "made", "moved"])
def test_counting_begun_in_inference_mode_goes_on_outside(kind: str, how: str) -> None:
    """Counters that inference mode made can be written to outside, and those of a layer made before, in training."""
    x = torch.randn(6, DIM)
    layer = make(kind, track_usage=how == "moved")
    with torch.inference_mode():
        if how == "turned on":
            layer.track_usage = True
        elif how == "made":
            layer = make(kind)
        else:
            layer.to_empty(device="cpu").reset_parameters()
        layer(x)
    with torch.no_grad():
        layer(x)
    if how == "turned on":
        layer(x).sum().backward()
    assert layer.usage().num_lookups == (3 if how == "turned on" else 2) * 6 * 8
    layer.reset_usage()
    assert layer.usage().num_lookups == 0


@KINDS
def test_transforms_are_refused(kind: str) -> None:
    """Counters are written to in place, which torch refuses in words of its own."""
    layer, x = make(kind), torch.randn(3, 5, DIM)
    transforms = {
        "vmap": lambda: torch.vmap(layer)(x),
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
    }
    for run in transforms.values():
        with pytest.raises(NotImplementedError, match=r"track_usage must be False under torch\.vmap"):
            run()
    assert layer.usage().num_lookups == 0
    layer.track_usage = False
    for run in transforms.values():
        run()


def test_a_refused_call_is_not_counted() -> None:
    layer = tg.nn.ProductKeyMemory(8, tg.nn.MemoryPool(4, 8), 2, 3, 8, track_usage=True)
    layer(torch.randn(3, 8))
    before = layer.usage()
    layer.value_proj = torch.nn.Linear(9, 8)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 8))
    assert layer.usage() == before
