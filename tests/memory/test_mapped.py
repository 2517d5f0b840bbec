"""Tables in files: equal to those in memory, larger than memory, whole after a kill at any moment."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from topgather.nn import _row_file

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tables in files need Linux")


def train(layer: tg.nn.ProductKeyMemory, num_steps: int, flush: bool = False) -> list[Tensor]:
    """Losses of a few steps of plain SGD with sparse gradients."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(num_steps):
        loss = (layer(torch.randn(20, 24, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if flush:
            layer.pool.flush()  # type: ignore[operator]
    return losses


def make_layer(pool: tg.nn.MemoryPool) -> tg.nn.ProductKeyMemory:
    torch.manual_seed(3)
    return tg.nn.ProductKeyMemory(24, pool, num_heads=2, top_k=4, key_dim=8)


def table_of(path: Path) -> Tensor:
    """What safetensors reads in a file."""
    load_file: Any = pytest.importorskip("safetensors.torch").load_file
    return load_file(path)["values"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_a_table_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """Losses and rows are the same bits, with and without a flush after every step, and after opening anew."""
    pool = tg.nn.MemoryPool(8, 20, sparse_grad=True, dtype=dtype)
    for name in ("often", "once"):
        pool.to_file(tmp_path / name)
    expected = train(make_layer(pool), 5)
    for name in ("often", "once"):
        layer = make_layer(tg.nn.MemoryPool.from_file(tmp_path / name, 8))
        assert torch.equal(torch.stack(train(layer, 5, name == "often")), torch.stack(expected))
        if name == "once":
            assert layer.pool.flush(70) == 70  # type: ignore[operator]
        assert torch.equal(layer.pool.values, pool.values)
        layer.pool.close()  # type: ignore[operator]
        assert torch.equal(table_of(tmp_path / name), pool.values)
        again = tg.nn.MemoryPool.from_file(tmp_path / name, trainable=False)
        assert again.step == (5 if name == "often" else 70)
        assert torch.equal(again.values, pool.values) and not again.values.requires_grad
        assert not (tmp_path / f"{name}.log").exists()


def test_rows_written_are_those_with_gradients(tmp_path: Path) -> None:
    """Others, changed without a word, are as the file has them after a flush; marked ones are written."""
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 1030)
    start = pool.values.detach().clone()
    pool(torch.tensor([[3, 7, 3]])).sum().backward()
    assert pool.values.grad is not None and pool.values.grad.is_sparse
    with torch.no_grad():
        pool.values[[3, 5, 9]] += 1.0
    pool.mark_rows(torch.tensor([[9]], dtype=torch.int32))
    pool.flush()
    expected = start.clone()
    expected[[3, 9]] += 1.0
    assert torch.equal(pool.values, expected) and torch.equal(table_of(tmp_path / "table"), expected)


@pytest.mark.parametrize("flushes_before_the_step", [False, True])
def test_steps_of_optimizers_reach_the_file(flushes_before_the_step: bool, tmp_path: Path) -> None:
    """Of torch's by the gradient, before and after a flush; of row optimizers by the rows that they step."""
    indices = torch.tensor([[3, 7, 3], [1, 7, 12]])
    for name in ("torch", "rows", "decay"):
        pool = tg.nn.MemoryPool.from_file(tmp_path / name, 4, 6)
        start = pool.values.detach().clone()
        options = {"lr": 0.5} if name != "decay" else {"lr": 0.5, "weight_decay": 0.5, "decoupled_weight_decay": True}
        optimizer = (torch.optim.SGD if name == "torch" else tg.optim.RowSGD)(pool.parameters(), **options)
        pool(indices).sum().backward()
        if flushes_before_the_step:
            pool.flush()
        optimizer.step()
        if isinstance(optimizer, tg.optim.RowSGD):
            optimizer.settle()
        expected = start * 0.75 if name == "decay" else start.clone()
        expected.index_add_(0, indices.flatten(), torch.full((6, 6), -0.5))
        torch.testing.assert_close(pool.values.detach(), expected)
        pool.flush()
        torch.testing.assert_close(pool.values.detach(), expected)
        torch.testing.assert_close(table_of(tmp_path / name), expected)


def test_a_table_that_was_replaced_is_not_taken_for_the_files(tmp_path: Path) -> None:
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 6)
    pool.values = torch.nn.Parameter(torch.ones(16, 6))
    with pytest.raises(RuntimeError, match=r"values of a pool of .* were replaced"):
        pool.flush()
    assert pool.step == 0


# A flush to step 10, then one to step 20 that is killed before a call of the system: one process a call.
KILLED = """
import os, signal, sys, torch
import topgather as tg
torch.set_num_threads(1)
for where in sys.argv[2:]:
    if os.fork() != 0:
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
        continue
    call, number = where.split(":")
    pool = tg.nn.MemoryPool.from_file(f"{sys.argv[1]}/{where}/table")
    for step in (1, 2):
        if step == 2:
            real, count = getattr(os, call), [0]
            def killed(*arguments, **options):
                count[0] += 1
                if count[0] == int(number):
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            setattr(os, call, killed)
        with torch.no_grad():
            pool.values[step::2] = step
        pool.mark_rows(torch.arange(step, 64, 2))
        pool.flush(10 * step)
"""
# Syncs are those of the log, of its name, of the table and of the log's end.
KILLS = {"write:2": 10, "fsync:1": 10, "replace:1": 10, "fsync:2": 20, "fsync:3": 20, "unlink:1": 20, "fsync:4": 20}


def test_killed_within_a_flush(tmp_path: Path) -> None:
    """A table opens at the step before until the log has its name, and at the next one from there on: whole."""
    for where in KILLS:
        (tmp_path / where).mkdir()
        _row_file.create(tmp_path / where / "table", 64, 6, torch.float32, None)
    command = [sys.executable, "-c", KILLED, str(tmp_path), *KILLS]
    subprocess.run(command, timeout=120, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    for where, step in KILLS.items():
        path = tmp_path / where / "table"
        if (path.parent / "table.log").exists():
            # What is in place may be anything then: only the log counts.
            with path.open("r+b") as file:
                file.seek(_row_file.PAGE + 4 * 6 * 2)
                file.write(b"\xff" * (4 * 6))
        expected = torch.zeros(64, 6)
        expected[1::2] = 1
        if step == 20:
            expected[2::2] = 2
        for trainable in (False, True):
            pool = tg.nn.MemoryPool.from_file(path, trainable=trainable)
            assert pool.step == step and torch.equal(pool.values, expected), where
            pool.close()
        assert [each.name for each in path.parent.iterdir()] == ["table"], where


def test_a_flush_that_failed_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space for the log: the file stays as it was, the rows stay marked."""
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 6)
    before = table_of(tmp_path / "table").clone()
    with torch.no_grad():
        pool.values[2] = 5.0
    pool.mark_rows(torch.tensor([2]))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            pool.flush()
    assert pool.step == 0 and torch.equal(table_of(tmp_path / "table"), before)
    pool.flush()
    assert torch.equal(table_of(tmp_path / "table")[2], torch.full((6,), 5.0))


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table"
    pool = tg.nn.MemoryPool.from_file(path, 4, 6)
    pool.close()
    (tmp_path / "table.log").write_bytes(b"TGROWLOG" + bytes(60))
    with pytest.raises(ValueError, match=r"table\.log is damaged"):
        tg.nn.MemoryPool.from_file(path)
    (tmp_path / "table.log").unlink()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ValueError, match="is damaged: it should have"):
        tg.nn.MemoryPool.from_file(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no table"):
        tg.nn.MemoryPool.from_file(path)


def test_one_process_trains(tmp_path: Path) -> None:
    path = tmp_path / "table"
    pool = tg.nn.MemoryPool.from_file(path, 4, 6)
    for trainable in (True, False):
        with pytest.raises(BlockingIOError, match="is open in another process"):
            tg.nn.MemoryPool.from_file(path, trainable=trainable)
    pool.close()
    readers = [tg.nn.MemoryPool.from_file(path, trainable=False) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        tg.nn.MemoryPool.from_file(path)
    with pytest.raises(RuntimeError, match="opened with trainable=False"):
        readers[0].flush()
    del readers, pool
    for _ in range(2):  # a table is let go of with its last name
        pool = tg.nn.MemoryPool.from_file(path)
        pool(torch.tensor([[1, 2]])).sum().backward()
        del pool


LARGE = """
import os, resource, sys, torch
import topgather as tg
from topgather.nn import _row_file
from pathlib import Path

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

path, num_keys = Path(sys.argv[1]), int(sys.argv[2])
_row_file.create(path, num_keys**2, 64, torch.float32, None)
rows = torch.randint(num_keys**2, (6, 40), generator=torch.Generator().manual_seed(0))
small = tg.nn.MemoryPool(16, 64, sparse_grad=True)  # 240 rows of the same
with torch.no_grad():
    small.values.zero_()
numbers = rows.unique(return_inverse=True)[1]
torch.optim.SGD([small.values], lr=0.1)
before = resident()
large = tg.nn.MemoryPool.from_file(path)
outs = []
for pool, indices in ((small, numbers), (large, rows)):
    optimizer = torch.optim.SGD([pool.values], lr=0.1)
    for step in range(3):
        part = slice(2 * step, 2 * step + 2)
        out = pool(indices[part], torch.full((2, 40), 0.5))
        optimizer.zero_grad()
        (out - step - 1).square().sum().backward()
        optimizer.step()
        if pool is large:
            pool.prefetch(indices[part])
            pool.flush()
    outs.append(pool(indices))
assert torch.equal(*outs), "not the same as in memory"
grown = resident() - before
print(path.stat().st_size, grown, large.step, path.stat().st_blocks * 512)
"""


def test_a_table_larger_than_memory(tmp_path: Path) -> None:
    """A file of holes, twice as large as the machine's memory, trains; what is resident grows by its touched rows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num_keys = int((2 * memory / 256) ** 0.5)
    if num_keys > 46340:
        pytest.skip("more memory than a table of 64 columns can have")
    command = [sys.executable, "-c", LARGE, str(tmp_path / "table"), str(num_keys)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    size, grown, step, allocated = map(int, done.stdout.split())
    assert size > 2 * memory * 0.99 and step == 3
    # 240 rows, each of a page of its own: what Python and torch take for themselves is most of this.
    assert grown < 40 * 2**20 and allocated < 8 * 2**20, done.stdout


def test_checkpoints_name_the_step(tmp_path: Path) -> None:
    layer = make_layer(tg.nn.MemoryPool.from_file(tmp_path / "table", 8, 20))
    train(layer, 2, flush=True)
    state = layer.state_dict()
    assert int(state["pool.step"]) == 2 and "pool.values" not in state
    layer.load_state_dict(state)
    train(layer, 1, flush=True)
    with pytest.raises(RuntimeError, match=r"pool\.step is 2, but .*table is at step 3"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing.*pool\.step"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "pool.step"})


def test_stays_where_it_is(tmp_path: Path) -> None:
    """A model is converted around its table; copies and pickles are refused."""
    layer = make_layer(tg.nn.MemoryPool.from_file(tmp_path / "table", 8, 20))
    address = layer.pool.values.data_ptr()
    layer.to(torch.bfloat16)
    assert layer.pool.values.data_ptr() == address and layer.pool.values.dtype == torch.float32
    assert layer(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="not copied or pickled"):
        copy.deepcopy(layer)
    assert "step=0" in repr(layer.pool) and str(tmp_path / "table") in repr(layer.pool)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_keys": 5}, ValueError, "num_keys must be 4, as in"),
        ({"value_dim": 5}, ValueError, "value_dim must be 6, as in"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32, as in"),
        ({"path": 3}, TypeError, "path must be a str or a path"),
        ({"path": "/nowhere/table"}, FileNotFoundError, "there is no file /nowhere/table"),
        ({"trainable": 1}, TypeError, "trainable must be"),
        ({"mode": "max"}, ValueError, "mode must be one of"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    tg.nn.MemoryPool(4, 6, dtype=torch.float32).to_file(tmp_path / "table")
    with pytest.raises(error, match=match):
        tg.nn.MemoryPool.from_file(**{"path": tmp_path / "table", **change})
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table")  # nothing was left locked
    for step in (0, -1):
        with pytest.raises(ValueError, match="step must be"):
            pool.flush(step)
    pool.flush()
    with pytest.raises(ValueError, match="step must be above 1"):
        pool.flush(1)
    with pytest.raises(TypeError, match="rows must have dtype"):
        pool.mark_rows(torch.ones(3))


def test_other_systems_import_what_they_cannot_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows has no fcntl: that must not keep the package from being imported there."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("topgather.nn._row_file_elsewhere", str(_row_file.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(NotImplementedError, match="need Linux"):
        module.RowFile(tmp_path / "table", True)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_the_log_of_another_table_is_not_replayed(is_deleted: bool, tmp_path: Path) -> None:
    """A process was killed before it changed the file; then another table takes its place."""
    path = tmp_path / "table"
    killed = tg.nn.MemoryPool.from_file(path, 4, 6)
    with torch.no_grad():
        killed.values[3] = 7
    killed._file._write_log(torch.tensor([3]), 1)  # type: ignore[attr-defined]
    killed.close()
    if is_deleted:
        path.unlink()
        opened = tg.nn.MemoryPool.from_file(path, 4, 6)
        assert not bool((opened.values[3] == 7).all())
    else:
        pool = tg.nn.MemoryPool(4, 6)
        pool.to_file(path)
        opened = tg.nn.MemoryPool.from_file(path)
        assert torch.equal(opened.values, pool.values)
    assert opened.step == 0
    opened.close()


def test_a_file_that_is_trained_is_not_replaced(tmp_path: Path) -> None:
    """Readers keep what they read."""
    path = tmp_path / "table"
    pool = tg.nn.MemoryPool.from_file(path, 4, 6)
    for other in (pool, tg.nn.MemoryPool(4, 6)):
        with pytest.raises(BlockingIOError, match="is open in another process, or in this one"):
            other.to_file(path)
    before = pool.values.detach().clone()
    pool.close()
    reader = tg.nn.MemoryPool.from_file(path, trainable=False)
    tg.nn.MemoryPool(4, 6).to_file(path)
    assert torch.equal(reader.values, before)
    reader.close()
