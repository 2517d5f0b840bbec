"""What a newcomer meets first: names, docstrings, annotations, the version, the self-check."""

import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch

import topgather as tg

MOBA_FUNCTIONS = ["moba_attention", "moba_attention_varlen", "moba_route", "moba_route_varlen", "block_centroids"]
DECODE_FUNCTIONS = ["moba_decode"]
KEY_CONV_FUNCTIONS = ["key_conv"]
MEMORY_FUNCTIONS = ["product_key_topk", "memory_lookup", "expert_lookup", "quantized_lookup", "ngram_hash"]
GRID_FUNCTIONS = ["grid_attention", "window_attention"]
INDEX_FUNCTIONS = ["index_route", "index_loss"]
ATTENTION_FUNCTIONS = [*MOBA_FUNCTIONS, *DECODE_FUNCTIONS, *KEY_CONV_FUNCTIONS, *INDEX_FUNCTIONS]
FUNCTIONS = [*ATTENTION_FUNCTIONS, *MEMORY_FUNCTIONS, *GRID_FUNCTIONS]
SOURCES = {
    **{name: ["2502.13189"] for name in [*MOBA_FUNCTIONS, *DECODE_FUNCTIONS]},
    "key_conv": ["2511.11571"],
    "index_route": ["2606.13392", "2512.02556"],
    "index_loss": ["2606.13392"],
    "product_key_topk": ["2412.09764", "1907.05242"],
    "memory_lookup": ["2412.09764"],
    "expert_lookup": ["2407.04153", "2412.09764"],
    "quantized_lookup": ["2412.09764"],
    "ngram_hash": ["2601.07372"],
    "grid_attention": ["2412.14598", "2204.01697"],
    "window_attention": ["2103.14030", "2412.14598"],
}


def public_objects() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method of the package."""
    modules: list[ModuleType] = [tg, tg.advisor, tg.reference, tg.compat, tg.nn, tg.optim, tg.models, tg.viz]
    modules.append(tg.distributed)
    if importlib.util.find_spec("transformers"):
        modules.append(tg.integrations.transformers)
    for module in modules:
        for name in module.__all__:
            found = getattr(module, name)
            if isinstance(found, ModuleType) or not callable(found):
                continue
            yield f"{module.__name__}.{name}", found
            if inspect.isclass(found):
                for method_name, method in vars(found).items():
                    if inspect.isfunction(method) and not method_name.startswith("_"):
                        yield f"{module.__name__}.{name}.{method_name}", method


PUBLIC = dict(public_objects())


def test_names_promised() -> None:
    classes = ["BlockRouting", "RoutingRecord", "record_routing", "replay_routing", "MobaCache", "PagedMobaCache"]
    for name in [*FUNCTIONS, *classes, "compat", "nn", "optim", "reference"]:
        assert name in tg.__all__, name
        assert hasattr(tg, name)
    assert set(tg.__all__) <= set(dir(tg))
    for name in FUNCTIONS:
        assert f"topgather.{name}" in PUBLIC


def test_what_is_filled_says_how_it_is_copied() -> None:
    """``copy.copy`` of a class that says nothing shares tensors, and an append to the copy changes the original."""
    filled = {name: found for name, found in PUBLIC.items() if inspect.isclass(found) and hasattr(found, "append")}
    assert {"topgather.MobaCache", "topgather.PagedMobaCache", "topgather.distributed.ShardedCache"} <= filled.keys()
    for name, found in filled.items():
        assert hasattr(found, "__copy__") and hasattr(found, "__deepcopy__"), name


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_every_argument(name: str) -> None:
    found = PUBLIC[name]
    assert found.__doc__ and len(found.__doc__.strip()) > 20, f"{name} has no docstring"
    text = found.__doc__ + (getattr(found.__init__, "__doc__", None) or "" if inspect.isclass(found) else "")
    missing = [
        argument
        for argument in inspect.signature(found).parameters
        if argument not in ("self", "args", "kwargs") and not re.search(rf"\b{argument}\b", text)
    ]
    if not name.endswith(".forward") and not name.endswith(".extra_repr"):
        assert not missing, f"{name} does not document {missing}"


@pytest.mark.parametrize("name", PUBLIC)
def test_annotations_are_complete(name: str) -> None:
    found = PUBLIC[name]
    function = found.__init__ if inspect.isclass(found) else found
    hints = get_type_hints(function)
    parameters = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    assert set(parameters) <= set(hints), f"{name}: {set(parameters) - set(hints)} have no annotation"
    assert "return" in hints or inspect.isclass(found), f"{name} has no return annotation"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_cite_their_source_and_errors(name: str) -> None:
    text = getattr(tg, name).__doc__
    assert all(source in text for source in SOURCES[name]) and "Raises" in text and "Returns" in text


def test_signatures() -> None:
    """The call a user writes, argument by argument."""
    defaults = {
        name: {
            parameter.name: parameter.default
            for parameter in inspect.signature(getattr(tg, name)).parameters.values()
            if parameter.default is not inspect.Parameter.empty
        }
        for name in FUNCTIONS
    }
    forced = {"force_first": 0, "force_last": 1}
    scores = {"softcap": None, "sinks": None, **forced, "window": None}
    attention = {
        "block_size": 128,
        "top_k": None,
        "is_causal": True,
        "scale": None,
        "return_lse": False,
        "routing": None,
        "deterministic": None,
        **scores,
    }
    route = {"block_size": 128, "top_k": 8, "is_causal": True, **forced}
    assert defaults == {
        "moba_attention": attention,
        "moba_attention_varlen": attention,
        "moba_route": route,
        "moba_route_varlen": route,
        "block_centroids": {"block_size": 128, "cu_seqlens": None, "max_seqlen": None},
        "moba_decode": {"top_k": 8, "scale": None, "num_tokens": None, "return_lse": False, "routing": None, **scores},
        "index_route": {
            "block_size": 128,
            "top_k": 16,
            "reduction": "max",
            "is_causal": True,
            "force_first": 0,
            "force_last": 1,
            "num_choices": None,
            "weights": None,
        },
        "index_loss": {
            "routing": None,
            "block_size": 128,
            "reduction": "max",
            "is_causal": True,
            "scale": None,
            "index_scale": None,
            "num_choices": None,
            "weights": None,
        },
        "key_conv": {"cu_seqlens": None, "state": None, "bias": None, "activation": "silu"},
        "product_key_topk": {},
        "memory_lookup": {
            "weights": None,
            "sparse_grad": False,
            "offsets": None,
            "mode": "sum",
            "padding_idx": None,
            "include_last_offset": False,
        },
        "expert_lookup": {"activation": "gelu", "sparse_grad": False},
        "quantized_lookup": {
            "weights": None,
            "offsets": None,
            "mode": "sum",
            "padding_idx": None,
            "include_last_offset": False,
            "dtype": torch.float32,
        },
        "ngram_hash": {
            "orders": (2, 3),
            "cu_seqlens": None,
            "state": None,
            "vocab_size": 2**31,
            "end_token": None,
            "seed": 0,
        },
        "grid_attention": {"grid_size": None, "stride": None, "bias": None, "scale": None},
        "window_attention": {"bias": None, "scale": None},
    }


def test_ops_are_registered() -> None:
    moba = ["block_centroids", "moba_route", "moba_attention", "moba_attention_backward"]
    memory = ["product_key_topk", "memory_lookup", "memory_dot", "memory_backward", "memory_backward_sparse"]
    memory += ["memory_lookup_quantized", "memory_dot_quantized"]
    memory += ["memory_update", "memory_grad_square"]
    decode = ["moba_cache_append", "moba_decode_route", "moba_decode"]
    rest = ["grid_attention", "grid_attention_backward", "key_conv", "key_conv_backward"]
    index = ["index_route", "index_loss", "index_loss_backward"]
    for name in [*moba, *decode, *memory, *rest, *index]:
        assert str(getattr(torch.ops.topgather, name).default._schema).startswith(f"topgather::{name}(")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.-].*)?", tg.__version__)
    try:
        installed = importlib.metadata.version("topgather")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("topgather runs from its source tree, not installed")
    assert installed == tg.__version__


def test_package_is_typed() -> None:
    assert tg.__file__ is not None
    assert (Path(tg.__file__).parent / "py.typed").exists()


def test_self_check_runs() -> None:
    """``python -m topgather`` reports the build and the machine, checks itself, and exits 0."""
    done = subprocess.run([sys.executable, "-m", "topgather"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tg.__version__ in done.stdout
    for target in tg._native.available_cpu_targets():
        assert target in done.stdout
    assert "CUDA" in done.stdout


def test_import_is_quiet() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import topgather"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_modules_that_need_more_are_loaded_at_their_first_use() -> None:
    script = (
        "import sys, topgather as tg\n"
        "assert {'distributed', 'viz'} <= set(dir(tg))\n"
        "assert not {'topgather.distributed', 'topgather.viz', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "tg.distributed.MemoryColwise, tg.viz.routing\n"
        "assert 'topgather.viz' in sys.modules and 'matplotlib' not in sys.modules\n"
        "try: tg.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
