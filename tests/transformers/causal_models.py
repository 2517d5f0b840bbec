"""Every causal model of the installed transformers, small enough to build in milliseconds, and what becomes of it.

``python -m tests.transformers.causal_models`` writes the table of docs/transformers.md.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor

from topgather.integrations import transformers as moba
from topgather.integrations._arguments import REFUSED
from topgather.integrations._models import other_layers

from .small_models import NOT_BUILT, build, class_and_config, kinds

DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN, END = "<!-- causal models: begin -->\n", "<!-- causal models: end -->\n"

# Whether the table of the docs is of the transformers that is installed.
IS_OF_TABLE = version.parse(transformers.__version__).release[:2] >= (5, 24)

NEW, PROMPT = 6, 12


def inputs() -> tuple[Tensor, Tensor]:
    """Token ids ``[2, PROMPT]``, and a mask that pads the second row on the left."""
    ids = torch.randint(3, 60, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def generated(model: Any, mask: Tensor | None = None, num_new: int = NEW, use_cache: bool = True) -> Tensor:
    """Logits ``[2, num_new, V]`` of greedy generation."""
    ids, _ = inputs()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=63,
        decoder_start_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=use_cache,
    )
    return torch.stack(out.logits, dim=1)


def _all_runs(kind: str, implementation: str) -> dict[str, Tensor]:
    ids, mask = inputs()
    model = build(kind, implementation)
    with torch.no_grad():
        runs = {"prefill": model(ids).logits, "6 tokens": generated(model)}
    runs |= {"padded": generated(model, mask), "without a cache": generated(model, use_cache=False)}
    if implementation != "moba":  # which does not know how many will follow
        return runs | {"2 tokens": runs["6 tokens"][:, :2]}
    return runs | {"2 tokens": generated(build(kind, implementation), num_new=2)}


def _differing(runs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By how much of the largest logit: where that is more than sums of float32 in another order, in two layers."""
    errors = {run: ((runs[run] - logits).abs().max() / logits.abs().max()).item() for run, logits in expected.items()}
    return {run: error for run, error in errors.items() if not error < 1e-4}


def outcome(kind: str) -> str:
    """What becomes of a kind of model: a row of the table.

    Raises:
        AssertionError: a result that is not eager attention's, or a refusal that does not name the model.
        Exception: whatever a model raises that is no refusal, or its class, if small_models.py does not say why.
    """
    if kind in NOT_BUILT:
        exception, word, why = NOT_BUILT[kind]
        try:
            build(kind, "eager")
        except exception as error:
            assert word in str(error), f"{kind}: {error}"
            return f"not tried: {why}"
        raise AssertionError(f"{kind} can be built")
    moba.register(block_size=4, top_k=64)  # more than there are: all of them
    try:
        actual = _all_runs(kind, "moba")
    except (ValueError, NotImplementedError) as error:
        if 'attn_implementation="moba"' not in str(error):
            raise
        return f"refused: {_reason(kind, str(error))}"
    expected, equal_to = _all_runs(kind, "eager"), "eager"
    differing = _differing(actual, expected)
    if differing and not IS_OF_TABLE:  # its own two differ there as well: Moshi's eager was not causal
        others = _all_runs(kind, "sdpa")
        assert differing.keys() == _differing(others, expected).keys(), f"{kind}: differs from eager: {differing}"
        expected, equal_to, differing = others, "sdpa", _differing(actual, others)
    assert not differing, f"{kind}: differs from {equal_to}, by so much of the largest logit: {differing}"
    moba.register(block_size=4, top_k=2)
    sparse = build(kind, "moba")
    # What a cache changes of `eager`: little where a state is summed in another order, which a softmax of fewer keys
    # makes more of; all of Moshi.
    own = (expected["6 tokens"] - expected["without a cache"]).abs().max().item()
    if own < 0.1:
        atol = max(1e-3, 10 * own)
        torch.testing.assert_close(generated(sparse), generated(sparse, use_cache=False), atol=atol, rtol=1e-3)
    others = other_layers(sparse.config.get_text_config(decoder=True))
    return f"equals `{equal_to}`" + (f"; layers of {' and '.join(others)} keep their own way" if others else "")


def _reason(kind: str, message: str) -> str:
    """The refusal without the model's name, which has to be there."""
    model_class, _ = class_and_config(kind)
    classes = {name for name, _ in inspect.getmembers(inspect.getmodule(model_class), inspect.isclass)}
    named = [name for name in re.findall(r"\w+", message) if name in classes]
    assert named, f"{kind}: a refusal must name the model or its module: {message}"
    for name in named:
        message = re.sub(rf"\b{name} does not work with .*?: | (in|of) {name}\b", "", message)
    return message.split(", got ")[0].removesuffix(f" (transformers {transformers.__version__})")


@dataclass
class Asked:
    """What models hand to transformers' attention interface."""

    num_calls: int = 0
    masks: set[int] = field(default_factory=set)  # their dimensions; those that models make themselves have 4
    is_causal: set[bool] = field(default_factory=set)
    names: set[str] = field(default_factory=set)  # of arguments that are not None


def register_zeros() -> Asked:
    """Add an attention "zeros", which gives zeros and notes what it is handed."""
    asked = Asked()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        asked.num_calls += 1
        asked.masks.add(0 if mask is None else mask.ndim)
        asked.names.update(name for name, given in kwargs.items() if given is not None)
        is_causal = kwargs.get("is_causal")
        asked.is_causal.add(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    transformers.AttentionInterface.register("zeros", attention)
    transformers.AttentionMaskInterface.register("zeros", lambda *_, attention_mask=None, **__: attention_mask)
    return asked


def _asked(kind: str) -> Asked | None:
    """None where a model takes no attention that it does not know."""
    asked = register_zeros()
    try:
        model = build(kind, "zeros")
    except (KeyError, ValueError):
        return None
    with torch.no_grad():
        model(inputs()[0])
    with contextlib.suppress(Exception):  # some look into the mask of padding that is made here
        generated(model, inputs()[1])
    return asked


def is_due_to_the_version(kind: str, refusal: str) -> bool:
    """Whether what is refused is what an older transformers does, as its model shows: not for want of reading it."""
    documented = rows_of_docs().get(kind, "")
    if refusal == documented or (" has " in refusal and refusal.split(" has ")[0] == documented.split(" has ")[0]):
        return True
    asked, argument = _asked(kind), refusal.removeprefix("refused: ").partition(" is not supported by")[0]
    if "computes its attention itself" in refusal:
        return asked is None or asked.num_calls == 0
    if asked is None:
        return False
    return (
        ("attention_mask must have 2 dimensions" in refusal and 4 in asked.masks)
        or ("is_causal must be True" in refusal and False in asked.is_causal)
        or argument in asked.names & REFUSED.keys()
        or ("never asked transformers' attention interface" in refusal and asked.num_calls == 0)
    )


def fails_by_itself(kind: str, error: Exception) -> bool:
    """Whether an older transformers raises the same for the model's own attention."""
    try:
        _all_runs(kind, "eager")
    except type(error) as own:
        return str(own) == str(error)
    return False


def table(outcomes: dict[str, str]) -> str:
    """Markdown: the kinds of each outcome."""
    rows: dict[str, list[str]] = {}
    for kind, result in outcomes.items():
        rows.setdefault(result, []).append(kind)
    lines = ["| outcome | `config.model_type` |", "|---|---|"]
    lines += [f"| {result} | {', '.join(found)} |" for result, found in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def rows_of_docs() -> dict[str, str]:
    """The outcome that docs/transformers.md gives for each kind."""
    text = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {kind: result for result, found in rows for kind in found.split(", ")}


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)  # these models are too small for more
    transformers.logging.set_verbosity_error()
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    outcomes = {}
    for kind in kinds():
        try:
            outcomes[kind] = outcome(kind)
        except Exception as error:
            outcomes[kind] = f"FAULT: {type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        print(kind, outcomes[kind], flush=True)
    DOCS.write_text(before + BEGIN + table(outcomes) + END + after)


if __name__ == "__main__":
    main()
