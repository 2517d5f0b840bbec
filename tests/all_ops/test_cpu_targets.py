"""Choosing the instruction set, and what holds of every op on every one; each op's folder has its cases for them."""

import os
import subprocess
import sys

import pytest
import torch

import topgather as tg
from tests.common.devices import CPU_TARGETS
from tests.common.ops import OpCase, every, one_of_each
from tests.common.runs import assert_all_equal

pytestmark = pytest.mark.sanitize
KNOWN_TARGETS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
CPU = torch.device("cpu")


@pytest.mark.usefixtures("cpu_target")
@every(one_of_each())
def test_bits_do_not_depend_on_the_number_of_threads(case: OpCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(dtype, CPU, requires_grad=True)
        torch.set_num_threads(1)
        expected = case.everything(inputs)
        torch.set_num_threads(3)
        assert_all_equal(case.everything(inputs), expected, str(dtype))


def test_targets_are_known_and_the_default_is_the_best() -> None:
    """The list grows from the portable build to the widest; without the variable the last is in use."""
    assert "baseline" in CPU_TARGETS and set(CPU_TARGETS) <= set(KNOWN_TARGETS)
    assert [target for target in KNOWN_TARGETS if target in CPU_TARGETS] == list(CPU_TARGETS)
    assert imported_target(None) == (0, CPU_TARGETS[-1])


def imported_target(value: str | None) -> tuple[int, str]:
    """Exit code of an import with the variable set, and the target in use or the error's last line."""
    environment = {name: content for name, content in os.environ.items() if name != "TOPGATHER_CPU_TARGET"}
    if value is not None:
        environment["TOPGATHER_CPU_TARGET"] = value
    code = "import topgather as tg; print(tg._native.cpu_target())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_environment_variable(target: str) -> None:
    assert imported_target(target) == (0, target)


def test_environment_variable_of_an_unknown_name() -> None:
    exit_code, last_line = imported_target("sse9")
    assert exit_code != 0
    assert "TOPGATHER_CPU_TARGET" in last_line and "sse9" in last_line


def test_unknown_name_raises_and_changes_nothing() -> None:
    before = tg._native.cpu_target()
    for name in ("sse9", "", "AVX2 "):
        with pytest.raises(ValueError, match="baseline"):
            tg._native.set_cpu_target(name)
    with pytest.raises(TypeError):
        tg._native.set_cpu_target(2)
    assert tg._native.cpu_target() == before


def test_unavailable_target_raises() -> None:
    for name in set(KNOWN_TARGETS) - set(CPU_TARGETS):
        with pytest.raises((ValueError, RuntimeError), match=name):
            tg._native.set_cpu_target(name)
