"""The tools around the build: what they read out of ptxas, ninja and ncu, and what they refuse."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def load(name: str) -> ModuleType:
    return __import__(name)


MANGLED = "_ZN9topgather6moba_xINS_8BFloat16ELi128EEEvNS_10XArgumentsE"
NAME = "moba_x<BFloat16, 128>"


def report_of(architecture: str, registers: int, stack: int = 0, spills: int = 0) -> str:
    """One kernel as ``ptxas -v`` of CUDA 13.0 words it."""
    return (
        f"ptxas info    : Compiling entry function '{MANGLED}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {MANGLED}\n"
        f"    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]\n"
        "ptxas info    : Compile time = 20.234 ms\n"
    )


def write_build(folder: Path, *reports: str, toolkit: str = "13.0.88") -> Path:
    """A build folder as CMake and the launcher leave it, one object."""
    folder.mkdir(exist_ok=True)
    (folder / "x.cu.o.ptxas").write_text("ptxas info    : 0 bytes gmem\n" + "".join(reports))
    (folder / "cuda_kernels.txt").write_text(f"{toolkit}\n80-real 90a-real\n{folder / 'x.cu.o'}\n")
    return folder


def run_table(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "kernel_table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_table_lists_registers_by_architecture(tmp_path: Path) -> None:
    # nvcc reports architectures as they finish, in any order.
    reports = [report_of("sm_120", 80), report_of("sm_80", 64), report_of("sm_90a", 72)]
    build = write_build(tmp_path / "build", *reports)
    done = run_table("--build", build, "--output", tmp_path / "kernels.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| kernel | sm_80 | sm_90a | sm_120 |")
    assert f"| `{NAME}` | 64 | 72 | 80 | 512 B | 0 B | 0 B |" in done.stdout
    assert done.stdout in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize(("stack", "spills"), [(256, 0), (0, 8)], ids=["local array", "spill"])
def test_table_fails_on_local_memory(tmp_path: Path, stack: int, spills: int) -> None:
    build = write_build(tmp_path / "build", report_of("sm_80", 64), report_of("sm_90a", 255, stack, spills))
    done = run_table("--build", build, "--output", tmp_path / "kernels.md")
    assert done.returncode == 1
    assert f"{NAME} on sm_90a: stack {stack} B, spill stores {spills} B" in done.stderr


def test_check_fails_where_the_document_is_out_of_date(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    run_table("--build", write_build(tmp_path / "build", report_of("sm_80", 64)), "--output", document)
    assert run_table("--check", "--build", tmp_path / "build", "--output", document).returncode == 0
    before = document.read_text()
    write_build(tmp_path / "build", report_of("sm_80", 66))
    done = run_table("--check", "--build", tmp_path / "build", "--output", document)
    assert done.returncode == 1
    assert "out of date" in done.stderr
    assert document.read_text() == before
    document.unlink()
    assert run_table("--check", "--build", tmp_path / "build", "--output", document).returncode == 1


def test_check_does_not_compare_toolkits(tmp_path: Path) -> None:
    document = tmp_path / "kernels.md"
    run_table("--build", write_build(tmp_path / "build", report_of("sm_80", 64)), "--output", document)
    build = write_build(tmp_path / "build", report_of("sm_80", 66), toolkit="13.1.80")
    done = run_table("--check", "--build", build, "--output", document)
    assert done.returncode == 0
    assert "not compared" in done.stdout


def test_missing_report_is_an_error(tmp_path: Path) -> None:
    build = write_build(tmp_path / "build", report_of("sm_80", 64))
    (build / "x.cu.o.ptxas").unlink()
    done = run_table("--build", build, "--output", tmp_path / "kernels.md")
    assert done.returncode == 1
    assert "missing" in done.stderr


def test_launcher_keeps_facts_and_shows_messages(tmp_path: Path) -> None:
    said = report_of("sm_80", 64) + "kernels.cu(3): warning: unused\n"
    compiler = [sys.executable, "-c", f"import sys; sys.stderr.write({said!r}); sys.exit(int(sys.argv[-1]))"]
    launcher = [sys.executable, str(ROOT / "tools" / "ptxas_report.py"), *compiler]
    arguments = ["-o", str(tmp_path / "x.o"), "-c", "kernels.cu"]
    done = subprocess.run([*launcher, *arguments, "0"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "kernels.cu(3): warning: unused\n"
    assert (tmp_path / "x.o.ptxas").read_text() == report_of("sm_80", 64)
    failed = subprocess.run([*launcher, *arguments, "3"], capture_output=True, text=True)
    assert failed.returncode == 3
    assert failed.stderr == said


def test_toolkit_is_found_among_site_folders(tmp_path: Path) -> None:
    find_toolkit = load("find_cuda_packages").find_toolkit
    assert find_toolkit([str(tmp_path)]) is None
    for version in ("cu9", "cu13"):
        (tmp_path / "nvidia" / version / "bin").mkdir(parents=True)
        (tmp_path / "nvidia" / version / "bin" / "nvcc").touch()
    assert find_toolkit([str(tmp_path / "none"), str(tmp_path)]) == tmp_path / "nvidia" / "cu13"


def test_pypi_packages_are_named_alike() -> None:
    """The dependency group and the build requirements of the override are one list."""
    text = (ROOT / "pyproject.toml").read_text()
    group = re.search(r"^cuda-toolchain = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    override = re.search(r"^build\.requires = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert group is not None
    assert override is not None
    assert group[1].split() == override[1].split()


def test_build_times_are_of_the_last_build() -> None:
    read_last_build = load("build_times").read_last_build
    log = "# ninja log v5\n0\t9000\t1\told.o\ta\n100\t2100\t1\tCMakeFiles/k.dir/csrc/a.cu.o\tb\n0\t3000\t1\tm.so\tc\n"
    steps = read_last_build(log)
    assert [(load("build_times").name_of(step.output), step.seconds) for step in steps] == [
        ("k: a.cu", 2.0),
        ("m.so", 3.0),
    ]


NCU_OUTPUT = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","usecond","%","%","register/thread","inst","inst"
"0","void topgather::moba_x<topgather::BFloat16, (int)128>(topgather::XArguments)","1,500","30","61","240","2.5","9"
"1","void topgather::moba_x<topgather::BFloat16, (int)128>(topgather::XArguments)","500","10","21","240","0.5","9"
"2","topgather::moba_y(topgather::YArguments)","10","90","n/a","40","9.5","9"
==PROF== Disconnected
"""


def test_ncu_summary_weighs_launches_by_their_time() -> None:
    summaries = load("ncu_summary").summarize(NCU_OUTPUT)
    assert [summary["kernel"] for summary in summaries] == [NAME, "moba_y"]
    first, second = summaries
    assert (first["launches"], first["dram_percent"], first["tensor_percent"], first["registers"]) == (2, 25, 51, 240)
    assert first["seconds"] == pytest.approx(2e-3)
    assert first["stalls"] == {"long_scoreboard": 2.0}
    assert "tensor_percent" not in second
    assert "| forward moba_y |" in load("ncu_summary").format_table([{"direction": "forward", **second}])
    document = (
        "| forward, ms | `moba_x` | `moba_y` | sum | GB |\n|---|---|---|---|---|\n"
        "| 8K, D 64, block 64 | 1.00 | 2.00 | 3.00 | 1.0 |\n| profiled | 0.25 | 0.50 | 0.75 | 1.0 |\n"
        "| backward, ms | `moba_y` | sum | GB |\n|---|---|---|---|\n| profiled | 7.00 | 7.00 | 1.0 |\n"
    )
    table = load("ncu_summary").format_table([{"direction": "forward", **second}], document)
    assert re.search(r"\| forward moba_y \| \d+ \| [\d.]+ \| 500 \|", table)
    assert load("ncu_summary").summarize("==ERROR== no permission\n") == []
