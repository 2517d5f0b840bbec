"""nvcc, with its results kept under ``build/ptx`` by the content of everything that went into them."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CACHE = PROJECT / "build" / "ptx"
SOURCES = PROJECT / "csrc"


def nvcc() -> str | None:
    """The compiler, or None where there is none."""
    return shutil.which("nvcc")


@cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc() or "nvcc", "--version"], check=True, capture_output=True, text=True).stdout


def included_files(source: Path, include_paths: Sequence[Path]) -> list[Path]:
    """The source and every project header that it includes in quotes, directly or not. Others belong to the toolkit."""
    found: dict[Path, None] = {}
    left = [source.resolve()]
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = [(folder / name).resolve() for folder in (path.parent, *include_paths)]
            left += [candidate for candidate in candidates if candidate.is_file()][:1]
    return list(found)


def compile_to_ptx(source: Path, architecture: str, include_paths: Sequence[Path] = (SOURCES,)) -> str:
    """The PTX of a CUDA source, for an architecture such as ``compute_80``."""
    flags = ["-ptx", "-std=c++20", f"-arch={architecture}", *(f"-I{path}" for path in include_paths)]
    digest = hashlib.sha256(_nvcc_version().encode())
    digest.update(architecture.encode())
    for path in sorted(included_files(source, include_paths), key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = CACHE / f"{source.stem}.{architecture}.{digest.hexdigest()[:24]}.ptx"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Written aside and moved: several test processes may want the same file.
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        command = [nvcc() or "nvcc", *flags, str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        partial.replace(kept)
    return kept.read_text()


def mutated_sources(header: str, replacements: Iterable[tuple[str, str]], folder: Path) -> Path:
    """A copy under ``folder`` of a header of ``csrc`` and what it includes, with text of the header replaced.

    Every text to be replaced must be there exactly once: a mutation that hits nothing would prove nothing.
    """
    for path in included_files(SOURCES / header, [SOURCES]):
        target = folder / path.relative_to(SOURCES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    text = (folder / header).read_text()
    for old, new in replacements:
        if text.count(old) != 1:
            raise ValueError(f"{header} holds this {text.count(old)} times, not once: {old}")
        text = text.replace(old, new)
    (folder / header).write_text(text)
    return folder
