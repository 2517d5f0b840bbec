"""The CPU's filter of routing, csrc/moba/moba_route_filter_cpu.h: exact choices by products of bytes.

By itself, compiled here beside a definition (route_filter.cpp), with and without planted bugs; and inside
``moba_route``, where every instruction set must choose alike, for only AVX-512's filters.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.devices import CPU_TARGETS
from tests.cuda.planted_bug import PlantedBug, planted

CSRC = Path(__file__).parents[2] / "csrc"
HARNESS = Path(__file__).with_name("route_filter.cpp")
FILTER = "moba/moba_route_filter_cpu.h"
COMPILER = shutil.which("g++")
CPU_INFO = Path("/proc/cpuinfo")
MULTIPLIES_BYTES = CPU_INFO.exists() and "avx512_vnni" in CPU_INFO.read_text()
alone = pytest.mark.skipif(
    COMPILER is None or not MULTIPLIES_BYTES or "avx512" not in CPU_TARGETS, reason="needs AVX-512 VNNI and g++"
)
FLAGS = [
    "-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno",
    "-Wno-psabi",
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-DTOPGATHER_CPU_TARGET=avx512",
]  # fmt: skip

# centroids [rows, D], queries [up to 64, D], list_length
Problem = tuple[Tensor, Tensor, int]


def compiled(folder: Path, bug: PlantedBug | None = None) -> ctypes.CDLL:
    folder.mkdir(parents=True)
    if bug is not None:
        target = folder / FILTER
        target.parent.mkdir()
        target.write_text(planted(bug, (CSRC / FILTER).read_text()).replace('"../', f'"{CSRC}/').replace(
            '"moba_config.h"', f'"{CSRC}/moba/moba_config.h"'))  # fmt: skip
    library = folder / "route_filter.so"
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, *FLAGS, f"-I{folder}", f"-I{CSRC}", str(HARNESS), "-o", str(library)], check=True, timeout=120
    )
    return ctypes.CDLL(str(library))


def call(function: Callable[..., int], problem: Problem, ends: Tensor) -> tuple[int, Tensor]:
    centroids, queries, list_length = (problem[0].contiguous(), problem[1].contiguous(), problem[2])
    chosen = torch.full((len(queries), list_length), -7, dtype=torch.int32)
    sizes = [ctypes.c_int64(size) for size in (len(centroids), len(queries), queries.shape[1], list_length)]
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (centroids, queries, ends, chosen)]
    result = function(addresses[0], sizes[0], addresses[1], *sizes[1:], addresses[2], addresses[3])
    return result, chosen


def differs(library: ctypes.CDLL, problem: Problem, must_choose: bool = True) -> bool:
    """Whether a choice is not the definition's, or the filter refused what it must choose from."""
    rows, count = len(problem[0]), len(problem[1])
    for ends in (torch.full((count,), rows), rows - torch.arange(count) // 9, rows - 5 + torch.arange(count) // 16):
        chose, chosen = call(library.choose, problem, ends)
        if not chose and must_choose:
            return True
        if chose and not torch.equal(chosen, call(library.define, problem, ends)[1]):
            return True
    return False


def random(rows: int, depth: int, list_length: int, spread: float = 0.0, mean: float = 0.0) -> Problem:
    generator = torch.Generator().manual_seed(rows + depth + list_length)
    scales = torch.exp(spread * torch.randn(depth, generator=generator))
    centroids = (torch.randn(rows, depth, generator=generator) + mean) * scales
    return centroids, torch.randn(64, depth, generator=generator), list_length


def bound_is_reached() -> Problem:
    """A best block and a rival whose estimates are off by all that the bound allows, in opposite directions.

    Queries are +-50.499 (62 columns, as many of each sign), 127 and 0 in units of their bytes: rounding loses 0.499 a
    column. Centroids are whole numbers of their bytes, which lose nothing. The best block is 120 in the 62 columns: its
    estimate is 0, its score 62 * 0.499 * 120 = 3713. The rival is -120 there, and 148 units towards the query's signs:
    its estimate is 7400, its score 3687. The others are 0 or make every column's largest number 127.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(31)
    query = torch.cat([signs * 50 + 0.499, torch.tensor([127.0, 0.0])])
    towards = torch.full((62,), 2.0)
    towards[:24] = 3.0
    rows = torch.zeros(480, 64)
    rows[100, :62] = 120.0
    rows[300, :62] = -120.0 + signs * towards
    rows[400, 62] = 127.0
    for pair in range(31):
        rows[150 + pair, 2 * pair : 2 * pair + 2] = 127.0
    rows[200:232] = -rows[150:182]
    rows[101], rows[301], rows[401] = -rows[100], -rows[300], -rows[400]
    return rows / 128, query.expand(64, 64), 2


def last_bits() -> Problem:
    """Sixty blocks that lead, and differ from one another in the last bits alone: the order of summing decides."""
    centroids, queries, _ = random(500, 64, 8)
    leader = queries[0] / 8
    places = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:60]
    noise = torch.randint(-6, 7, (60, 64), generator=torch.Generator().manual_seed(2))
    centroids = centroids / 64
    centroids[places] = leader * (1 + noise * 2.0**-23)
    return centroids, queries[:1] + torch.zeros(64, 1), 8


def equal_leaders() -> Problem:
    """Thirty equal blocks lead: the lowest are chosen."""
    centroids, queries, _ = random(500, 64, 8)
    centroids[torch.arange(9, 490, 16)] = queries[0] * 2
    return centroids, queries[:1] + torch.zeros(64, 1), 8


def one_great_row_a_stretch() -> Problem:
    """Norms that differ within a stretch, so that none but the largest bounds it."""
    centroids, queries, _ = random(800, 64, 4)
    return centroids * torch.where(torch.arange(800) % 24 == 11, 40.0, 1.0)[:, None], queries, 4


def many_leaders(places: Tensor) -> Problem:
    """More candidates of a query than there is room for, the best of them last: refused, never cut off."""
    centroids, queries, _ = random(1200, 64, 8)
    direction = queries[20] / queries[20].norm()
    others = queries - (queries @ direction)[:, None] * direction  # do not see the leaders
    queries = torch.where(torch.arange(64)[:, None] == 20, queries, others)
    centroids[places] = queries[20] * (2 + torch.arange(len(places)) * 1e-4)[:, None]
    return centroids, queries, 8


def one_number(number: float) -> Tensor:
    """Centroids of which one has one such number, before others of its row."""
    centroids = random(500, 64, 8)[0]
    centroids[77, 3] = number
    return centroids


CHOSEN: dict[str, Callable[[], Problem]] = {
    "random": lambda: random(1000, 64, 8),
    "one column": lambda: random(500, 1, 3),
    "three columns": lambda: random(500, 3, 2),
    "odd columns": lambda: random(650, 100, 5),
    "wide": lambda: random(400, 256, 6),
    "outlying columns": lambda: random(900, 64, 8, spread=2.0),
    "far from 0": lambda: random(900, 64, 8, mean=30.0),
    "longest list": lambda: random(1500, 64, 16),
    "tiny": lambda: (random(500, 64, 8)[0] * 1e-15, random(500, 64, 8)[1] * 1e-3, 8),
    "great": lambda: (random(500, 64, 8)[0] * 1e8, random(500, 64, 8)[1] * 1e7, 8),
    "bound is reached": bound_is_reached,
    "last bits": last_bits,
    "equal leaders": equal_leaders,
    "one great row a stretch": one_great_row_a_stretch,
}
REFUSED: dict[str, Callable[[], Problem]] = {
    "all equal": lambda: (torch.ones(500, 64), torch.ones(64, 64), 8),
    "zeros": lambda: (torch.zeros(500, 64), torch.ones(64, 64), 8),
    "zero query": lambda: (random(500, 64, 8)[0], torch.zeros(64, 64), 8),
    "NaN": lambda: (random(500, 64, 8)[0].index_fill(0, torch.tensor([77]), torch.nan), torch.ones(64, 64), 8),
    "NaN in one column": lambda: (one_number(torch.nan), torch.ones(64, 64), 8),
    "infinite in one column": lambda: (one_number(-torch.inf), torch.ones(64, 64), 8),
    "infinite": lambda: (random(500, 64, 8)[0].index_fill(0, torch.tensor([77]), torch.inf), torch.ones(64, 64), 8),
    "infinite query": lambda: (random(500, 64, 8)[0], torch.full((64, 64), torch.inf), 8),
    "subnormal": lambda: (random(500, 64, 8)[0] * 1e-40, torch.ones(64, 64), 8),
    "huge": lambda: (random(500, 64, 8)[0] * 1e30, torch.ones(64, 64), 8),
    "too many candidates": lambda: many_leaders(torch.arange(300, 600)),
    "candidates in too many groups": lambda: many_leaders(torch.arange(3, 1200, 6)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    yield compiled(tmp_path_factory.mktemp("filter") / "right")


@alone
@pytest.mark.parametrize("name", CHOSEN)
def test_chooses_as_defined(library: ctypes.CDLL, name: str) -> None:
    assert not differs(library, CHOSEN[name]())


@alone
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_has_no_bound(library: ctypes.CDLL, name: str) -> None:
    problem = REFUSED[name]()
    ends = torch.full((len(problem[1]),), len(problem[0]))
    assert call(library.choose, problem, ends)[0] == 0


def bug(name: str, text: str, replacement: str) -> PlantedBug:
    return PlantedBug(name, FILTER, text, replacement, "", "")


# Of each, the problem that finds it.
BUGS = {
    bug("bound too tight by 1 %", "minimum(error * 1.0001f + 2.0f,", "minimum(error * 0.99f,"): "bound is reached",
    bug(
        "bound of the first row of a stretch",
        "bytes = row_bytes > bytes ? row_bytes : bytes;",
        "bytes = j % kRowsPerStretch == 0 ? row_bytes : bytes;",
    ): "bound is reached",
    bug("no doubt", "const float doubt = 2 * score_errors_[lane];", "const float doubt = -1;"): "last bits",
    bug(
        "a tie kept by arrival",
        "scores_[j] == scores_[i] && j < i",
        "scores_[j] == scores_[i] && j > i",
    ): "equal leaders",
    bug(
        "a list of groups that overflows",
        "if (num_groups_[lane] + num_groups - full_groups > kMaxGroups) return false;",
        "num_groups_[lane] = min64(num_groups_[lane], kMaxGroups - 3);",
    ): "candidates in too many groups",
    bug(
        "a list of candidates that overflows",
        "if (count > kMaxCandidates) return -1;",
        "count = min64(count, kMaxCandidates);",
    ): "too many candidates",
    bug("rows past the end", "lanes_not_below(last, rows) &", ""): "random",
}


@alone
@pytest.mark.parametrize("planted_bug", BUGS, ids=str)
def test_planted_bugs_are_found(planted_bug: PlantedBug, tmp_path: Path) -> None:
    broken = compiled(tmp_path / "broken", planted_bug)
    problem = {**CHOSEN, **REFUSED}[BUGS[planted_bug]]()
    assert differs(broken, problem, must_choose=False)


def choices(target: str, *arguments: object, **options: object) -> Tensor:
    tg._native.set_cpu_target(target)
    return torch.ops.topgather.moba_route(*arguments, **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_choose_alike(dtype: torch.dtype) -> None:
    """Scores are the same bits wherever multiply-adds are fused, so with and without the filter the choice is too."""
    fused = [target for target in CPU_TARGETS if target != "baseline"]
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 1801, 24, generator=generator).to(dtype)
    query = torch.randn(2, 4, 150, 24, generator=generator).to(dtype)
    key[1, 1, 700] = torch.inf
    query[0, 3, 17, 3] = torch.nan
    before = tg._native.cpu_target()
    try:
        for top_k, is_causal, options in (
            (3, True, {}),
            (9, True, {"force_first": 2, "force_last": 3}),
            (7, False, {"force_first": 1}),
        ):
            if fused:
                arguments = (query, key, 4, top_k, is_causal)
                expected = choices(fused[0], *arguments, **options)
                for target in fused[1:]:
                    assert torch.equal(choices(target, *arguments, **options), expected), (target, top_k, options)
        boundaries = torch.tensor([0, 1700, 1701, 3602], dtype=torch.int32)
        packed = (key.transpose(0, 1).flatten(1, 2).transpose(0, 1).contiguous(),) * 2
        expected = None
        for target in fused:
            chosen = choices(target, packed[0], packed[1], 4, 5, True, boundaries, boundaries, 1901, 1901)
            expected = chosen if expected is None else expected
            assert torch.equal(chosen, expected), target
    finally:
        tg._native.set_cpu_target(before)
