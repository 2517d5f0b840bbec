"""What the documentation site needs beside mkdocs.yml: pages from outside docs/, and links in docstrings.

mkdocs loads this file as a hook, griffe as an extension. A docstring's ``:func:`name` `` becomes a link to the page of
the reference that has the name; one that no page has stays a link to nowhere, which fails a strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the repository that the site has too, where they stand.
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
# Classes without a page, whose methods stand with those that inherit them.
SHOWN_AS = {"BaseCache": "MobaCache"}
ROLE = re.compile(r":(func|class|meth|mod|attr|data):`([^`]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, with links as they are from within."""
    for name in OUTSIDE:
        text = (ROOT / name).read_text()
        files.append(File.generated(config, name, content=re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ for one of those pages lead to it."""
    up = "../" * page.file.src_uri.count("/")
    for name in OUTSIDE:
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{name}")
    return markdown


def documented() -> list[str]:
    """Every name that a page of the reference documents."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def public_name(name: str, path: str, names: list[str]) -> str:
    """The documented name that ``name``, in the docstring of the object at ``path``, means."""
    if name in names:
        return name
    owner, _, last = name.rpartition(".")
    modules = path.split(".")
    if owner and owner.split(".")[0] != "topgather":  # a method by its class
        return f"{public_name(owner, path, names)}.{last}"
    found = [one for one in names if one.rpartition(".")[2] == last]
    for module in ("distributed", "reference", "compat"):
        near = [one for one in found if one.split(".")[1] == module]
        if near and (module in modules or f"_{module}" in modules):
            return near[0]
    return min(found, key=len) if found else name


class Roles(griffe.Extension):
    """Turns the roles of docstrings into links of the site."""

    def __init__(self) -> None:
        self.names = documented()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            role, name = match.groups()
            if role == "mod" and name not in self.names:
                return f"`{name}`"  # pages have no module as a whole
            parent = obj if obj.is_class else obj.parent
            if role in ("meth", "attr") and "." not in name and parent is not None and parent.is_class:
                owner = SHOWN_AS.get(parent.name, parent.name)
                target = f"{public_name(owner, obj.path, self.names)}.{name}"
            else:
                target = public_name(name, obj.path, self.names)
            if role == "attr":
                target = target.rpartition(".")[0]  # its class, whose docstring has it
            return f"[`{name}`][{target}]"

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
