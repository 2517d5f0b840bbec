"""`make gpu` and the GPU benchmark as far as they go without a GPU: on CPU tensors and with stand-in programs."""

import json
import os
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import topgather as tg

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tools", "bench", "bench/gpu"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def load(name: str) -> ModuleType:
    return __import__(name)


# --- bench/gpu/moba_cuda.py ---------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module. Without matplotlib it cannot be loaded."""
    pytest.importorskip("matplotlib")
    module = load("moba_cuda")
    monkeypatch.setattr(module, "TARGETS", (module.Target(module.FORWARD, 65536, None, 5e-3),))
    return module


def settings_of(bench: ModuleType, **options: Any) -> Any:
    problems = [
        bench.Problem(direction, num_tokens, 32, batch_size, num_heads=2)
        for num_tokens, batch_size in ((256, 2), (512, 1))
        for direction in (bench.FORWARD, bench.BOTH)
    ]
    return bench.Settings(round_seconds=0.01, problems=problems, **options)


def test_benchmark_writes_a_row_a_candidate(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.run_benchmark(CPU, settings_of(bench), tmp_path) == 0
    content = json.loads((tmp_path / "moba.json").read_text())
    assert (tmp_path / "moba.png").stat().st_size > 0
    rows = {(row["candidate"], row["direction"], row["num_tokens"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 4 * 4
    for direction in (bench.FORWARD, bench.BOTH):
        for name in (bench.FLASH, "topgather 128", "topgather 64"):
            row = rows[name, direction, 512]
            assert row["median_seconds"] >= row["min_seconds"] > 0
            assert row["quartile_seconds"][0] <= row["median_seconds"] <= row["quartile_seconds"][1]
            assert "samples" not in row
            assert row["num_samples"] >= 1
            assert row["result_bytes"] == 2 * 512 * (32 * 2 * (4 if direction == bench.BOTH else 1) + 4)
        # No cuDNN on the CPU: left out with the reason, and the others measured all the same.
        assert "RuntimeError" in rows[bench.CUDNN, direction, 512]["skipped"]
    assert {stage["num_tokens"] for stage in content["stages"]} == {256, 512}
    assert all(stage["kernels"][0]["seconds"] > 0 for stage in content["stages"])
    assert "the same, deterministic" in content["ops"]
    assert content["targets"][0]["met"] is None


def test_benchmark_leaves_out_peers_that_take_too_long(bench: ModuleType, tmp_path: Path) -> None:
    bench.run_benchmark(CPU, settings_of(bench, call_limit=0.0), tmp_path)
    rows = json.loads((tmp_path / "moba.json").read_text())["rows"]
    flash = {row["num_tokens"]: row for row in rows if row["candidate"] == bench.FLASH}
    assert "median_seconds" in flash[256]  # nothing smaller to judge it by
    assert re.search(r"too long here, at N=256 it took", flash[512]["skipped"])
    assert "median_seconds" not in flash[512]
    assert all("median_seconds" in row for row in rows if row["candidate"].startswith("topgather"))


def test_benchmark_begins_nothing_when_time_is_up(bench: ModuleType, tmp_path: Path) -> None:
    bench.run_benchmark(CPU, settings_of(bench, seconds=0.0), tmp_path)
    content = json.loads((tmp_path / "moba.json").read_text())
    assert all(row["skipped"].startswith("out of time") for row in content["rows"])
    assert not content["stages"]


def test_benchmark_fails_where_topgather_does(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error while launching moba_x: an illegal memory access\nmore")

    monkeypatch.setattr(bench, "check_against_reference", lambda device: 0.0)
    monkeypatch.setattr(tg, "moba_attention", broken)
    assert bench.run_benchmark(CPU, settings_of(bench), tmp_path) == 1
    rows = json.loads((tmp_path / "moba.json").read_text())["rows"]
    ours = [row for row in rows if row["candidate"] == "topgather 128"]
    assert {row["failed"] for row in ours} == {
        "RuntimeError: CUDA error while launching moba_x: an illegal memory access"
    }
    assert any("median_seconds" in row for row in rows if row["candidate"] == bench.FLASH)


def test_benchmark_refuses_wrong_results(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tg.moba_attention
    monkeypatch.setattr(tg, "moba_attention", lambda *arguments, **options: right(*arguments, **options) * 1.1)
    with pytest.raises(RuntimeError, match="nothing worth timing"):
        bench.check_against_reference(CPU)


def test_targets_are_judged_by_both_sides(bench: ModuleType) -> None:
    session = bench.Session(CPU, settings_of(bench))
    bench.TARGETS = (
        bench.Target(bench.FORWARD, 65536, None, 5e-3),
        bench.Target(bench.FORWARD, 65536, bench.FLASH, 20.0),
        bench.Target(bench.FORWARD, 65536, bench.CUDNN, 10.0),
    )
    problem = {"direction": bench.FORWARD, "num_tokens": 65536, "head_dim": 128, "batch_size": 2}
    problem |= {"num_heads": bench.NUM_HEADS, "top_k": bench.TOP_K}
    session.rows += [
        {"candidate": "topgather 128", **problem, "median_seconds": 4e-3},
        {"candidate": bench.FLASH, **problem, "median_seconds": 60e-3},
        {"candidate": bench.CUDNN, **problem, "skipped": "out of memory"},
    ]
    lines = [bench.describe_target(target) for target in bench.judged_targets(session)]
    assert lines[0].endswith("at most 5 ms, 4 ms: met")
    assert lines[1].endswith("at least 20x flash SDPA, 15.0x: MISSED")
    assert lines[2].endswith("not measured")


# --- bench/gpu: what the sanitizers and the profiler run ----------------------------------------------------


def test_sanitizer_cases_agree_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = load("sanitizer_cases")
    monkeypatch.setattr(sys, "argv", ["sanitizer_cases.py", "cpu"])
    assert cases.main() == 0
    names = ("CASES", *(f"{kind}_CASES" for kind in ("MEMORY", "GRID", "DECODE", "KEY_CONV", "INDEX")))
    kinds = [getattr(cases, name) for name in names]
    num_cases = sum(len(kind) for kind in kinds)
    assert f"{num_cases} of {num_cases} cases agree" in capsys.readouterr().out


def test_headlines_have_a_line_for_every_op(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    headline = load("headline")
    options = ["headline.py", "--device", "cpu", "--quick", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    assert headline.main() == 0
    content = json.loads((tmp_path / "headline.json").read_text())
    ops = [row["op"] for row in content["rows"]]
    assert list(dict.fromkeys(ops)) == [
        *("moba_attention", "memory_lookup", "product_key_topk", "grid_attention", "moba_decode", "key_conv")
    ]
    assert all(row["ratio"] > 0 for row in content["rows"])
    seconds = [kernel["seconds"] for kernel in content["kernels"]]
    assert seconds == sorted(seconds, reverse=True) and {"case", "kernel"} < set(content["kernels"][0])
    printed = capsys.readouterr().out
    assert f"{len(ops)} lines, 0 failed" in printed and "product_key_topk top-k [" in printed

    def broken(*arguments: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(headline.memory, "measure_topk", broken)
    monkeypatch.setattr(sys, "argv", [*options, "--seconds", "0"])
    assert headline.main() == 0  # nothing is begun
    assert {row.get("skipped") for row in json.loads((tmp_path / "headline.json").read_text())["rows"]} == {
        "out of time"
    }
    monkeypatch.setattr(sys, "argv", options)
    assert headline.main() == 1
    rows = json.loads((tmp_path / "headline.json").read_text())["rows"]
    failed = {row["op"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"product_key_topk": "RuntimeError: an illegal memory access"}


def test_profile_cases_run() -> None:
    cases = load("profile_cases")
    calls = cases.make_calls(CPU, num_tokens=256, num_keys=16, side=16)
    assert set(calls) == set(cases.NAMES) == set(load("gpu").PROFILED)
    assert calls["forward"]().shape == (1, 4, 256, 128)
    assert len(calls["backward"]()) == 3
    assert len(calls["memory"]()) == 3
    assert calls["decode"]().shape == (8, 16, 1, 128)
    assert len(calls["grid"]()) == 4
    assert len(calls["key_conv"]()) == 2


# --- tools/gpu.py -------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("gpu")
    monkeypatch.setattr(module, "build", lambda session: True)
    monkeypatch.setattr(module, "test_emulated", lambda session: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "results")])
    return module


def statuses(tmp_path: Path) -> dict[str, str]:
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    return {step["name"]: step["status"] for step in summary["steps"]}


def test_without_a_gpu_every_gpu_step_says_so(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "look_at_machine", lambda: gpu.Machine(None, None))
    assert gpu.main() == 0
    assert set(statuses(tmp_path).values()) == {"no GPU"}
    assert len(statuses(tmp_path)) == len(gpu.GPU_STEPS)
    assert capsys.readouterr().out.count("no GPU is there") >= len(gpu.GPU_STEPS)
    assert "no GPU on this machine" in (tmp_path / "results" / "summary.md").read_text()


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program of that name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def fake_machine(gpu: ModuleType, folder: Path) -> Any:
    """A machine whose interpreter, sanitizer and profiler are the stand-ins in ``folder``."""
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return gpu.Machine("Stand-in GPU", "90", python=str(folder / "python"), environment=environment)


def test_steps_go_on_whatever_became_of_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    # Pytest fails, the benchmark passes.
    stand_in(programs, "python", 'case "$*" in "-m pytest"*) echo "3 failed, 7 passed"; exit 1;; *) echo fine;; esac')
    sanitizer = 'case "$*" in *racecheck*) echo "RACECHECK SUMMARY: 2 hazards"; exit 9;; esac'
    stand_in(programs, "compute-sanitizer", f'{sanitizer}; echo "ERROR SUMMARY: 0 errors"; echo "9 of 9 cases agree"')
    stand_in(programs, "ncu", 'echo "==ERROR== ERR_NVGPUCTRPERM"')
    monkeypatch.setattr(gpu, "look_at_machine", lambda: fake_machine(gpu, programs))
    assert gpu.main() == 1
    assert statuses(tmp_path) == {
        "tests on the GPU": "failed",
        "headline speeds": "passed",
        "memcheck": "passed",
        "racecheck": "failed",
        "synccheck": "passed",
        "benchmark": "passed",
        "memory benchmark": "passed",
        "grid benchmark": "passed",
        "decode benchmark": "passed",
        "key_conv benchmark": "passed",
        "ncu memory": "failed",
        "ncu grid": "failed",
        "ncu decode": "failed",
        "ncu key_conv": "failed",
        "ncu forward": "failed",
        "ncu backward": "failed",
    }
    log = (tmp_path / "results" / "log.txt").read_text()
    assert "3 failed, 7 passed" in log
    assert "2 hazards" in log
    assert "| tests on the GPU | failed |" in (tmp_path / "results" / "summary.md").read_text()


def test_only_the_longest_kernels_are_profiled(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ``--only`` runs a step alone. What it leaves is one archive too."""
    kernels = [
        ("forward", "moba_a<float>"),
        ("backward", "moba_a<float>"),
        ("grid", "b"),
        ("forward", "c"),
        ("grid", "d"),
    ]
    content = json.dumps({"kernels": [{"case": case, "kernel": kernel} for case, kernel in kernels]})
    programs = tmp_path / "programs"
    stand_in(programs, "python", f"echo '{content}' > {tmp_path}/results/headline.json; echo '9 lines, 0 failed'")
    stand_in(programs, "ncu", 'echo "$*"; echo "==ERROR== ERR_NVGPUCTRPERM"')
    monkeypatch.setattr(gpu, "look_at_machine", lambda: fake_machine(gpu, programs))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "headline", "--only", "ncu"])
    assert gpu.main() == 1
    assert statuses(tmp_path) == {"headline speeds": "passed", "ncu forward": "failed", "ncu grid": "failed"}
    log = (tmp_path / "results" / "log.txt").read_text()
    assert "regex:^moba_a$|^c$" in log and "regex:^b$" in log
    with tarfile.open(tmp_path / "results" / gpu.ARCHIVE) as archive:
        assert {"summary.md", "summary.json", "log.txt", "headline.json"} <= set(archive.getnames())


def test_sanitizer_filter_is_dropped_where_it_is_unknown(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    refuses = 'case "$*" in *kernel-name*) echo "unrecognised option kernel-name"; exit 1;; esac'
    stand_in(programs, "compute-sanitizer", f'{refuses}; echo "ERROR SUMMARY: 0 errors"')
    session = gpu.Session(fake_machine(gpu, programs), tmp_path / "results", 60.0)
    gpu.sanitize(session)
    assert set(statuses(tmp_path).values()) == {"passed"}


def test_a_step_ends_at_its_limit_with_all_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = f"echo begun; (sleep 2; touch {marker}) & sleep 60"
    outcome = gpu.run_command(["sh", "-c", script], os.environ, 1.0)
    assert outcome.status == "timed out"
    assert "begun" in outcome.output
    assert outcome.seconds < 10
    # What it had started in the background is gone too.
    gpu.run_command(["sleep", "2"], os.environ, 10.0)
    assert not marker.exists()


def test_no_step_begins_without_time(gpu: ModuleType, tmp_path: Path) -> None:
    session = gpu.Session(gpu.Machine("Stand-in GPU", "90"), tmp_path / "results", 1.0)
    assert session.run("step", ["true"], 60, gpu.judge_by("")).status == "not run"
    assert statuses(tmp_path) == {"step": "not run"}


@pytest.mark.parametrize(("capability", "architecture"), [(None, "90a-real"), ("90", "90a-real"), ("86", "86-real")])
def test_architecture_is_the_gpus_own(gpu: ModuleType, capability: str | None, architecture: str) -> None:
    assert gpu.architecture_of(capability) == architecture
