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


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register()
    yield
    moba.register()


@pytest.mark.parametrize("kind", causal_models.kinds())
def test_a_causal_model(kind: str) -> None:
    """And docs/transformers.md says which of the two; `python -m tests.transformers.causal_models` writes it."""
    assert causal_models.outcome(kind) == causal_models.rows_of_docs().get(kind)
