"""Every causal model of the installed transformers, small enough to build in milliseconds, and what becomes of it.

``python -m tests.transformers.causal_models`` writes the table of docs/transformers.md.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from topgather.integrations import transformers as moba
from topgather.integrations._models import other_layers

from .small_models import NOT_BUILT, build, class_and_config, kinds

DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN, END = "<!-- causal models: begin -->\n", "<!-- causal models: end -->\n"

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
    if implementation == "eager":  # which does not know how many will follow
        return runs | {"2 tokens": runs["6 tokens"][:, :2]}
    return runs | {"2 tokens": generated(build(kind, implementation), num_new=2)}


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
    expected = _all_runs(kind, "eager")
    for run, logits in expected.items():
        # Sums of float32 in another order, through two layers; relative to the largest logit.
        error = ((actual[run] - logits).abs().max() / logits.abs().max()).item()
        assert error < 1e-4, f"{kind}: {run} differs from eager by {error:.1e} of the largest logit"
    moba.register(block_size=4, top_k=2)
    sparse = build(kind, "moba")
    # What a cache changes of `eager`: little where a state is summed in another order, which a softmax of fewer keys
    # makes more of; all of Moshi.
    own = (expected["6 tokens"] - expected["without a cache"]).abs().max().item()
    if own < 0.1:
        atol = max(1e-3, 10 * own)
        torch.testing.assert_close(generated(sparse), generated(sparse, use_cache=False), atol=atol, rtol=1e-3)
    others = other_layers(sparse.config.get_text_config(decoder=True))
    return "equals `eager`" + (f"; layers of {' and '.join(others)} keep their own way" if others else "")


def _reason(kind: str, message: str) -> str:
    """The refusal without the model's name, which has to be there."""
    model_class, _ = class_and_config(kind)
    classes = {name for name, _ in inspect.getmembers(inspect.getmodule(model_class), inspect.isclass)}
    named = [name for name in re.findall(r"\w+", message) if name in classes]
    assert named, f"{kind}: a refusal must name the model or its module: {message}"
    for name in named:
        message = re.sub(rf"\b{name} does not work with .*?: | (in|of) {name}\b", "", message)
    return message.split(", got ")[0]


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
