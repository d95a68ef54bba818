"""The GPU benchmark without a GPU: all of its parts at tiny shapes in Triton's interpreter."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import bench_gpu
import gpu_baselines
import gpu_checks
import gpu_pack
import gpu_shapes
import pytest
import torch
from bf16_decode import CUTS, Bf16Decode
from gpu_cases import PackedLayerTables
from gpu_report import COLUMNS, Deadline, Report
from gpu_shapes import Bench
from gpu_timing import Timing, race

from kvq_kernels import pack

CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_bench(tmp_path: Path) -> Bench:
    report = Report(tmp_path / "x.csv", {"gpu": "none"})
    return Bench(CPU, report, gpu_shapes.SMOKE, smoke=True)


@pytest.fixture
def fewer_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are what ``tests/kernels`` does at length."""
    monkeypatch.setattr(gpu_checks, "CHECKS", {"decode": gpu_checks.CHECKS["decode"]})


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes nearly as long for a small tile as for a large one."""
    monkeypatch.setattr(pack, "SCALE_TILE", 2**16)
    monkeypatch.setattr(pack, "CHUNK", 2**14)


@pytest.mark.usefixtures("fewer_checks", "large_tiles")
def test_every_part_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.csv"
    assert bench_gpu.main(["--smoke", "--no-tests", "--commit", "abc1234", "-o", str(path)]) == 0
    rows = rows_of(path)
    assert set(COLUMNS) < set(rows[0])
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert all("smoke: times mean nothing" in row["note"] for row in rows)
    parts = {row["part"] for row in rows}
    assert parts == {
        *("facts", "checks", "ceilings", "decode", "decode kernels", "captured", "model", "pack"),
        "prefill",
    }
    assert not [row for row in rows if row["metric"] == "failed"]
    timed = {(row["part"], row["what"]) for row in rows if row["metric"] == "us" and row["value"]}
    assert {
        ("ceilings", "copy"),
        ("decode", "kvq"),
        ("decode", "triton split-KV"),
        ("decode", "sdpa math"),
        ("decode kernels", "decode_splits"),
        ("decode kernels", "value_outlier_sums"),
        ("pack", "keys and values"),
        ("pack", "keys and values, without feedback"),
        ("prefill", "kvq"),
    } <= timed
    compared = [row for row in rows if row["metric"] == "times best bf16"]
    assert {row["part"] for row in compared} == {"decode", "captured", "prefill"}
    (equal,) = (row for row in rows if row["metric"] == "logits equal eager ones")
    assert equal["value"] == "1"
    printed = capsys.readouterr().out
    assert "== decode" in printed
    assert str(path) in printed


def test_packing_is_timed_with_feedback_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a row says of feedback is what its layer does."""
    layers: list[PackedLayerTables] = []

    def first_lap(laps: dict[str, list[Callable[[], object]]], **_: object) -> dict[str, Timing]:
        assert [name.split(": ")[0] for name in laps] == list(gpu_pack.WAYS)
        return {name: Timing() for name in laps}

    def packing(layer: PackedLayerTables, *_: object) -> Callable[[], tuple[()]]:
        if all(layer is not one for one in layers):
            layers.append(layer)
        return tuple

    monkeypatch.setattr(gpu_pack, "race", first_lap)
    monkeypatch.setattr(gpu_pack, "_packing", packing)
    gpu_pack.run(make_bench(tmp_path), Deadline(0))
    assert list(gpu_pack.WAYS.values()) == [True, False]
    assert [layer.config.feedback for layer in layers] == [True, False]
    for layer in layers:
        used = [
            part.feedback is not None for part in (layer.parameters.key, layer.parameters.value)
        ]
        assert used == [layer.config.feedback] * 2


def test_nothing_is_timed_where_a_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.csv"
    for found in (1.5, math.nan):
        monkeypatch.setattr(gpu_checks, "CHECKS", {"decode": lambda *_, found=found: found})
        assert bench_gpu.main(["--smoke", "--no-tests", "-o", str(path)]) == 1
        rows = rows_of(path)
        assert {row["part"] for row in rows} == {"facts", "checks"}
        assert any(row["note"].endswith("failed") for row in rows)
    options = ["--despite-failures", "--only", "ceilings", "-o", str(path)]
    assert bench_gpu.main(["--smoke", "--no-tests", *options]) == 1
    timed = [row for row in rows_of(path) if row["part"] == "ceilings"]
    assert timed
    assert all("INVALID" in row["note"] for row in timed)


def test_a_check_that_raises_or_finds_no_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_there(*_: object) -> float:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def broken(*_: object) -> float:
        raise RuntimeError("an illegal memory access")

    bench = make_bench(tmp_path)
    monkeypatch.setattr(gpu_checks, "CHECKS", {"decode": broken, "prefill": not_there})
    gpu_checks.run_built_in(bench, Deadline(60))
    assert bench.report.failures == 1
    notes = [str(row["note"]) for row in bench.report.rows]
    assert "failed: RuntimeError: an illegal memory access" in notes
    assert "not there: x" in notes


PRINTED = """\
tests/kernels/test_pack.py::test_a[2-64]
[gw0] [ 20%] PASSED tests/kernels/test_pack.py::test_a[2-64]
[gw1] [ 40%] FAILED tests/kernels/test_decode.py::test_b[x-1]
tests/kernels/test_decode.py::test_c PASSED [ 60%]
tests/kernels/test_decode.py::test_d SKIPPED (no) [ 80%]
=========================== short test summary info ============================
FAILED tests/kernels/test_decode.py::test_b[x-1] - AssertionError: row 0: 3.00 times the bound
""".splitlines()


def test_what_pytest_prints_is_counted(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    gpu_checks.tally(bench, PRINTED, ended=1)
    found = {(row["what"], row["metric"]): row for row in bench.report.rows}
    assert found["pytest tests/kernels/test_pack.py", "passed"]["value"] == 1
    decode = found["pytest tests/kernels/test_decode.py", "passed"]
    assert (decode["value"], decode["note"]) == (1, "1 failed")
    assert "test_b[x-1]: AssertionError: row 0: 3.00" in str(found["pytest", "failed"]["note"])
    assert bench.report.failures == 1


def test_pytest_that_was_cut_or_broke(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    gpu_checks.tally(bench, PRINTED[:2], ended=None)
    assert bench.report.failures == 0
    assert any(row["metric"] == "cut" for row in bench.report.rows)
    gpu_checks.tally(bench, ["ImportError while loading conftest"], ended=4)
    assert bench.report.failures == 1
    assert "ImportError" in str(bench.report.rows[-1]["note"])


@pytest.mark.parametrize("cut", CUTS[::2])
@pytest.mark.parametrize(("G", "tokens"), [(1, (130, 1)), (3, (64, 300))])
def test_bf16_decode_is_attention(cut: object, G: int, tokens: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    B, H, D, T = 2, 2, 16, max(tokens)
    query = torch.randn(B, H * G, D, generator=generator).bfloat16()
    # As a model lays them out: heads side by side.
    keys, values = (
        torch.randn(B, T, H, D, generator=generator).bfloat16().transpose(1, 2) for _ in range(2)
    )
    for row, count in enumerate(tokens):
        keys[row, :, count:] = values[row, :, count:] = math.nan
    found = Bf16Decode(cut)(query, keys, values, torch.tensor(tokens, dtype=torch.int32))
    for row, count in enumerate(tokens):
        one = (x[row : row + 1, :, :count] for x in (keys, values))
        expected = gpu_baselines.dense_reference(query[row : row + 1], *one)
        # In the interpreter everything is multiplied in f32.
        assert (found[row] - expected[0]).abs().max() < 1e-5


def test_baselines_and_their_reference_map_heads_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, 8, generator=generator)
    keys, values = (torch.randn(2, 2, 50, 8, generator=generator) for _ in range(2))
    repeated = (x.repeat_interleave(3, 1) for x in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], *repeated)
    expected = expected[:, :, 0]
    found = dict(gpu_baselines.decode_baselines(batch=2, group=3, device=CPU))
    assert {"sdpa math", "sdpa math, enable_gqa", "flash-attn 2", "flashinfer"} <= set(found)
    for attention in (gpu_baselines.dense_reference, *found.values()):
        if not isinstance(attention, str):
            error = gpu_baselines.relative_error(attention(query, keys, values), expected)
            assert error < 1e-5


def test_a_contestant_that_fails_ends_no_race() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError

    timings = race({"good": [int, int], "bad": [fails]}, device=CPU)
    assert len(timings["good"].samples) == 2
    assert timings["bad"].error == "out of memory"


class StandInGraph:
    """A CUDA graph that captures nothing and replays what its lap would have launched."""

    def replay(self) -> None:
        StandInEvent.now += 6.0


class StandInEvent:
    """Time goes on by what is replayed, in milliseconds."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = StandInEvent.now

    def elapsed_time(self, later: StandInEvent) -> float:
        return later.at - self.at


@pytest.fixture
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What ``race`` asks of CUDA, without it."""

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr("gpu_timing.WARM_SECONDS", 0.0)
    return torch.device("cuda:0")


def test_a_sample_is_a_replay_over_its_calls(stand_in_gpu: torch.device) -> None:
    calls: list[str] = []
    laps = {
        "three": [lambda: calls.append("three")] * 3,
        "one": [lambda: calls.append("one")],
    }
    timings = race(laps, device=stand_in_gpu, rounds=4, replays=5)
    # Compiled once, warmed up and captured; replays launch nothing anew.
    assert (calls.count("three"), calls.count("one")) == (1 + 3 + 3, 1 + 1 + 1)
    assert timings["three"].samples == pytest.approx([0.002] * 20)
    assert timings["one"].samples == pytest.approx([0.006] * 20)
    assert {timing.how for timing in timings.values()} == {"graph"}


def test_no_round_begins_when_the_time_is_over(stand_in_gpu: torch.device) -> None:
    timings = race({"one": [int]}, device=stand_in_gpu, rounds=9, replays=1, expired=lambda: True)
    assert len(timings["one"].samples) == 2


def test_what_cannot_be_captured_runs_eagerly(
    stand_in_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(graph: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing")

    def call() -> None:
        StandInEvent.now += 1.0

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    (timing,) = race({"one": [call, call]}, device=stand_in_gpu, rounds=3, replays=1).values()
    assert (timing.how, timing.error) == ("eager", "")
    assert timing.samples == pytest.approx([0.001] * 3)


def test_quantiles() -> None:
    timing = Timing(samples=[5.0, 1.0, 4.0, 2.0, 3.0])
    assert timing.median == 3.0
    assert (timing.quantile(0.2), timing.quantile(0.8)) == (2.0, 5.0)


def test_without_a_gpu_it_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    monkeypatch.setitem(bench_gpu.NEEDED, "no_such_module", "nowhere")
    assert bench_gpu.main([]) == 2
    assert "no_such_module (nowhere)" in capsys.readouterr().err
