"""`make model`: reading SASS, finding the way through it, running it on the model, and noticing a longer loop.

The excerpt is moba_row_terms<BFloat16> of CUDA 13.0 for sm_90: a loop over columns that the compiler unrolled by four,
and a loop for what that leaves over.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXCERPT = (Path(__file__).parent / "sass" / "moba_row_terms.sass").read_text()
ROOT = Path(__file__).resolve().parents[2]
LOOP = "for (int column = lane"
LOOP_LINE = 57  # of moba_backward_cuda.cu when the excerpt was made


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import model.block_attention
    import model.report

    return model  # type: ignore[no-any-return]


def sources(model: ModuleType) -> Any:
    lines = [""] * 200
    lines[LOOP_LINE - 1] = "for (int column = lane; column < args.value_dim; column += cuda::kLanes) {"
    lines[LOOP_LINE] = "sum = fmaf(cuda::to_float(out[column]), cuda::to_float(grad_out[column]), sum);"
    lines[LOOP_LINE + 1] = "}"
    return model.paths.Sources({"moba_backward_cuda.cu": lines})


def kernel_of(model: ModuleType, text: str = EXCERPT) -> Any:
    (kernel,) = model.sass.parse(text).values()
    return kernel


def way(model: ModuleType, columns: float, text: str = EXCERPT, **options: Any) -> list[Any]:
    passes = [model.paths.Passes(LOOP, columns, unrolled=4)]
    walker = model.paths.Walker(kernel_of(model, text), sources(model), passes, **options)
    return walker.whole()  # type: ignore[no-any-return]


def loads(instructions: list[Any]) -> int:
    """Of 16-bit elements: two a column."""
    return sum(i.operation.startswith("LDG.E.U16") for i in instructions)


# --- reading ------------------------------------------------------------------------------------------------------


def test_parser_reads_control_codes_and_places(model: ModuleType) -> None:
    instructions = kernel_of(model).instructions
    first = instructions[0]
    # 0x000fe20000000800: stall 1, no scoreboard set, none waited for.
    assert (first.address, first.operation, first.stall) == (0, "LDC", 1)
    assert (first.write_scoreboard, first.read_scoreboard, first.waits_for) == (7, 7, 0)
    second = instructions[1]
    # 0x000e220000002100: sets scoreboard 0.
    assert (second.operation, second.operands, second.write_scoreboard) == ("S2R", "R31, SR_TID.X", 0)
    assert [str(place) for place in second.places] == ["tile_math.cuh:26", "moba_backward_cuda.cu:49"]


def test_parser_finds_both_loops(model: ModuleType) -> None:
    kernel = kernel_of(model)
    unrolled, single = sorted(kernel.loops, key=lambda loop: -len(kernel.blocks[loop.header].instructions))[:2]
    assert loads(kernel.blocks[unrolled.header].instructions) == 8
    assert loads(kernel.blocks[single.header].instructions) == 2
    assert str(kernel.blocks[unrolled.latches[0]].last.places[0]) == f"moba_backward_cuda.cu:{LOOP_LINE}"


def test_parser_wants_encodings(model: ModuleType) -> None:
    without = re.sub(r"\n  /\* 0x[0-9a-f]{16} \*/", "", EXCERPT)
    with pytest.raises(ValueError, match="-hex"):
        model.sass.parse(without)


# --- the way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 1, 3, 4, 6, 8, 12])
def test_way_makes_as_many_passes_as_it_is_told(model: ModuleType, columns: int) -> None:
    assert loads(way(model, columns)) == 2 * columns


def test_way_refuses_a_loop_that_no_trip_count_is_given_for(model: ModuleType) -> None:
    walker = model.paths.Walker(kernel_of(model), sources(model), [])
    with pytest.raises(model.paths.WalkError, match=r"no trip count for the loop of moba_backward_cuda\.cu:57"):
        walker.whole()


def listing(*lines: tuple[int, str]) -> str:
    """What nvdisasm would print of one kernel. Of each line: where in x.cu it stands, and the instruction or label."""
    text, address = '\t.section\t.text.x,"ax",@progbits\n', 0
    for number, line in lines:
        if line.endswith(":"):
            text += f"{line}\n"
            continue
        text += f'\t//## File "x.cu", line {number}\n  /*{address:04x}*/  {line} ;  /* 0x{0:016x} */\n'
        text += "  /* 0x000fc20000000000 */\n"
        address += 16
    return text


BRANCH = listing(
    (1, "ISETP P0"), (1, "@P0 BRA `(.L_x_0)"), (2, "FADD R1"), (2, "FMUL R1"), (3, ".L_x_0:"), (3, "IADD3 R2"),
    (3, "@P1 BRA `(.L_x_1)"), (4, "MUFU R3"), (5, ".L_x_1:"), (5, "EXIT"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rare", "passes", "taken"),
    [
        ([], [], "ISETP BRA FADD FMUL IADD3 BRA MUFU EXIT"),
        (["never();"], [], "ISETP BRA IADD3 BRA MUFU EXIT"),
        (["never"], [], "ISETP BRA FADD FMUL IADD3 BRA EXIT"),
        ([], [("if (b)", 0)], "ISETP BRA FADD FMUL IADD3 BRA EXIT"),
    ],
)
def test_way_enters_bodies_but_rare_ones(
    model: ModuleType, rare: list[str], passes: list[tuple[str, float]], taken: str
) -> None:
    (kernel,) = model.sass.parse(BRANCH).values()
    text = model.paths.Sources({"x.cu": ["if (a)", "never();", "if (b)", "void never() {}", "}"]})
    # A function, as the line is one that begins it; else a line that begins so.
    text.lines["x.cu"][3] = "__device__ void never(int) {}"
    walker = model.paths.Walker(kernel, text, [model.paths.Passes(*entry) for entry in passes], rare)
    assert " ".join(i.opcode for i in walker.whole()) == taken


# --- the multiprocessor ---------------------------------------------------------------------------------------------


def instruction(model: ModuleType, operation: str, **options: Any) -> Any:
    fields = {"stall": 1, "write_scoreboard": 7, "read_scoreboard": 7, "waits_for": 0, **options}
    return model.sass.Instruction(0, operation, **{"operands": "", "predicate": "", **fields})


def cycles(model: ModuleType, *warps: list[Any]) -> int:
    return model.processor.simulate([list(warps)]).cycles  # type: ignore[no-any-return]


def test_a_stall_delays_the_next_instruction(model: ModuleType) -> None:
    first, last = instruction(model, "IADD3", stall=5), instruction(model, "IADD3")
    assert cycles(model, [first, last]) == 5 + 1


def test_groups_of_copies_are_waited_for_in_order(model: ModuleType) -> None:
    """``DEPBAR.LE SB0, n`` lets n groups be under way."""
    copy, commit = instruction(model, "LDGSTS", stall=100), instruction(model, "LDGDEPBAR", stall=1)
    latency = model.processor.COPY_LATENCY
    for groups_left, issued in ((0, 101), (1, 0), (2, None)):
        wait = instruction(model, "DEPBAR.LE", operands=f"SB0, 0x{groups_left}")
        taken = cycles(model, [copy, commit, copy, commit, wait])
        assert taken == (2 * 101 + 1 if issued is None else issued + latency + 1)


def test_a_result_is_waited_for_by_its_scoreboard(model: ModuleType) -> None:
    load, use = instruction(model, "LDS", write_scoreboard=2), instruction(model, "FADD", waits_for=1 << 2)
    assert cycles(model, [load, use]) == model.processor.LATENCY["LDS"] + 1


def test_a_tensor_core_takes_a_product_every_eight_cycles(model: ModuleType) -> None:
    assert cycles(model, [instruction(model, "HMMA")] * 4) == 3 * 8 + 1


def test_warps_of_a_scheduler_share_its_tensor_core_and_those_of_others_do_not(model: ModuleType) -> None:
    products = [instruction(model, "HMMA")] * 4
    assert cycles(model, *[products] * 4) == 3 * 8 + 1
    assert cycles(model, *[products] * 8) == 7 * 8 + 1


def test_schedulers_share_the_memory_pipe(model: ModuleType) -> None:
    # 4 x 16 matrix loads of 4 cycles; the last is issued once no more than a queue's worth is before it.
    matrix_loads = [instruction(model, "LDSM")] * 16
    assert cycles(model, *[matrix_loads] * 4) == pytest.approx(4 * 16 * 4 - model.processor.MEMORY_QUEUE, abs=4)


def test_warps_wait_for_each_other_at_a_barrier(model: ModuleType) -> None:
    slow = [instruction(model, "IADD3", stall=15), instruction(model, "BAR"), instruction(model, "EXIT")]
    fast = [instruction(model, "BAR"), instruction(model, "EXIT")]
    assert cycles(model, slow, fast) == 15 + model.processor.BARRIER_CYCLES + 1


def test_what_is_predicated_off_for_good_takes_an_issue_slot_alone(model: ModuleType) -> None:
    assert cycles(model, [instruction(model, "LDSM", predicate="@!PT")] * 32) == 32


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "resident"),
    [(255, 98432, 128, 2), (127, 83968, 256, 2), (32, 0, 256, 8), (64, 0, 1024, 1), (16, 0, 32, 32)],
)
def test_resident_thread_blocks(model: ModuleType, registers: int, shared: int, threads: int, resident: int) -> None:
    assert model.processor.resident_thread_blocks(registers, shared, threads) == resident


# --- what CI compares -----------------------------------------------------------------------------------------------


def subjects(model: ModuleType, text: str) -> Any:
    kernel = kernel_of(model, text)
    passes = (model.paths.Passes(LOOP, 4, unrolled=4),)
    described = model.problems.KernelModel(
        "moba_row_terms", "-", lambda _: "", "a warp's row", lambda *_: [model.problems.Launch(1, passes, 0)],
        head_dims=(128,),
    )  # fmt: skip
    return [model.report.Subject(described, 128, kernel, 45, 0, 256, sources(model))]


def test_a_planted_instruction_in_a_loop_is_noticed(model: ModuleType) -> None:
    before = f"{model.report.HEADING}\n{model.report.format_counts(subjects(model, EXCERPT))}{model.report.COUNTS_END}"
    assert model.report.check_counts(subjects(model, EXCERPT), before) == []
    # A multiply-add of the unrolled loop once more.
    at = next(re.finditer(r"  /\*0[9ab][0-9a-f]0\*/  FFMA .*\n.*\n", EXCERPT))
    planted = EXCERPT[: at.start()] + at[0].replace("FFMA", "FFMA.PLANTED") + EXCERPT[at.start() :]
    (fault,) = model.report.check_counts(subjects(model, planted), before)
    assert "run `make model`" in fault
    counts = [int(line.split(" | ")[4]) for line in fault.splitlines()[1:]]
    assert counts[1] == counts[0] + 1


def test_the_counts_cover_what_the_document_says(model: ModuleType) -> None:
    document = (ROOT / "docs" / "kernels.md").read_text()
    part = document.partition(model.report.HEADING)[2]
    for described in model.report.KERNELS:
        assert f"| `{described.name}` |" in part
    for case in model.report.CASES:
        assert f"| {case.name} |" in part


def test_every_trip_count_names_a_line_of_the_sources(model: ModuleType) -> None:
    lines = {line.strip() for file in model.paths.Sources.of(ROOT / "csrc").lines.values() for line in file}
    of_cases = {id(described): launch for case in model.report.CASES for described, launch in case.launches}
    for described in model.report.KERNELS:
        for problem in model.problems.PROBLEMS:
            launches = described.launches(problem, described.directions[0])
            launches += [of_cases[id(described)]] if id(described) in of_cases else []
            for entry in (entry for launch in launches for entry in launch.passes):
                assert any(line.startswith(entry.line) for line in lines), entry
        for name in described.rare:
            assert any(line.startswith(name) or f" {name}(" in line for line in lines), name


def test_a_case_takes_the_longer_of_instructions_and_bytes(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (subject,) = subjects(model, EXCERPT)
    passes = (model.paths.Passes(LOOP, 4, unrolled=4),)
    little, much = model.problems.Launch(1, passes, 3e3), model.problems.Launch(1, passes, 3e9, launches=2)
    case = model.problems.Case("rows", ((subject.model, little), (subject.model, much)), 1.5e9)
    monkeypatch.setattr(model.report, "CASES", (case,))
    rows = [line.strip("|").split("|") for line in model.report.format_cases([subject]).splitlines()[2:]]
    cycles = subject.cycles(little, 1)[0]
    issue = cycles / model.processor.CLOCK * 1e3
    assert [float(row[-2]) for row in rows[1:]] == pytest.approx([issue + 0.003, 1 + 0.006], abs=6e-4)
    assert float(rows[0][-2]) == pytest.approx(1 + 0.009 + issue, abs=6e-4)
    assert rows[0][-1].strip() == "49 %"


def test_insertions_of_random_scores(model: ModuleType) -> None:
    # One row: the first tile enters all of its scores, the second those above the 7th best of 32: 32 * 7 / 33.
    assert model.problems.insertions(32, 7) == 32
    assert model.problems._most_marked(32, 7, 1, 32) == pytest.approx(32 * 7 / 33)
    # The more rows, the later is the last of them done.
    assert 7 < model.problems._most_marked(32, 7, 32, 32) < 20
    assert model.problems.insertions(4096, 7) < model.problems.insertions(512, 7)
