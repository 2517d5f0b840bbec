"""Where versions of transformers differ: what is given to a cache, and under which name."""

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers import DynamicCache, LlamaForCausalLM

from topgather.integrations import transformers as moba

from .causal_models import IS_OF_TABLE
from .test_integration import holds_moba_layers, llama, tokens


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register(block_size=8, top_k=2)
    yield
    moba.register()


@pytest.mark.parametrize("number", [0, -4, torch.tensor(-4), -30], ids=str)
def test_a_cache_is_cut_as_the_stock_cache(number: Any) -> None:
    """0 is all of it in older versions, which give the length to keep; assisted generation gave tensors."""
    ids = tokens(1, 30)
    lengths = []
    for replace_cache in (False, True):
        moba.register(block_size=8, top_k=2, replace_cache=replace_cache)
        model, cache = llama(), DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.crop(number)
        lengths.append(cache.get_seq_length())
    assert holds_moba_layers(cache) and cache.layers[0].moba_cache.lengths == [lengths[1]]
    assert lengths[0] == lengths[1]


def test_a_cache_that_the_model_would_not_read_is_refused() -> None:
    """Under the name of newer versions of transformers."""
    model = llama()
    with torch.no_grad():
        if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters:
            cache = DynamicCache()
            model(tokens(1, 20), cache=cache)
            assert cache.get_seq_length() == 20
        else:
            assert not IS_OF_TABLE
            with pytest.raises(ValueError, match="cache is no argument of LlamaForCausalLM in transformers"):
                model(tokens(1, 20), cache=DynamicCache())
