"""Stages of the CUDA ops as NVTX ranges: only with TOPGATHER_NVTX=1, and by names that say op and stage."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")
COMPILER = shutil.which("g++")


def include_folders() -> list[Path]:
    if NVCC is None:
        return []
    toolkit = Path(NVCC).resolve().parents[1]
    folders = [toolkit / "include", *toolkit.glob("targets/*/include"), Path("/usr/local/cuda/include")]
    return [folder for folder in folders if (folder / "nvtx3" / "nvToolsExt.h").exists()]


LISTENER = """
// What a profiler loads into the process: NVTX calls it, and it takes the two callbacks.
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
static int push(const char* name) { return printf("push %s\\n", name); }
static int pop(void) { return printf("pop\\n"); }
extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_export_table) {
  auto* table = (const NvtxExportTableCallbacks*)get_export_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable callbacks; unsigned size;
  if (!table || !table->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &callbacks, &size)) return 0;
  *callbacks[NVTX_CBID_CORE_RangePushA] = (NvtxFunctionPointer)push;
  *callbacks[NVTX_CBID_CORE_RangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
"""
PROGRAM = """
#include "cuda/host.h"
// The runtime's functions that host_cuda.cpp names; none is called.
extern "C" {
#define STUB(name, ...) cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
STUB(cudaGetDevice, int*) STUB(cudaDriverGetVersion, int*) STUB(cudaDeviceGetAttribute, int*, cudaDeviceAttr, int)
STUB(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
const char* cudaGetErrorString(cudaError_t) { return ""; }
}
int main() {
  const topgather::StageRange outer("moba.forward");
  const topgather::StageRange inner("moba.attend");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = include_folders()
    if not folders or COMPILER is None:
        pytest.skip("needs g++ and NVTX's headers, which a CUDA toolkit has")
    folder = tmp_path_factory.mktemp("nvtx")
    (folder / "listener.cpp").write_text(LISTENER)
    (folder / "program.cpp").write_text(PROGRAM)
    common = [COMPILER, "-std=c++20", "-O0", "-w", f"-I{CSRC}", f"-I{folders[0]}"]
    subprocess.run([*common, "-shared", "-fPIC", "listener.cpp", "-o", "listener.so"], cwd=folder, check=True)
    sources = [str(CSRC / "cuda" / "host_cuda.cpp"), "program.cpp"]
    subprocess.run([*common, *sources, "-o", "program", "-ldl"], cwd=folder, check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", ["push moba.forward", "push moba.attend", "pop", "pop"]), ("0", []), (None, [])],
)
def test_ranges_are_pushed_where_they_are_asked_for(program: Path, value: str | None, expected: list[str]) -> None:
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(program.parent / "listener.so")}
    environment.pop("TOPGATHER_NVTX", None)
    if value is not None:
        environment["TOPGATHER_NVTX"] = value
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_ranges_are_named_by_op_and_stage_and_documented() -> None:
    named = {
        name for path in CSRC.rglob("*.cu") for name in re.findall(r'StageRange \w+\("([^"]*)"\)', path.read_text())
    }
    assert {"moba.route", "moba.attend", "moba.backward", "decode.attend", "grid.forward"} <= named
    wrong = [name for name in named if not re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", name)]
    assert wrong == []
    page = (CSRC.parent / "docs" / "profiling.md").read_text()
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []
