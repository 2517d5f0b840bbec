"""The advisor: what it measures, what it advises, and how it says so."""

import base64
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import topgather as tg
from topgather.advisor import Advice, AttentionShape, Measurement, Needle, _attention, _command
from topgather.advisor._measure import peak_bytes, time_in_turn

SHAPE = AttentionShape(2, 1, 64, torch.float32)


def row(seq_len: int, setting: tuple[int, int] | None, seconds: float, recall: float = 1.0) -> Measurement:
    block_size, top_k = setting or (None, None)
    return Measurement(seq_len, block_size, top_k, seconds, None, recall)


def decide(*rows: Measurement, min_recall: float = 0.9) -> Advice:
    seq_lens = (max(one.seq_len for one in rows),)
    return _attention._decide(SHAPE, "a device", seq_lens, rows, Needle(), min_recall)


# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "missed"), [(1, 0.721), (4, 0.423), (8, 0.246)])
def test_recall_is_that_of_the_law(top_k: int, missed: float) -> None:
    """docs/block-attention.md has these for 32 blocks; here one more is the query's own, and takes a slot."""
    assert Needle(4).recall(33 * 64, 64, 64, top_k + 1) == pytest.approx(1 - missed, abs=6e-4)


def test_recall_at_the_ends() -> None:
    needle = Needle()
    assert needle.recall(1024, 64, 128, 1) == 0.0  # the own block alone
    assert needle.recall(1024, 64, 128, 8) == 1.0  # all blocks
    assert needle.recall(100, 64, 128, 1) == 1.0  # one block
    assert needle.recall(1 << 20, 64, 16, 4) < needle.recall(1 << 14, 64, 16, 4)
    assert needle.signal_to_noise(64, 32) == pytest.approx(math.sqrt(2) * needle.signal_to_noise(64, 64))


# --- what is advised ------------------------------------------------------------------------------------------------


def test_the_fastest_setting_with_enough_recall_is_advised() -> None:
    slow, fast, blind = (row(4096, (64, k), s, r) for k, s, r in ((16, 0.5, 0.99), (8, 0.3, 0.95), (4, 0.1, 0.5)))
    advice = decide(row(4096, None, 1.0), slow, fast, blind)
    assert advice.recommended is fast and "reaches 0.9" in advice.reason
    assert advice.speedup(fast) == pytest.approx(1 / 0.3)
    assert "block_size=64, top_k=8" in advice.code


def test_without_enough_recall_the_highest_is_advised() -> None:
    better = row(4096, (64, 8), 0.9, 0.6)
    advice = decide(row(4096, None, 1.0), better, row(4096, (64, 4), 0.1, 0.3), row(4096, (64, 16), 1.1, 1.0))
    assert advice.recommended is better and "None that is faster" in advice.reason
    close = row(4096, (32, 8), 0.4, 0.56)
    assert decide(row(4096, None, 1.0), better, close, row(4096, (64, 4), 0.1, 0.3)).recommended is close


def test_dense_attention_is_advised_where_it_is_faster_or_the_same() -> None:
    advice = decide(row(512, None, 1.0), row(512, (64, 4), 2.0))
    assert advice.recommended is None and advice.crossover is None
    assert "scaled_dot_product_attention" in advice.code and "dense attention is faster" in advice.reason
    advice = decide(row(512, None, 1.0), row(512, (64, 8), 0.5))  # reads everything
    assert advice.recommended is None and "reads all blocks" in advice.reason
    assert "block_size" not in str(advice).split("Advised")[0]


def test_crossover_lies_between_two_lengths() -> None:
    setting = (32, 4)
    lengths = (512, 1024, 2048)
    dense = [row(length, None, 1e-6 * length**2) for length in lengths]
    block = [row(length, setting, 1e-3 * length) for length in lengths]  # the lines meet at 1000
    advice = decide(*(one for pair in zip(dense, block, strict=True) for one in pair))
    assert advice.crossover == 1000 and advice.is_crossover_exact
    assert "Below about 1000 tokens" in str(advice)
    assert decide(dense[2], block[2]).is_crossover_exact is False


# --- measuring ------------------------------------------------------------------------------------------------------


def test_candidates_run_in_turn_and_the_least_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = {"left": iter((5.0, 3.0, 4.0, 9.0)), "right": iter((2.0, 2.0, 1.0, 9.0))}
    clock = [0.0]

    def run(name: str) -> None:
        order.append(name)
        clock[0] += next(times[name])

    monkeypatch.setattr("topgather.advisor._measure.time.perf_counter", lambda: clock[0])
    least = time_in_turn({name: lambda name=name: run(name) for name in times}, torch.device("cpu"), 17.0)
    assert order == ["left", "right"] * 3
    assert least == {"left": 3.0, "right": 1.0}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_peak_counts_what_a_call_holds_at_most() -> None:
    cpu = torch.device("cpu")
    assert (peak := peak_bytes(lambda: torch.zeros(1 << 24).add(1).sum(), cpu)) is not None
    assert 1.95 * 2**26 <= peak < 2.2 * 2**26  # the system counts in batches of pages
    again = peak_bytes(lambda: torch.zeros(1 << 22).sum(), cpu)  # what was freed is no part of it
    assert again is not None and 0.9 * 2**24 <= again < 1.5 * 2**24


def test_advice_of_a_shape(tmp_path: Path) -> None:
    advice = tg.advise(
        seq_len=[600, 300], heads=4, kv_heads=2, head_dim=16, train=True, dtype=torch.bfloat16, block_sizes=[64, 32],
        top_ks=[2], seconds=0.2,
    )  # fmt: skip
    assert advice.seq_lens == (300, 600)
    assert [one.seq_len for one in advice.curve(None)] == [300, 512, 600]
    assert [one.setting for one in advice.at(600)] == [None, (32, 2), (64, 2)]
    assert all(one.seconds > 0 and 0 <= one.recall <= 1 for one in advice.measurements)
    text = str(advice)
    assert "4 heads on 2 key heads of 16 channels, bfloat16, forward and backward" in text
    assert text.count("block_size 32, top_k 2") >= 2 and "512  " not in text

    pytest.importorskip("matplotlib")
    advice.save_html(tmp_path / "advice.html")
    page = (tmp_path / "advice.html").read_text()
    assert "block_size 64, top_k 2" in page and "<table>" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # of itself alone
    assert b"<svg" in base64.b64decode(re.findall(r"base64,([^\"]*)", page)[0])


def test_dense_attention_beyond_the_time_given_is_extrapolated() -> None:
    advice = tg.advise(seq_len=2048, heads=2, head_dim=16, block_sizes=[64], top_ks=[2], seconds=1e-4)
    last = advice.at(2048)[0]
    first = advice.at(512)[0]
    assert first.is_measured and not last.is_measured and last.bytes is None
    assert last.seconds == pytest.approx(16 * first.seconds)
    assert "not measured" in str(advice)


def test_advice_of_a_memory_layer(tmp_path: Path) -> None:
    advice = tg.advise_memory(1000, 32, 4, num_heads=2, key_dim=16, num_tokens=64, train=True, seconds=0.1)
    assert advice.rows == 32 * 32 and advice.table_bytes == 32 * 32 * 32 * 4
    assert [one.top_k for one in advice.measurements] == [2, 4, 8]
    pool = tg.nn.MemoryPool(32, 32)
    layer = tg.nn.ProductKeyMemory(32, pool, 2, 4, 16)
    total = sum(parameter.numel() for parameter in layer.parameters())
    assert advice.measurements[1].parameters == total
    assert advice.measurements[1].active_parameters == total - 32 * 32 * 32 + 2 * 4 * 32
    assert advice.feed_forward.parameters == 8 * 32 * 32 + 4 * 32 + 32 and advice.feed_forward.active_share == 1
    assert "feed-forward" in str(advice) and "num_keys=32" in advice.code
    for line in advice.code.splitlines():
        compile(line, "code", "exec")
    pytest.importorskip("matplotlib")
    advice.save_html(tmp_path / "memory.html")
    assert "Memory layer" in (tmp_path / "memory.html").read_text()


# --- models ---------------------------------------------------------------------------------------------------------


def test_sizes_come_from_a_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, max_position_embeddings=256,
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    advice = tg.advise(model=str(tmp_path), block_sizes=[32], top_ks=[2], seconds=0.05)
    shape = advice.shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.num_layers) == (4, 2, 16, 3)
    assert shape.dtype == torch.bfloat16 and advice.seq_lens == (256,)
    assert "the model has 3" in str(advice)
    for path in ("transformers.LlamaConfig", "transformers:LlamaForCausalLM"):
        assert _attention.shape_of_model(path, kv_heads=8).kv_heads == 8
    for unknown in ("torch.nn.Linear", "torch.nn:Nothing", "no_such_package:Model", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="model must"):
            tg.advise(model=unknown)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"heads": 3, "kv_heads": 2}, ValueError, "kv_heads"),
        ({"seq_len": 0}, ValueError, "seq_len"),
        ({"seq_len": []}, ValueError, "seq_len"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"seconds": "long"}, TypeError, "seconds"),
        ({"min_recall": 1.5}, ValueError, "min_recall"),
        ({"needle": 4}, TypeError, "needle"),
        ({"model": 3}, TypeError, "model"),
        ({"train": 1}, TypeError, "train"),
    ],
)
def test_bad_arguments(options: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        tg.advise(**options)  # type: ignore[arg-type]


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--heads", "2", "--head-dim", "16", "--seconds", "0.05", "--block-size", "32", "--top-k", "2"]
    assert _command.run(["--seq-len", "128", *size]) == 0
    assert "Advised" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        _command.run(["--seq-len", "-1"])
    assert left.value.code == 2 and "seq_len must be" in capsys.readouterr().err


def test_command_without_optional_packages(tmp_path: Path) -> None:
    """Plain text without rich, tqdm and matplotlib; a page is refused in words, before anything is measured."""
    script = (
        "import sys\n"
        "for name in ('rich', 'tqdm', 'matplotlib'): sys.modules[name] = None\n"
        "from topgather.__main__ import main\n"
        "size = ['--seq-len', '128', '--heads', '1', '--block-size', '32', '--top-k', '2', '--seconds', '0.01']\n"
        "assert main(['advise', *size]) == 0\n"
        "assert main(['advise', '--memory', '64', '16', '2', '--tokens', '8', '--seconds', '0.01']) == 0\n"
        "assert main(['nothing']) == 2\n"
        "main(['advise', *size, '--html', sys.argv[1]])\n"
    )
    page = tmp_path / "page.html"
    done = subprocess.run([sys.executable, "-c", script, str(page)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--html needs the package matplotlib" in done.stderr, done.stderr
    assert done.stdout.count("Advised") == 2 and "measuring 128 tokens" in done.stderr
    assert not page.exists()


# --- modes of the caller --------------------------------------------------------------------------------------------

ADVISE = {
    "attention": lambda: tg.advise(heads=2, kv_heads=1, head_dim=8, seq_len=128, train=True, seconds=0.01),
    "memory": lambda: tg.advise_memory(64, 16, 2, num_heads=1, num_tokens=16, train=True, seconds=0.01),
}


@pytest.mark.parametrize("name", ADVISE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_measures_gradients_in_any_mode_and_draws_no_number_of_the_caller(name: str, mode: Any) -> None:
    before = torch.random.get_rng_state()
    with mode():
        ADVISE[name]()
    assert torch.equal(torch.random.get_rng_state(), before)
