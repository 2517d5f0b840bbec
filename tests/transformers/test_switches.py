"""A conversation that changes its attention, its mode or its mind: every cache gives what transformers' own gives."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from topgather.integrations import transformers as moba
from topgather.integrations._cache import MobaLayer

transformers.logging.set_verbosity_error()

EVERYTHING = 100
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip
Model = Any


def llama(implementation: str = "moba") -> Model:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=implementation)
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def deepseek(implementation: str = "moba") -> Model:
    """Caches latents, which the attention function never sees."""
    torch.manual_seed(1)
    config = DeepseekV3Config(**SIZES, **LATENT, num_key_value_heads=4, attn_implementation=implementation)
    return DeepseekV3ForCausalLM(config).eval()


FAMILIES = pytest.mark.parametrize("family", [llama, deepseek])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register(block_size=4, top_k=EVERYTHING)
    yield
    moba.register()


def padded() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, 61, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def step(model: Model, ids: Tensor, mask: Tensor, start: int, end: int, cache: Any) -> Tensor:
    """Logits of columns from ``start`` to before ``end``."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "past_key_values": cache}
    with torch.no_grad():
        return model(ids[:, start:end], **options).logits


@FAMILIES
@pytest.mark.parametrize("kind", ["its own", "made", "paged"])
@pytest.mark.parametrize("dense", ["sdpa", "eager"])
def test_a_switch_in_mid_conversation(family: Any, kind: str, dense: str) -> None:
    """Blocks, dense, blocks again: with one cache, as one forward over everything."""
    ids, mask = padded()
    model = family()
    expected = step(family("eager"), ids, mask, 0, 20, None)
    cache: Any = DynamicCache()
    if kind != "its own":
        cache = moba.make_cache(model, 64 if kind == "paged" else None, paged=kind == "paged")
    parts = []
    for start, end, enabled in (
        (0, 8, True),
        (8, 10, True),
        (10, 11, False),
        (11, 15, False),
        (15, 17, True),
        (17, 20, False),
    ):
        moba.set_moba(model, enabled=enabled, dense_implementation=dense)
        parts.append(step(model, ids, mask, start, end, cache))
        if kind != "its own":
            assert all((layer.moba_cache is not None) == enabled for layer in cache.layers)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-4, rtol=1e-4)


@FAMILIES
def test_a_cache_of_columns_is_changed_as_one_of_blocks(family: Any) -> None:
    """Cut, repeated, selected and reordered, while another implementation has it."""
    ids, mask = padded()
    model = family()
    cache = moba.make_cache(model)
    step(model, ids, mask, 0, 12, cache)
    moba.set_moba(model, enabled=False)
    step(model, ids, mask, 12, 16, cache)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    rows = torch.tensor([1, 0, 0])
    moba.set_moba(model)
    actual = step(model, ids[rows], mask[rows], 14, 20, cache)
    expected = step(family("eager"), ids[rows], mask[rows], 0, 20, None)[:, 14:]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


class _Fault(Exception):
    pass


def state(cache: Any) -> list[Any]:
    """All that the layers of a cache hold."""
    found = []
    for layer in cache.layers:
        blocks = None
        if isinstance(layer, MobaLayer) and layer.moba_cache is not None:
            held = layer.moba_cache
            blocks = (held.lengths, [layer._columns_of(rows) for rows in layer._rows()])
        raw = getattr(layer, "raw", None)
        found.append(
            (layer.get_seq_length(), isinstance(layer, MobaLayer), layer.keys, layer.values, raw and list(raw), blocks)
        )
    return found


@FAMILIES
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("before", [0, 7], ids=["empty", "filled"])
@pytest.mark.parametrize("kind", ["its own", "made", "paged"])
def test_a_forward_that_failed_changes_nothing(family: Any, failing: int, before: int, kind: str) -> None:
    """It fails in one layer, after others have taken its tokens; and is repeated."""
    ids, mask = padded()
    model = family()
    cache: Any = DynamicCache()
    if kind != "its own":
        cache = moba.make_cache(model, 64 if kind == "paged" else None, paged=kind == "paged")
    if before:
        step(model, ids, mask, 0, before, cache)
    was = state(cache)

    def fail(*_: Any) -> None:
        raise _Fault

    handle = model.model.layers[failing].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(_Fault):
        step(model, ids, mask, before, 15, cache)
    torch.testing.assert_close(state(cache)[: len(was)], was, atol=0, rtol=0)
    handle.remove()
    actual = step(model, ids, mask, before, 20, cache)
    expected = step(family("eager"), ids, mask, 0, 20, None)[:, before:]
    real = mask[:, before:].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("before", [0, 7], ids=["empty", "filled"])
def test_a_static_cache_forgets_a_forward_that_failed(before: int) -> None:
    ids, mask = padded()
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    if before:
        step(model, ids, mask, 0, before, cache)

    def fail(*_: Any) -> None:
        raise _Fault

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(_Fault):
        step(model, ids, mask, before, 15, cache)
    handle.remove()
    assert cache.get_seq_length() == before
    actual = step(model, ids, mask, before, 20, cache)
    expected = step(llama("eager"), ids, mask, 0, 20, None)[:, before:]
    real = mask[:, before:].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


def refill_numpy(positions: np.ndarray, tensor: Tensor, new: np.ndarray) -> None:
    positions[:] = new


def refill_data(positions: np.ndarray, tensor: Tensor, new: np.ndarray) -> None:
    tensor.data.copy_(torch.from_numpy(new))


@pytest.mark.parametrize("refill", [refill_numpy, refill_data])
@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens", "attention_mask", "seq_idx"])
def test_memory_that_is_used_again(refill: Any, named: str) -> None:
    """A data loader's buffer gets another batch, of which torch sees nothing."""
    model, dense = llama(), llama("sdpa")
    ids = padded()[0][:1, :12]
    lengths = [(6, 6), (9, 3)]
    batches = {
        "position_ids": [np.concatenate([np.arange(length) for length in each])[None] for each in lengths],
        "seq_idx": [np.repeat([0, 1], each)[None] for each in lengths],
        "cu_seq_lens": [np.array([0, first, 12]) for first, _ in lengths],
        "attention_mask": [np.array([[0] * (12 - last) + [1] * last]) for _, last in lengths],
    }[named]
    buffer = np.zeros_like(batches[0])
    tensor = torch.from_numpy(buffer)
    options: dict[str, Any] = {named: tensor}
    if named == "cu_seq_lens":
        options = {"cu_seq_lens_q": tensor, "cu_seq_lens_k": tensor}
    for batch, (first, last) in zip(batches, lengths, strict=True):
        refill(buffer, tensor, batch)
        with torch.no_grad():
            out = model(ids, use_cache=False, **options).logits[0]
            parts = [ids[:, 12 - last :]] if named == "attention_mask" else list(ids.split([first, last], dim=1))
            expected = torch.cat([dense(part, use_cache=False).logits[0] for part in parts])
        torch.testing.assert_close(out[-len(expected) :], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens", "attention_mask"])
def test_inference_mode_leaves_nothing_behind(named: str) -> None:
    """The same tensors in a forward under inference_mode and in a training step."""
    model = llama()
    ids = padded()[0][:1, :12]
    boundaries = torch.tensor([0, 5, 12])
    options: dict[str, Any] = {
        "position_ids": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]},
        "cu_seq_lens": {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries},
        "attention_mask": {"attention_mask": (torch.arange(12) > 2)[None].long()},
    }[named]
    with torch.inference_mode():
        model(ids, use_cache=False, **options)
    model(ids, use_cache=False, **options).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill under autocast", "decode under autocast"])
def test_autocast_for_a_part(prefill: bool) -> None:
    ids, mask = padded()
    model = llama()
    cache = moba.make_cache(model)
    expected = step(llama("eager"), ids, mask, 0, 20, None)[:, 15:]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=prefill):
        step(model, ids, mask, 0, 15, cache)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not prefill):
        actual = step(model, ids, mask, 15, 20, cache)
    # bfloat16 keeps 8 bits; what is compared has passed two layers of matrix products with it, at values of about 5.
    torch.testing.assert_close(actual.float(), expected, atol=0.5, rtol=0.1)


# --------------------------------------------------------------------------------------------------- masks and packing


@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("dense_layers", [(), (0, 1)], ids=str)
@pytest.mark.parametrize("hidden", [[], [10, 11], [0, 1], [4, 5, 6, 7], [2, 8], range(6)], ids=str)
def test_a_mask_and_packing_hold_together(named: str, hidden: Any, dense_layers: tuple[int, ...]) -> None:
    """Each sequence's real tokens are as alone, with sparse blocks too."""
    moba.register(block_size=2, top_k=2, dense_layers=dense_layers)
    model = llama()
    ids = padded()[0][:1, :12]
    mask = torch.ones_like(ids)
    mask[0, list(hidden)] = 0
    boundaries = torch.tensor([0, 6, 12], dtype=torch.int32)
    positions = torch.cat([(part.cumsum(0) - 1).clamp(min=0) for part in mask[0].split(6)])[None]
    options: dict[str, Any] = {"position_ids": positions}
    if named == "cu_seq_lens":
        options |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 6, "max_length_k": 6}
    if named == "seq_idx":
        options["seq_idx"] = torch.tensor([[0] * 6 + [1] * 6], dtype=torch.int32)
    out = model(ids, attention_mask=mask, use_cache=False, **options).logits[0]
    for part in (slice(0, 6), slice(6, 12)):
        real = mask[0, part].bool()
        if real.any():
            alone = model(ids[0, part][real][None], use_cache=False).logits[0]
            torch.testing.assert_close(out[part][real], alone, atol=1e-4, rtol=1e-4)


def test_packed_sequences_in_a_cache_are_not_gone_on_with() -> None:
    model = llama()
    ids = padded()[0][:1]
    cache = moba.make_cache(model)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        model(ids[:, :12], position_ids=packed, past_key_values=cache)
        with pytest.raises(ValueError, match="several sequences in a row"):
            model(ids[:, 12:13], past_key_values=cache)
    assert cache.get_seq_length() == 12
