"""The PTX of the CUDA sources, interpreted: inline assembly against closed forms, kernels against the emulator.

The emulator runs what the host's compiler makes of the kernels and never sees their assembly. Here a swapped operand in
``csrc/cuda/primitives.cuh`` is planted, and must be found. The interpreter itself is held to the PTX ISA by
instructions on their own and by programs that break its rules.
"""

import re
import struct
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.emulation.ptx import PtxError, launch, parse_module
from tests.emulation.ptx.cases import (
    Case,
    DecodeCase,
    FilteredRouteCase,
    GridCase,
    IndexRouteCase,
    KeyConvCase,
    MemoryCase,
    MobaCase,
    ProductKeyCase,
    QuantizedCase,
    RowStepCase,
    record,
)
from tests.emulation.ptx.instruction_cases import CASES, InstructionCase, run_case
from tests.emulation.ptx.primitive_checks import CHECKS, Kernels
from tests.emulation.ptx.replay import (
    FLOAT_TYPES,
    PtxOfKernels,
    RecordedLaunch,
    ReplayedLaunch,
    differences,
    emulation_folder,
    global_functions,
    kernel_sources,
    load_emulated,
    newer_sources,
    replay,
)
from tests.emulation.ptx.toolchain import SOURCES, compile_to_ptx, mutated_sources, nvcc

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed: no PTX to interpret")
PRIMITIVES = Path(__file__).parents[1] / "emulation" / "ptx" / "primitives.cu"

# --- single instructions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction(case: InstructionCase) -> None:
    assert run_case(case) >= 10


# --- programs ---------------------------------------------------------------------------------------------------------

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"
MEMORY = 1 << 20


def run_program(
    body: str,
    *,
    before: str = "",
    num_threads: int = 32,
    num_blocks: int = 1,
    shared_bytes: int = 0,
    num_words: int = 64,
) -> list[int]:
    """Run a kernel with ``%memory`` at words of -1 and ``%mine`` at the thread's own, and return the words."""
    text = f"""{HEAD}{before}
.visible .entry program(.param .u64 program_param_0) {{
  .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<16>, %memory, %mine;
  .reg .b32 %thread;
  ld.param.u64 %memory, [program_param_0];
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %mine, %thread, 4;
  add.s64 %mine, %memory, %mine;
  {body}
  ret;
}}"""
    regions = {MEMORY: np.full(num_words, -1, np.int32).tobytes()}
    kernel = parse_module(text).kernel("program")
    params = struct.pack("<Q", MEMORY)
    after = launch(kernel, (num_blocks, 1, 1), (num_threads, 1, 1), shared_bytes, params, regions)
    return np.frombuffer(after[MEMORY], np.int32).tolist()


def test_functions_are_called_with_memory_of_their_own() -> None:
    before = """
.func (.param .b32 result) triangle(.param .b32 triangle_param_0, .param .b64 triangle_param_1) {
  .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  ld.param.u32 %r1, [triangle_param_0];
  ld.param.u64 %rd1, [triangle_param_1];
  mov.u32 %r2, 0;
LOOP:
  setp.eq.s32 %p1, %r1, 0;
  @%p1 bra DONE;
  add.s32 %r2, %r2, %r1;
  sub.s32 %r1, %r1, 1;
  bra LOOP;
DONE:
  st.u32 [%rd1], %r2;
  st.param.b32 [result], %r2;
  ret;
}"""
    body = """
  .local .align 4 .b8 depot[8];
  mov.u64 %rd1, depot;
  cvta.local.u64 %rd2, %rd1;
  { .param .b32 p0; .param .b64 p1; .param .b32 r0;
    st.param.b32 [p0], %thread; st.param.b64 [p1], %rd2;
    call.uni (r0), triangle, (p0, p1);
    ld.param.b32 %r5, [r0]; }
  ld.local.u32 %r6, [depot];
  mad.lo.s32 %r5, %r6, 1000, %r5;
  st.global.u32 [%mine], %r5;"""
    words = run_program(body, before=before)
    assert words[:32] == [1001 * (thread * (thread + 1) // 2) for thread in range(32)]


def test_tables_of_branches_and_generic_addresses() -> None:
    body = """
  .shared .align 4 .b8 numbers[128];
  mov.u32 %r1, numbers;
  shl.b32 %r2, %thread, 2;
  add.s32 %r1, %r1, %r2;
  st.shared.u32 [%r1], %r2;
  cvt.u64.u32 %rd1, %r1;
  cvta.shared.u64 %rd1, %rd1;
  and.b32 %r3, %thread, 1;
  setp.eq.s32 %p1, %r3, 0;
  selp.b64 %rd2, %rd1, %mine, %p1;
  ld.u32 %r4, [%rd2];
  and.b32 %r5, %thread, 3;
TABLE: .branchtargets ZERO, ONE, TWO, ZERO;
  brx.idx %r5, TABLE;
ZERO: add.s32 %r4, %r4, 1000; bra END;
ONE: add.s32 %r4, %r4, 2000; bra END;
TWO: add.s32 %r4, %r4, 3000;
END:
  st.global.u32 [%mine], %r4;"""
    expected = [(4 * thread if thread % 2 == 0 else -1) + (1000, 2000, 3000, 1000)[thread % 4] for thread in range(32)]
    assert run_program(body)[:32] == expected


def test_warps_meet_where_the_program_lies_apart() -> None:
    # Half of the lanes take a way that lies behind the vote, and come back.
    body = """
  and.b32 %r1, %thread, 1;
  setp.eq.s32 %p1, %r1, 1;
  @%p1 bra DETOUR;
BACK:
  vote.sync.ballot.b32 %r2, %p1, -1;
  st.global.u32 [%mine], %r2;
  ret;
DETOUR:
  add.s32 %r1, %r1, 1;
  bra BACK;"""
    assert run_program(body)[:32] == [np.uint32(0xAAAAAAAA).view(np.int32)] * 32


def test_barriers_reduce_over_those_who_stay() -> None:
    body = """
  setp.ge.u32 %p1, %thread, 40;
  @%p1 ret;
  setp.lt.u32 %p2, %thread, 5;
  bar.red.popc.u32 %r1, 0, %p2;
  bar.red.and.pred %p3, 0, %p2;
  bar.red.or.pred %p4, 0, %p2;
  selp.b32 %r2, 100, 0, %p3;
  selp.b32 %r3, 1000, 0, %p4;
  add.s32 %r1, %r1, %r2;
  add.s32 %r1, %r1, %r3;
  st.global.u32 [%mine], %r1;"""
    assert run_program(body, num_threads=64) == [1005] * 40 + [-1] * 24


def test_atomics_return_what_was_there() -> None:
    body = """
  atom.global.add.u32 %r1, [%memory], 2;
  atom.global.cas.b32 %r2, [%memory+4], -1, 7;
  atom.global.exch.b32 %r3, [%memory+8], %thread;
  setp.eq.s32 %p1, %r2, -1;
  @%p1 atom.global.add.u32 %r4, [%memory+12], 1;"""
    words = run_program(body, num_blocks=3)
    assert words[:4] == [2 * 96 - 1, 7, 31, 0]


def test_part_of_a_copy_is_zeros() -> None:
    body = """
  .shared .align 16 .b8 stage[16];
  setp.ne.s32 %p1, %thread, 0;
  @%p1 ret;
  mov.u32 %r1, stage;
  mov.u32 %r2, 6;
  cp.async.ca.shared.global [%r1], [%memory], 16, %r2;
  cp.async.wait_all;
  ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r1];
  st.global.v4.u32 [%memory+32], {%r4, %r5, %r6, %r7};"""
    assert run_program(body)[8:12] == [-1, 0xFFFF, 0, 0]


REFUSED = {
    "beyond_a_region": (
        "ld.global.u32 %r1, [%mine+180];",
        r"4 bytes at 0x100100 lie in no region.*thread \(19, 0, 0\)",
    ),
    "misaligned": ("ld.global.v2.u32 {%r1, %r2}, [%mine];", "0x100004 is not aligned to 8 bytes"),
    "beyond_shared_memory": ("mov.u32 %r1, 2048; st.shared.u32 [%r1], %r1;", "outside the block's shared memory"),
    "shared_memory_from_0": ("mov.u32 %r1, 0; st.shared.u32 [%r1], %r1;", "outside the block's shared memory"),
    "copy_still_in_flight": (
        ".shared .align 16 .b8 stage[512]; mov.u32 %r1, stage; mad.lo.s32 %r1, %thread, 16, %r1; "
        "cp.async.cg.shared.global [%r1], [%memory], 16; cp.async.commit_group; cp.async.wait_group 1; "
        "ld.shared.u32 %r2, [%r1];",
        "still in flight",
    ),
    "copy_not_committed": (
        ".shared .align 16 .b8 stage[512]; mov.u32 %r1, stage; mad.lo.s32 %r1, %thread, 16, %r1; "
        "cp.async.cg.shared.global [%r1], [%memory], 16; cp.async.wait_group 0; ld.shared.u32 %r2, [%r1];",
        "still in flight",
    ),
    "barrier_nobody_else_reaches": (
        "setp.eq.s32 %p1, %thread, 3; @%p1 bar.sync 1; @!%p1 bar.sync 2;",
        "some threads of a group only",
    ),
    "barriers_that_wait_for_each_other": (
        "setp.eq.s32 %p1, %thread, 3; @%p1 bra OTHER; bar.sync 1; bra END; OTHER: bar.sync 2; END:",
        "wait forever, at: bar.sync 1; bar.sync 2",
    ),
    "vote_without_a_lane": (
        "setp.eq.s32 %p1, %thread, 3; @%p1 bra END; vote.sync.any.pred %p2, %p1, -1; bar.sync 0; END: bar.sync 0;",
        "wait forever",
    ),
    "mask_without_oneself": ("vote.sync.any.pred %p2, %p1, 255;", "its own mask leaves out"),
    "shuffle_from_nobody": (
        "setp.ge.u32 %p1, %thread, 16; @%p1 bra END; shfl.sync.bfly.b32 %r1, %thread, 16, 31, 65535; END:",
        "takes no part",
    ),
    "product_of_half_a_warp": (
        "setp.ge.u32 %p1, %thread, 16; @%p1 ret; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%f0,%f1,%f2,%f3};",
        "not every thread of the warp",
    ),
    "another_shape": (
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1}, {%r2}, {%f0,%f1,%f2,%f3};",
        "cannot execute: mma.sync.aligned.m16n8k8",
    ),
    "unknown_instruction": ("frobnicate.u32 %r1, %r2;", "cannot execute: frobnicate.u32 %r1, %r2"),
    "unknown_modifier": ("add.cc.u32 %r1, %r2, %r3;", "cannot execute"),
    "the_clock": ("mov.u32 %r1, %clock;", "%clock is not available"),
    "a_register_of_another_width": ("add.s32 %r1, %rd1, %r2; add.s64 %rd1, %r1, %rd2;", "cannot be read as .s64"),
    "undeclared": ("add.s32 %r1, nothing, %r2;", "unknown operand nothing"),
    "nobody_defines_it": ("call.uni vprintf;", "vprintf is called but not defined"),
    "endless": ("LOOP: bra LOOP;", "more than .* steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = REFUSED[name]
    monkeypatch.setattr("tests.emulation.ptx.machine.MAX_STEPS", 1000)
    with pytest.raises(PtxError, match=message):
        run_program(body)


def test_launches_that_do_not_fit_are_refused() -> None:
    kernel = parse_module(f"{HEAD}.visible .entry empty(.param .b32 empty_param_0) {{ ret; }}").kernel("empty")
    with pytest.raises(PtxError, match="takes 4 bytes of parameters, not 8"):
        launch(kernel, (1, 1, 1), (32, 1, 1), 0, bytes(8), {})
    with pytest.raises(PtxError, match="overlap"):
        launch(kernel, (1, 1, 1), (32, 1, 1), 0, bytes(4), {4096: bytes(64), 4128: bytes(64)})
    with pytest.raises(PtxError, match="no launch"):
        launch(kernel, (1, 1, 1), (2048, 1, 1), 0, bytes(4), {})


# --- primitives -------------------------------------------------------------------------------------------------------


@cache
def primitives(architecture: str) -> Kernels:
    return Kernels(parse_module(compile_to_ptx(PRIMITIVES, architecture)))


@needs_nvcc
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_primitive(architecture: str, name: str) -> None:
    check, argument = CHECKS[name]
    check(primitives(architecture), argument)


def test_every_primitive_has_a_check() -> None:
    header = (SOURCES / "cuda" / "primitives.cuh").read_text()
    names = set(re.findall(r"^TOPGATHER_PRIMITIVE [^(]*?(\w+)(?:<\w+>)?\(", header, re.MULTILINE))
    assert len(names) >= 15
    used = set(re.findall(r"cuda::(\w+)", PRIMITIVES.read_text()))
    # What the others address shared memory by, and who asks; kernels that are replayed have both in them.
    assert names - used == {"shared_address", "shared_row", "moved", "moved_here", "thread_index_here"}


PAIR_OPERANDS = '{} %0, %1, %2;" : "=r"(packed) : "f"({}), "f"({})'
PLANTED = {
    "rows of A swapped": (
        "multiply_accumulate-BFloat16",
        "compute_80",
        "bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}",
        "bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}",
    ),
    "halves of B swapped": (
        "multiply_accumulate-Float16",
        "compute_80",
        "f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}",
        "f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}",
    ),
    "product of another type": ("multiply_accumulate-Float16", "compute_80", "f32.f16.f16.f32", "f32.bf16.bf16.f32"),
    "transpose dropped": ("load_matrix-true", "compute_80", "m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16"),
    "matrices out of order": (
        "load_matrix-false",
        "compute_80",
        "m8n8.x4.shared.b16 {%0,%1,%2,%3}",
        "m8n8.x4.shared.b16 {%0,%2,%1,%3}",
    ),
    "pair of bfloat16 turned round": (
        "pack-BFloat16",
        "compute_80",
        PAIR_OPERANDS.format("cvt.rn.bf16x2.f32", "high", "low"),
        PAIR_OPERANDS.format("cvt.rn.bf16x2.f32", "low", "high"),
    ),
    "pair of float16 turned round": (
        "pack-Float16",
        "compute_80",
        PAIR_OPERANDS.format("cvt.rn.f16x2.f32", "high", "low"),
        PAIR_OPERANDS.format("cvt.rn.f16x2.f32", "low", "high"),
    ),
    "pair rounded to zero": ("pack-BFloat16", "compute_80", "cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32"),
    "halves unpacked from one": ("unpack-BFloat16", "compute_80", "packed & 0xffffu", "packed >> 16"),
    "bfloat16 rounded to zero": ("from_float-BFloat16", "compute_80", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32"),
    "float16 rounded to zero": ("from_float-Float16", "compute_80", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    "bfloat16 shifted too little": ("to_float-BFloat16", "compute_80", "(value.bits) << 16", "(value.bits) << 15"),
    "zeros never filled": ("copy_async-uint4", "compute_80", "is_copied ? 16 : 0", "16"),
    "half a copy": ("copy_async-uint4", "compute_80", "is_copied ? 16 : 0", "is_copied ? 8 : 0"),
    "zeros of a word never filled": ("copy_async-float", "compute_80", "is_copied ? 4 : 0", "4"),
    "wait for too little": ("copy_async-uint4", "compute_80", "cp.async.wait_group %0;", "cp.async.wait_group %0 + 1;"),
    "commit dropped": ("copy_async-uint4", "compute_80", "cp.async.commit_group;", ""),
    "NaN dropped": ("max_or_nan", "compute_80", "max.NaN.f32", "max.f32"),
    "subnormals kept": ("exp2_approximate", "compute_80", "ex2.approx.ftz.f32", "ex2.approx.f32"),
    "subnormal reciprocals kept": ("reciprocal_approximate", "compute_80", "rcp.approx.ftz.f32", "rcp.approx.f32"),
    "root for reciprocal": ("reciprocal_approximate", "compute_80", "rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"),
    "maximum of signed": ("max_atomic", "compute_80", "global.max.u32", "global.max.s32"),
    "minimum for sum": ("add_atomic_int", "compute_80", "global.add.s32", "global.min.s32"),
    "pair of sums swapped": ("add_atomic_pair", "compute_90", "v2.f32 [%0], {%1,%2}", "v2.f32 [%0], {%2,%1}"),
    "four sums swapped": (
        "add_atomic_quad",
        "compute_90",
        "v4.f32 [%0], {%1,%2,%3,%4}",
        "v4.f32 [%0], {%1,%2,%4,%3}",
    ),
    "fourth sum onto the third": (
        "add_atomic_quad",
        "compute_80",
        "add_atomic(address + 3, value.w)",
        "add_atomic(address + 2, value.w)",
    ),
    "shared memory less aligned": ("shared_memory", "compute_80", "__align__(1024)", "__align__(16)"),
}


@needs_nvcc
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    name, architecture, old, new = PLANTED[fault]
    folder = mutated_sources("cuda/primitives.cuh", [(old, new)], tmp_path)
    kernels = Kernels(parse_module(compile_to_ptx(PRIMITIVES, architecture, [folder])))
    check, argument = CHECKS[name]
    with pytest.raises((AssertionError, PtxError)):
        check(kernels, argument)


# --- kernels ----------------------------------------------------------------------------------------------------------

KERNEL_CASES: list[Case] = [
    *(MobaCase(dtype) for dtype in FLOAT_TYPES),
    *(
        MobaCase(dtype, value_dim=40, lengths=(30, 0, 50), is_causal=False, deterministic=True, num_kv_heads=2)
        for dtype in FLOAT_TYPES
    ),
    *(MobaCase(dtype, head_dim=128, value_dim=96, num_tokens=50) for dtype in FLOAT_TYPES),
    *(MobaCase(dtype, head_dim=256, value_dim=200, num_tokens=40, is_causal=False) for dtype in FLOAT_TYPES),
    # A row with more choices than a warp has lanes.
    MobaCase(torch.float32, num_tokens=40, block_size=1, top_k=36),
    # More blocks than one thread block scans the lists of.
    MobaCase(torch.bfloat16, num_tokens=134, block_size=1, num_heads=1),
    # Blocks of a window, some seen in part.
    MobaCase(torch.bfloat16, top_k=1, window=60),
    *(FilteredRouteCase(dtype, head_dim) for dtype in (torch.bfloat16, torch.float16) for head_dim in (64, 128)),
    *(ProductKeyCase(dtype) for dtype in FLOAT_TYPES),
    *(ProductKeyCase(dtype, num_tokens=5, num_heads=1, num_keys=70, half_dim=16, top_k=50) for dtype in FLOAT_TYPES),
    *(
        ProductKeyCase(dtype, num_tokens=2, num_heads=1, num_keys=40, half_dim=16, top_k=top_k, share_of_infinite=share)
        for dtype, top_k, share in zip(FLOAT_TYPES, (3, 50, 60), (0.1, 0.05, 0.8), strict=True)
    ),
    *(MemoryCase(dtype) for dtype in FLOAT_TYPES),
    *(MemoryCase(dtype, row_dim=33, num_rows=9, num_tokens=5) for dtype in FLOAT_TYPES),
    *(MemoryCase(dtype, row_dim=dim, bag_size=9, is_ragged=True) for dtype in FLOAT_TYPES for dim in (80, 33)),
    *(MemoryCase(dtype, row_dim=264 * 4 // dtype.itemsize, num_tokens=3, bag_size=9) for dtype in FLOAT_TYPES),
    # A run that fills two stretches of pieces.
    MemoryCase(torch.float32, row_dim=3, num_tokens=257, bag_size=128, hot=0.9, is_forward=False),
    *(RowStepCase(dtype, 2, dim) for dtype in FLOAT_TYPES for dim in (80, 33)),
    RowStepCase(torch.float32, 0),
    RowStepCase(torch.float32, 1, state_dtype=torch.float32),
    RowStepCase(torch.float32, 2, row_dim=3, num_entries=24700),
    *(
        QuantizedCase(dtype, dim, group_size, is_ragged=is_ragged)
        for dtype in (torch.int8, torch.float8_e4m3fn)
        for dim, group_size in ((160, 80), (30, 5))
        for is_ragged in (False, True)
    ),
    *(GridCase(dtype) for dtype in FLOAT_TYPES),
    *(GridCase(dtype, head_dim=24, size=(1, 70), stride=(1, 1), batch=1, has_bias=False) for dtype in FLOAT_TYPES),
    GridCase(torch.bfloat16, head_dim=8, size=(1, 257), stride=(1, 1), batch=1, num_heads=1, has_bias=False),
    *(GridCase(dtype, head_dim=72, size=(5, 9), stride=(3, 2), batch=1) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, width=7, lengths=(9, 0, 1, 50)) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, head_dim=7, num_tokens=21) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, head_dim=3, width=8, num_tokens=5) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, width=4, lengths=(9, 0, 1, 50), has_options=True) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, width=7, num_tokens=21, has_options=True) for dtype in FLOAT_TYPES),
    *(KeyConvCase(dtype, head_dim=7, num_tokens=21, has_options=True) for dtype in FLOAT_TYPES),
    *(DecodeCase(dtype) for dtype in FLOAT_TYPES),
    *(DecodeCase(dtype, head_dim=21, value_dim=70, block_size=16, top_k=2) for dtype in FLOAT_TYPES),
    *(IndexRouteCase(dtype) for dtype in FLOAT_TYPES),
    *(IndexRouteCase(dtype, dim=128, is_sum=True) for dtype in FLOAT_TYPES),
    IndexRouteCase(torch.bfloat16, dim=64, is_sum=True, has_whole_tiles=True),
]


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    module = load_emulated("_native_emulated")
    if module is None or not hasattr(module, "moba_attention_cuda"):
        pytest.skip(f"_native_emulated is not built in {emulation_folder()}; see tests/emulation/CMakeLists.txt")
    return module


@cache
def ptx_of_kernels() -> PtxOfKernels:
    return PtxOfKernels(kernel_sources())


@needs_nvcc
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels(emulated: ModuleType, case: Case) -> None:
    recorder = record(emulated, case)
    assert len(recorder.launches) >= case.least_launches
    found = []
    for recorded in recorder.launches:
        try:
            replayed = replay(recorded, ptx_of_kernels())
            # Rows of 8 bits are summed, and left, in float32.
            floats = FLOAT_TYPES.get(case.dtype, "float32")
            found += differences(recorded, replayed, recorder.types, floats)
        except PtxError as error:
            found.append(f"{recorded.kernel}: {error}")
    if found and (newer := newer_sources(emulated)):
        found.append(f"but {len(newer)} sources, {newer[0]} for one, changed since the emulated module was built")
    assert not found, "\n".join(found)


def test_every_kernel_is_replayed(emulated: ModuleType) -> None:
    replayed = {launched.kernel for case in KERNEL_CASES for launched in record(emulated, case).launches}
    assert len(global_functions()) >= 10
    assert replayed == global_functions()


def test_differences_are_seen() -> None:
    lists = np.arange(320, dtype=np.int32)
    sums = np.linspace(-2, 2, 600).astype(np.float32)
    halves = torch.linspace(-2, 2, 600).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    unwritten = np.full(64, 0xFFFFFFFF, np.uint32)
    workspace = b"".join(part.tobytes() for part in (lists, sums, halves, unwritten))
    contents = {0: workspace, 8: sums.tobytes(), 16: halves.tobytes(), 24: lists.tobytes()}
    types = {8: "float32", 16: "bfloat16", 24: "int32"}
    float32_words = np.zeros(len(workspace) // 4, np.bool_)
    float32_words[320:920] = True

    def found(address: int, changes: dict[int, bytes]) -> list[str]:
        """What is reported if the words at these indices change, in the workspace (0) or in a tensor."""
        changed = bytearray(contents[address])
        for index, data in changes.items():
            changed[4 * index : 4 * index + len(data)] = data
        recorded = RecordedLaunch("_ZN9topgather4moba", (1, 1, 1), (1, 1, 1), 0, b"", {}, {address: contents[address]})
        replayed = ReplayedLaunch({address: bytes(changed)}, {address: float32_words})
        return differences(recorded, replayed, types, "bfloat16")

    def as_float(value: float) -> bytes:
        return struct.pack("<f", value)

    def as_half(value: int) -> bytes:
        return struct.pack("<H", value)

    assert not found(0, {})
    assert found(0, {7: struct.pack("<i", 8)}), "an integer that is off by one"
    assert not found(0, {330: as_float(sums[10] * (1 + 5e-6))}), "a few roundings"
    assert not found(0, {330: as_float(sums[10] + 1e-3)}), "one sum with a term rounded to the other side"
    assert found(0, {330: as_float(sums[10] + 0.05)}), "a wrong sum"
    assert found(0, {330 + i: as_float(sums[10 + i] + 1e-3) for i in range(60)}), "many sums a little wrong"
    assert not found(0, {920: as_half(int(halves[0]) + 1)}), "the neighbouring bfloat16"
    assert found(0, {920: as_half(int(halves[0]) + 5)}), "another bfloat16"
    assert found(0, {1230: as_float(0.0)}), "written where nothing was"
    assert found(0, {330: b"\xff\xff\xff\xff"}), "left unwritten"
    assert not found(8, {3: as_float(sums[3] * (1 + 5e-6))})
    assert found(8, {3: as_float(sums[3] + 0.05)}), "a wrong float32"
    assert found(16, {3: as_half(int(halves[6]) + 5)}), "a wrong bfloat16"
    assert found(24, {3: struct.pack("<i", 4)}), "a wrong integer"
