"""Every instruction set this machine has runs the same compact set of cases."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import topgather as tg
from tests.block_attention.helpers import AttentionCase, check_attention, make_gradients, make_inputs, run_attention
from tests.common.tensors import DTYPES, assert_bitwise_equal, integer_tensor
from topgather import reference

KNOWN_TARGETS = ["baseline", "avx2", "avx512", "amx"]
TARGETS = tg._native.available_cpu_targets()
CPU = torch.device("cpu")

CASES = [
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=200, head_dim=64, block_size=32, top_k=4),
    AttentionCase(num_heads=4, num_kv_heads=1, query_len=150, head_dim=128, block_size=64, top_k=2),
    AttentionCase(query_len=130, head_dim=80, value_dim=33, block_size=13, top_k=5),
    AttentionCase(query_len=100, head_dim=1, value_dim=3, block_size=1, top_k=9),
    AttentionCase(query_len=100, head_dim=3, value_dim=1, block_size=7, top_k=3),
    AttentionCase(query_len=70, head_dim=17, block_size=16, top_k=2),
    AttentionCase(query_len=260, head_dim=256, block_size=128, top_k=2),
    AttentionCase(query_len=33, key_len=190, head_dim=96, block_size=48, top_k=3),
    AttentionCase(query_len=190, key_len=33, head_dim=31, block_size=8, top_k=2),
    AttentionCase(query_len=1, key_len=65, head_dim=15, block_size=16, top_k=2),
    AttentionCase(query_len=150, head_dim=64, block_size=32, top_k=3, scale=-3.0),
]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_against_reference(target: str, case: AttentionCase, dtype: torch.dtype, is_causal: bool) -> None:
    tg._native.set_cpu_target(target)
    assert tg._native.cpu_target() == target
    check_attention(replace(case, is_causal=is_causal), dtype, CPU)


@pytest.mark.parametrize("layout", ["offset", "padded_rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_misaligned_views(target: str, dtype: torch.dtype, layout: str) -> None:
    tg._native.set_cpu_target(target)
    check_attention(AttentionCase(batch=2, query_len=90, head_dim=37, top_k=3), dtype, CPU, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_ties_and_nonfinite_scores(target: str, dtype: torch.dtype) -> None:
    tg._native.set_cpu_target(target)
    query = integer_tensor((1, 2, 150, 20), dtype, CPU, 0)
    key = integer_tensor((1, 2, 152, 20), dtype, CPU, 1)
    for planted in (False, True):
        if planted:
            key[0, 0, 9], key[0, 0, 33], key[0, 1, 50] = float("nan"), float("inf"), float("-inf")
        for top_k in (1, 2, 5, 30):
            for is_causal in (True, False):
                chosen = tg.moba_route(query, key, 4, top_k, is_causal).block_indices
                assert torch.equal(chosen, reference.moba_route(query, key, 4, top_k, is_causal))


@pytest.mark.parametrize("target", TARGETS)
def test_bits_do_not_depend_on_the_number_of_threads(target: str) -> None:
    tg._native.set_cpu_target(target)
    case = AttentionCase(num_heads=4, num_kv_heads=2, query_len=500, head_dim=48, block_size=32, top_k=4)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, gradients = make_inputs(case, dtype, CPU), make_gradients(case, dtype, CPU, 0)
        torch.set_num_threads(1)
        expected = run_attention(*inputs, *gradients, case).tensors()
        torch.set_num_threads(3)
        for name, tensor in run_attention(*inputs, *gradients, case).tensors().items():
            assert_bitwise_equal(name, tensor, expected[name])


def test_targets_are_known_and_the_default_is_the_best() -> None:
    """The list grows from the portable build to the widest; without the variable the last is in use."""
    assert "baseline" in TARGETS and set(TARGETS) <= set(KNOWN_TARGETS)
    assert [target for target in KNOWN_TARGETS if target in TARGETS] == list(TARGETS)
    assert imported_target(None) == (0, TARGETS[-1])


def imported_target(value: str | None) -> tuple[int, str]:
    """Exit code of an import with the variable set, and the target in use or the error's last line."""
    environment = {name: content for name, content in os.environ.items() if name != "TOPGATHER_CPU_TARGET"}
    if value is not None:
        environment["TOPGATHER_CPU_TARGET"] = value
    code = "import topgather as tg; print(tg._native.cpu_target())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("target", TARGETS)
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
    for name in set(KNOWN_TARGETS) - set(TARGETS):
        with pytest.raises((ValueError, RuntimeError), match=name):
            tg._native.set_cpu_target(name)
