"""README.md and docs/: every python block runs, every public name is in the reference, and links lead somewhere."""

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import topgather as tg
from tests.package import documents

ROOT = documents.ROOT
PAGES = documents.pages()
OVER_RANKS = [page for page in PAGES if documents.num_ranks(page)]


@pytest.fixture(autouse=True)
def put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write into a folder of their own, and what they set of transformers' integration is put back."""
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    yield
    if "topgather.integrations.transformers" in sys.modules:
        tg.integrations.transformers.register()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OVER_RANKS])
def test_blocks_run(page: str) -> None:
    text = (ROOT / page).read_text()
    for package, used in (
        ("transformers", "from transformers import"),
        ("matplotlib", "tg.viz."),
        ("safetensors", ".save("),
    ):
        if used in text and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if "cache=cache" in text:
        llama = pytest.importorskip("transformers").LlamaForCausalLM
        if "cache" not in inspect.signature(llama.forward).parameters:
            pytest.skip("names of this version of transformers")
    documents.run(page)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_blocks_run_over_ranks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.package.documents", *OVER_RANKS],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_block_that_fails_is_named() -> None:
    with pytest.raises(NameError, match="nobody made model"):
        documents.run("page.md", "<!-- needs: no_such_package -->\n```python\nmodel(1)\n```\n")
    with pytest.raises(NameError, match="model"):
        documents.run("page.md", "```python\nmodel(1)\n```\n")
    text = "<!-- needs: no_such_package -->\n```python\nx = 1\n```\n\n```python\ny = x\n```\n"
    assert documents.run("page.md", text)["y"] is None


def test_the_text_for_package_indexes_stands_alone() -> None:
    """An index shows it without the repository: no relative link or picture."""
    readme = re.search(r'^readme = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert readme
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / readme[1]).read_text())
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    there = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    modules = [tg, tg.nn, tg.models, tg.compat, tg.reference, tg.viz, tg.distributed, tg.advisor, tg.optim]
    names = {
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if not isinstance(getattr(module, name), ModuleType)
    }
    names -= {"topgather.advisor.advise", "topgather.advisor.advise_memory"}  # topgather.advise, advise_memory
    of_transformers = ("register", "set_moba", "make_cache", "add_ngram_memory")
    names |= {f"topgather.integrations.transformers.{name}" for name in of_transformers}
    assert there == names
