"""Which architectures nvcc is asked to read a source for, and to make instructions for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def flags_of(tmp_path: Path, architectures: str, also_for: str = "") -> subprocess.CompletedProcess[str]:
    script = tmp_path / "flags.cmake"
    script.write_text(
        f"""cmake_minimum_required(VERSION 3.24)
include("{ROOT / "tools" / "nvcc_architectures.cmake"}")
set(TOPGATHER_CUDA_ARCHITECTURES "{architectures}")
nvcc_architectures(FLAGS {also_for})
foreach(flag IN LISTS FLAGS)
  message("${{flag}}")
endforeach()
"""
    )
    return subprocess.run([str(CMAKE), "-P", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("architectures", "also_for", "expected"),
    [
        ("80-real;90-real;100-real;90-virtual", "", ["80: sm_80 sm_90 sm_100 compute_80"]),
        ("80-real;90-real;100-real;90-virtual", "90", ["80: sm_80", "90: sm_90 sm_100 compute_90"]),
        ("100-real;80-real", "90", ["90: sm_100", "80: sm_80"]),
        ("100-real", "90", ["100: sm_100"]),
        ("86", "90", ["86: sm_86 compute_86"]),
        ("90a-real", "90", ["90a: sm_90a"]),
        ("80-real;90a-real;120", "", ["80: sm_80 sm_120 compute_80", "90a: sm_90a"]),
        ("80-real;90a-real;120", "90", ["80: sm_80", "90a: sm_90a", "90: sm_120 compute_90"]),
    ],
)
def test_sources_are_read_once(tmp_path: Path, architectures: str, also_for: str, expected: list[str]) -> None:
    done = flags_of(tmp_path, architectures, also_for)
    assert done.returncode == 0, done.stderr
    fronts = [line.split(": ") for line in expected]
    assert done.stderr.splitlines() == [
        f"--generate-code=arch=compute_{front},code=[{codes.replace(' ', ',')}]" for front, codes in fronts
    ]


@pytest.mark.parametrize("architectures", ["native", "80-real;sm_90", "80-ptx", "80;9O"])
def test_other_names_are_refused(tmp_path: Path, architectures: str) -> None:
    done = flags_of(tmp_path, architectures)
    assert done.returncode != 0
    assert "an entry is such as 80, 90a-real or 90-virtual" in " ".join(done.stderr.split())
