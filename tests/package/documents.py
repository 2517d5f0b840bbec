"""The python blocks of README.md and docs/: what they need, and how they run.

Blocks of a page run in order, in one namespace. A comment before a block says what it needs that not every machine has:

    <!-- needs: cuda -->    runs where there is a CUDA device; of the rest see below
    <!-- needs: NAME -->    runs where the package NAME can be imported
    <!-- ranks: 4 -->       at the top of a page: all of its blocks run in as many processes

Where something is missing the block is compiled, and every name in it must be one that the page has made by then.

    python -m tests.package.documents PAGE...    runs pages with ranks, each of which is a process
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- needs: ([\w, ]+) -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODULE = "page_of_the_documentation"
RANKS = re.compile(r"^<!-- ranks: (\d+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    line: int  # of the page, from 1: where the code starts
    code: str
    needs: tuple[str, ...]


def pages() -> list[str]:
    """Every page with a python block, by its path in the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found if "```python" in path.read_text()]


def num_ranks(page: str) -> int:
    """How many processes the page's blocks run in; 0 if it asks for none."""
    found = RANKS.search((ROOT / page).read_text())
    return int(found[1]) if found else 0


def blocks(text: str) -> list[Block]:
    """The python blocks of a page's text."""
    return [
        Block(text[: match.start(2)].count("\n") + 1, match[2], tuple(re.findall(r"\w+", match[1] or "")))
        for match in BLOCK.finditer(text)
    ]


def is_here(need: str) -> bool:
    """Whether this machine has what a block needs."""
    if need == "cuda":
        import torch

        return torch.cuda.is_available()
    return importlib.util.find_spec(need) is not None


def made_by(code: str) -> set[str]:
    """Names that the code makes."""
    nodes = list(ast.walk(ast.parse(code)))
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return made | {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


def unknown_names(code: str, known: set[str]) -> list[str]:
    """Names that the code reads and that neither it nor the page before it makes."""
    nodes = ast.walk(ast.parse(code))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(read - made_by(code) - known - set(dir(builtins)))


def run(page: str, text: str | None = None) -> dict[str, Any]:
    """Run a page's blocks, in the folder that is current; returns what they left."""
    text = (ROOT / page).read_text() if text is None else text
    # A module, for what a page makes may be looked up by its module's name, as torch's compiler does.
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    try:
        for block in blocks(text):
            # Lines of the page, so that a traceback names them.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec", dont_inherit=True)
            if all(is_here(need) for need in block.needs):
                exec(code, vars(module))
                continue
            unknown = unknown_names(block.code, set(vars(module)))
            if unknown:
                raise NameError(f"{page}, line {block.line}: nobody made {', '.join(unknown)}")
            for name in made_by(block.code):
                vars(module).setdefault(name, None)
    finally:
        del sys.modules[MODULE]
    return vars(module)


def run_over_ranks(page: str) -> None:
    """Run a page in as many processes as it asks for; raises if one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(num_ranks(page)):
            child = os.fork()  # what is imported by now is there already
            if child == 0:
                code = 1
                try:
                    os.chdir(folder)
                    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
                    run(page)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{page}: ranks ended with {codes}")


if __name__ == "__main__":
    import socket

    import torch

    # Once, before the processes part.
    for module in ("torch.distributed.tensor.parallel", "torch.distributed.fsdp", "topgather.distributed"):
        importlib.import_module(module)
    if is_here("transformers"):
        importlib.import_module("transformers.models.llama.modeling_llama")
        importlib.import_module("topgather.integrations.transformers")
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ["WORLD_SIZE"] = str(num_ranks(name))
        run_over_ranks(name)
