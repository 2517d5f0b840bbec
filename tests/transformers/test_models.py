"""Every causal model of the installed transformers equals its eager attention, or is refused in words."""

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers

from topgather.integrations import transformers as moba

from . import causal_models

transformers.logging.set_verbosity_error()


WORK_EVERYWHERE = {"deepseek_v3", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "llama", "mistral", "phi3", "qwen2", "qwen3"}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register()
    yield
    moba.register()


@pytest.mark.parametrize("kind", causal_models.kinds())
def test_a_causal_model(kind: str) -> None:
    """And docs/transformers.md says which of the two; `python -m tests.transformers.causal_models` writes it.

    With a transformers older than that page's, a model may be refused for what it does itself there, and is looked at.
    """
    if causal_models.IS_OF_TABLE:
        assert causal_models.outcome(kind) == causal_models.rows_of_docs().get(kind)
        return
    try:
        outcome = causal_models.outcome(kind)
        is_equal = outcome.startswith("equals")
        assert is_equal or causal_models.is_due_to_the_version(kind, outcome), outcome
        assert is_equal or kind not in WORK_EVERYWHERE
    except Exception as error:
        if isinstance(error, AssertionError) or not causal_models.fails_by_itself(kind, error):
            raise
        pytest.skip(f"{kind} fails with its own attention too: {type(error).__name__}: {str(error)[:100]}")
