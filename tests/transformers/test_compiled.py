"""Models under ``torch.compile(fullgraph=True)`` give what they give without: forwards, training, decoding."""

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers import StaticCache

from topgather.integrations import transformers as moba

from .test_integration import Family, Model, llama, padded, qwen3, tokens

LENGTH = 30


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    torch._dynamo.reset()
    moba.register(block_size=8, top_k=2)
    yield
    moba.register()


def compiled(model: Model, backend: Any = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def batch(side: str | None) -> dict[str, Tensor]:
    if side is None:
        return {"input_ids": tokens(2, LENGTH)}
    ids, mask = padded([LENGTH, 17], side)
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """Where there is a token: sums of float32, perhaps in another order, through two layers."""
    real = inputs["input_ids"] > 0
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "side"), [(llama, "left"), (qwen3, None)], ids=["llama-padded", "qwen3"])
def test_a_training_step(family: Family, side: str | None) -> None:
    """A dense layer too. The forward is part of it."""
    inputs = batch(side)
    labels = inputs["input_ids"].where(inputs["input_ids"] > 0, -100)
    models = [family(moba_dense_layers=[1]).train() for _ in range(2)]
    runs = [compiled(models[0]), models[1]]
    for _ in range(2):
        actual, expected = (run(**inputs, labels=labels, use_cache=False) for run in runs)
        assert_close(actual.logits, expected.logits, inputs)
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
        for out, model in zip((actual, expected), models, strict=True):
            out.loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "side"), [(llama, None), (qwen3, "left")], ids=["llama", "qwen3-padded"])
def test_decoding_with_a_static_cache(family: Family, side: str | None) -> None:
    """One graph for the prompt, one for all tokens, where the mask has one width."""
    model, inputs = family(moba_dense_layers=[1]), batch(side)
    counter = CompileCounterWithBackend("aot_eager")
    outs = []
    for run in (compiled(model, counter), model):
        cache = StaticCache(config=model.config, max_cache_len=40)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[:, :LENGTH] = inputs.get("attention_mask", mask[:, :LENGTH])
        given = {} if side is None else {"attention_mask": mask}
        steps = [inputs["input_ids"], *(torch.full((2, 1), token) for token in range(3, 8))]
        logits, start = [], 0
        for ids in steps:
            if "cache_position" in inspect.signature(type(model).forward).parameters:  # needed by older versions
                given["cache_position"] = torch.arange(start, start + ids.shape[1])
            with torch.no_grad():
                logits.append(run(ids, past_key_values=cache, **given).logits)
            start += ids.shape[1]
        outs.append(logits)
    assert_close(outs[0][0], outs[1][0], inputs)
    torch.testing.assert_close(torch.cat(outs[0][1:], 1), torch.cat(outs[1][1:], 1), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2


def test_a_model_compiled_by_inductor() -> None:
    model, inputs = llama(num_hidden_layers=1), batch("left")
    with torch.no_grad():
        actual, expected = (run(**inputs, use_cache=False).logits for run in (compiled(model, "inductor"), model))
    assert_close(actual, expected, inputs)


def test_sequences_in_a_row_that_are_not_told_are_refused() -> None:
    """By the graph, when it runs: position ids that start anew."""
    model, ids = llama(), tokens(1, LENGTH)
    position_ids = torch.cat([torch.arange(12), torch.arange(LENGTH - 12)])[None]
    with torch.no_grad(), pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        compiled(model)(ids, position_ids=position_ids, use_cache=False)


def test_sequences_in_a_row_beside_a_mask() -> None:
    """Boundaries are followed within what the mask leaves."""
    model = llama()
    ids, mask = padded([LENGTH, LENGTH - 4], "right")
    ids, mask = ids[1:], mask[1:]
    boundaries = torch.tensor([0, 12, LENGTH], dtype=torch.int32)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.cat([torch.arange(12), torch.arange(18)])[None],
    }
    inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 18, "max_length_k": 18}
    with torch.no_grad():
        actual, expected = (run(**inputs, use_cache=False).logits for run in (compiled(model), model))
        apart = model(ids[:, 12 : LENGTH - 4], use_cache=False).logits
    assert_close(actual, expected, {"input_ids": ids})
    torch.testing.assert_close(actual[:, 12 : LENGTH - 4], apart, atol=1e-4, rtol=1e-4)
