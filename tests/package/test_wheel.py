"""What lets one module serve older systems and every CPython: symbol versions, the limited API, threads."""

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import topgather as tg

ROOT = Path(__file__).resolve().parents[2]
MODULE = Path(tg._native.__file__)
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")

needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.libc_ver()[0] != "glibc", reason="needs objdump, of a glibc system"
)


@pytest.fixture(scope="module")
def wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_tool", ROOT / "tools" / "wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wheel_tool"] = module
    spec.loader.exec_module(module)
    return module


# --- symbol versions -------------------------------------------------------------------------------------------------


@needs_objdump
def test_the_module_runs_on_glibc_2_28(wheel: ModuleType) -> None:
    needs = wheel.read_needs(wheel.symbol_table(MODULE))
    assert any(need.symbol == "dlopen" for need in needs)
    assert wheel.newer_than(needs) == [], "csrc/common/old_glibc.cpp gives old versions"
    libraries = wheel.needed_libraries(MODULE)
    assert [name for name in libraries if not name.startswith(wheel.EXPECTED_LIBRARIES)] == []
    # On glibc before 2.34 the old versions are in these.
    assert {"libdl.so.2", "libpthread.so.0", "librt.so.1"} <= set(libraries)


@needs_objdump
def test_the_module_shows_one_symbol(wheel: ModuleType) -> None:
    lines = wheel.symbol_table(MODULE).splitlines()
    shown = [line.split()[-1] for line in lines if " Base " in line and "*UND*" not in line]
    assert shown == ["PyInit__native"]


def test_newer_symbols_are_found(wheel: ModuleType) -> None:
    table = """
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.34) dlopen
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.2.5) memcpy
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.28) thrd_exit
0000000000000000      DF *UND*\t0000000000000000 (GLIBCXX_3.4.29) _ZSt28__throw_bad_array_new_lengthv
0000000000000000      DF *UND*\t0000000000000000 (GCC_3.0) _Unwind_Resume
000000000045d1d0 g    DF .text\t0000000000000258  Base        PyInit__native
"""
    needs = wheel.read_needs(table)
    assert [need.symbol for need in needs] == ["dlopen", "memcpy", "thrd_exit", "_ZSt28__throw_bad_array_new_lengthv"]
    assert [need.symbol for need in wheel.newer_than(needs)] == ["dlopen", "_ZSt28__throw_bad_array_new_lengthv"]


def test_a_wheel_of_anything_else_is_refused(wheel: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "topgather-0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("topgather/__init__.py", "")
        archive.writestr("topgather-0.dist-info/METADATA", "")
        archive.writestr("tests/test_one.py", "")
    assert wheel.check_content(path) == ["holds tests/test_one.py", "holds 0 modules: []"]


# --- CPython ---------------------------------------------------------------------------------------------------------


def test_the_module_is_of_the_limited_api() -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert MODULE.name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
        assert not sys._is_gil_enabled()  # type: ignore[attr-defined]  # importing it has not brought the lock back
    else:
        assert MODULE.name == "_native.abi3.so"


def test_calls_of_several_threads_do_not_meet() -> None:
    """Arguments, errors and results are a call's own: with a lock or without."""
    inputs = [torch.randn(1, 2, 64 + 16 * i, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [tg.moba_attention(x, x, x, block_size=16, top_k=2) for x in inputs]
    wrong: list[str] = []
    start = threading.Barrier(len(inputs))

    def call(i: int) -> None:
        start.wait()
        for _ in range(25):
            if not torch.equal(tg.moba_attention(inputs[i], inputs[i], inputs[i], block_size=16, top_k=2), expected[i]):
                wrong.append(f"thread {i}: another result")
            try:
                tg._native.moba_attention_cpu(i)
            except ValueError as error:
                if not str(error).endswith("got 1"):
                    wrong.append(f"thread {i}: {error}")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_of_the_module_name_their_cause() -> None:
    with pytest.raises(TypeError, match="cpu target must be a str"):
        tg._native.set_cpu_target(2)
    with pytest.raises(ValueError, match="set_cpu_target takes 1 arguments, got 0"):
        tg._native.set_cpu_target()
    count = len(tg._native.argument_names["block_centroids_cpu"])
    with pytest.raises(ValueError, match="is no description of a tensor"):
        tg._native.block_centroids_cpu(*[(1, 2)] * count)
    arguments = [None] * count
    arguments[tg._native.argument_names["block_centroids_cpu"].index("block_size")] = "16"
    with pytest.raises(TypeError, match="block_size must be an int that fits 64 bits") as raised:
        tg._native.block_centroids_cpu(*arguments)
    assert isinstance(raised.value.__cause__, TypeError)


# --- what a build says -----------------------------------------------------------------------------------------------


def test_an_archive_of_the_sources_can_be_shown_on_an_index() -> None:
    text = (ROOT / "docs" / "package-index.md").read_text()
    assert "![" not in text and "](" not in text.replace("](http", "")  # no address relative to the repository


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
def test_a_build_says_what_it_will_build(tmp_path: Path) -> None:
    ninja = Path(sys.executable).parent / "ninja"
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path), "-DTOPGATHER_CUDA=OFF"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja.exists() else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "topgather: CPU kernels for baseline" in done.stdout
    assert "topgather: no CUDA kernels (TOPGATHER_CUDA=OFF" in done.stdout
    assert "minutes on" in done.stdout
