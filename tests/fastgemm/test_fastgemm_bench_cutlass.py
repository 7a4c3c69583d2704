"""The CUTLASS peer of the benchmark: refusals, building with a stand-in compiler, choice of plans; results on a GPU."""

import contextlib
import ctypes.util
import json
import os
import stat
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from fastgemm.bench import __main__ as bench
from fastgemm.bench import competitors, report
from fastgemm.bench.cutlass import build, peer
from fastgemm.bench.cutlass.configurations import CONFIGURATIONS, COOPERATIVE, PING_PONG, vllm_choice
from fastgemm.build import BuildError, CompilerNotFoundError
from fastgemm.library import FastGemmError

FAKE_NVCC = """\
#!/bin/sh
case "$*" in *--version*) echo "fake compiler 1.0"; exit 0 ;; esac
echo "$*" >> "$FAKE_NVCC_LOG"
case "$*" in *"$FAKE_NVCC_FAIL"*) echo "error: this does not compile" >&2; exit 1 ;; esac
while [ $# -gt 1 ]; do
    if [ "$1" = "-o" ]; then printf compiled > "$2"; fi
    shift
done
"""


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.delenv("FASTGEMM_CUTLASS_LIBRARY", raising=False)
    monkeypatch.delenv("CUTLASS_DIR", raising=False)
    peer.load.cache_clear()
    yield
    peer.load.cache_clear()


@pytest.fixture
def fake_nvcc(no_library, tmp_path, monkeypatch):
    path = tmp_path / "nvcc"
    path.write_text(FAKE_NVCC)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"
    log.touch()
    version = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define CUTLASS_MAJOR 4\n")
    monkeypatch.setenv("FASTGEMM_NVCC", str(path))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(log))
    monkeypatch.setenv("FAKE_NVCC_FAIL", "nothing fails")
    monkeypatch.setenv("FASTGEMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUTLASS_DIR", str(tmp_path / "cutlass"))
    return log


def test_without_a_library_the_bench_refuses_in_one_line(no_library, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.main(["--shapes", "4096x4096", "--against", "w8a8,cutlass-w8a8"]) == bench.EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "CUTLASS_DIR" in captured.err
    assert "FASTGEMM_CUTLASS_LIBRARY" in captured.err


def test_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(peer, "load", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(FastGemmError, match=r"compute capability 9.0, this one has \(8, 0\)"):
        peer.check()


def test_a_named_library_is_used_or_refused(no_library, tmp_path, monkeypatch):
    path = tmp_path / "mine.so"
    monkeypatch.setenv("FASTGEMM_CUTLASS_LIBRARY", str(path))
    with pytest.raises(FastGemmError, match="FASTGEMM_CUTLASS_LIBRARY names"):
        peer.load()
    path.write_text("no library")
    assert build.find_or_build() == path
    with pytest.raises(FastGemmError, match="cannot load the CUTLASS library"):
        peer.load()
    with pytest.raises(FastGemmError, match="was not built from this version"):
        peer.Library(ctypes.util.find_library("c"))


def test_a_folder_that_is_no_checkout_is_refused(fake_nvcc, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTLASS_DIR", str(tmp_path))
    with pytest.raises(BuildError, match=r"has no include/cutlass/version.h: set CUTLASS_DIR to a checkout"):
        build.build()
    assert build.main([]) == build.EXIT_FAILED
    assert capsys.readouterr().err.count("\n") == 1


def test_every_configuration_is_compiled_once_and_linked(fake_nvcc, tmp_path):
    output = tmp_path / "lib.so"
    assert build.build(output, jobs=2) == output
    assert output.read_text() == "compiled"
    lines = fake_nvcc.read_text().splitlines()
    compiled = [line for line in lines if " -c " in line]
    assert len(compiled) == len(CONFIGURATIONS) == len(lines) - 1
    for line in compiled:
        assert "-gencode=arch=compute_90a,code=sm_90a" in line
        assert f"-I{tmp_path}/cutlass/include" in line
    macros = {tuple(a for a in line.split() if a.startswith("-DCW_")) for line in compiled}
    assert len(macros) == len(CONFIGURATIONS)
    assert "-shared" in lines[-1]
    assert lines[-1].count(".o ") == len(CONFIGURATIONS)

    assert build.find_or_build().read_text() == "compiled"
    assert fake_nvcc.read_text().splitlines() == lines


def test_macros_spell_out_the_configuration():
    streamk = next(c for c in CONFIGURATIONS if c.stream_k)
    assert streamk.name == "128x256x128_2x1_cooperative_streamk"
    assert streamk.macros() == [
        f"-DCW_{text}"
        for text in (
            f"NAME={streamk.name}",
            "M=128",
            "N=256",
            "K=128",
            "CLUSTER_M=2",
            "CLUSTER_N=1",
            "SCHEDULE=2",
            "STREAM_K=1",
            "SWAP=0",
        )
    ]


def test_a_failed_configuration_says_so_and_keeps_the_others(fake_nvcc, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_FAIL", "CW_SWAP=1")
    with pytest.raises(BuildError, match="this does not compile"):
        build.build(jobs=1)
    assert not list(build.cache_dir().rglob(build.LIBRARY_NAME))
    assert len(list(build.cache_dir().rglob("*.o"))) == len(CONFIGURATIONS) - 1
    monkeypatch.setenv("FAKE_NVCC_FAIL", "nothing fails")
    before = len(fake_nvcc.read_text().splitlines())
    assert build.build(jobs=1).is_file()
    assert len(fake_nvcc.read_text().splitlines()) == before + 2


def test_objects_depend_on_the_checkout(fake_nvcc, tmp_path):
    first = build.compile_objects(CONFIGURATIONS[:1])
    (tmp_path / "cutlass" / "include" / "cutlass" / "version.h").write_text("#define CUTLASS_MAJOR 3\n")
    assert build.compile_objects(CONFIGURATIONS[:1]) != first


def test_without_a_compiler_the_error_says_so(fake_nvcc, monkeypatch, capsys):
    def none():
        raise CompilerNotFoundError("no nvcc found")

    monkeypatch.setattr(build, "find_nvcc", none)
    assert build.main(["--jobs", "2"]) == build.EXIT_NO_COMPILER
    assert build.main(["--jobs", "0"]) == build.EXIT_FAILED
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


def test_configurations_fit_the_registers():
    assert len({c.name for c in CONFIGURATIONS}) == len(CONFIGURATIONS)
    for c in CONFIGURATIONS:
        threads = 256 if c.schedule == COOPERATIVE else 128
        assert c.tile[0] * c.tile[1] / threads <= 128, c.name
        assert not c.stream_k or c.schedule == COOPERATIVE


@pytest.mark.parametrize(
    ("m", "n", "tile", "cluster", "ping_pong"),
    [
        (1, 4096, (64, 64, 256), (1, 8), False),
        (32, 8191, (64, 64, 256), (1, 8), False),
        (32, 8192, (64, 128, 256), (1, 4), False),
        (33, 57344, (64, 64, 256), (1, 1), False),
        (64, 4096, (64, 64, 256), (1, 1), False),
        (65, 4096, (64, 128, 128), (2, 1), True),
        (128, 57344, (64, 128, 128), (2, 1), True),
        (129, 4096, (128, 128, 128), (2, 1), True),
        (4096, 57344, (128, 128, 128), (2, 1), True),
    ],
)
def test_vllms_choice(m, n, tile, cluster, ping_pong):
    c = vllm_choice(m, n)
    assert (c.tile, c.cluster, c.schedule == PING_PONG, c.swap, c.stream_k) == (tile, cluster, ping_pong, False, False)
    assert c in CONFIGURATIONS


class FakeTimes:
    """Times of plans by a function; None stands for a plan that CUTLASS refuses."""

    def __init__(self, time):
        self.time, self.tried = time, []

    def __call__(self, plans):
        self.tried += plans
        return {p: self.time(p) for p in plans if self.time(p) is not None}


def test_the_fastest_plan_is_found():
    fast, second = CONFIGURATIONS[5], CONFIGURATIONS[6]

    def time(plan):
        base = {fast: 10.0, second: 12.0}.get(plan.configuration, 20.0)
        bonus = 3.0 if plan.configuration == second and (plan.raster, plan.swizzle) == (2, 4) else 0.0
        return base - bonus + (0.5 if plan.dependent else 0.0)

    times = FakeTimes(time)
    plan, found = peer.find_plan(times, 4096, 4096)
    assert plan == peer.Plan(second, raster=2, swizzle=4, dependent=False)
    assert str(plan) == "256x128x128_2x1_cooperative, along N, swizzle 4"
    assert found[plan] == min(found.values()) == 9.0
    assert len(times.tried) == len(set(times.tried)) == len(found)
    assert peer.vllm_plan(4096, 4096) in found
    assert {p.configuration for p in found} == set(CONFIGURATIONS)


def test_plans_that_are_refused_are_left_out():
    only = CONFIGURATIONS[2]
    plan, found = peer.find_plan(FakeTimes(lambda p: 5.0 if p.configuration == only else None), 16, 4096)
    assert plan.configuration == only
    assert len(found) == 2
    with pytest.raises(peer.CutlassError, match="no configuration for m=16, n=4096"):
        peer.find_plan(FakeTimes(lambda p: None), 16, 4096)


class FakeLibrary:
    """Stands in for the compiled library: remembers what it was asked to launch."""

    version = "4.7.0"

    def __init__(self):
        self.launched = []

    def workspace_bytes(self, plan, m, n, k, multiprocessors):
        assert multiprocessors == 132
        return 64 if plan.configuration.stream_k else 0

    def gemm(self, plan, pointers, sizes, multiprocessors, workspace, workspace_bytes, stream):
        if plan.configuration.swap:
            raise peer.CutlassError("refused")
        assert bool(workspace) == plan.configuration.stream_k == (workspace_bytes == 64)
        self.launched.append((plan, pointers, sizes, stream))


@pytest.fixture
def fake_library(monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(peer, "load", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return library


def small_operands():
    x = SimpleNamespace(int8=torch.zeros(5, 32, dtype=torch.int8), scale=torch.ones(5))
    return x, (torch.zeros(16, 32, dtype=torch.int8), torch.ones(16))


def test_multiply_passes_what_the_c_function_takes(fake_library):
    x, w = small_operands()
    y = peer.multiply(w, x)
    plan = peer.vllm_plan(5, 16)
    pointers = (x.int8.data_ptr(), x.scale.data_ptr(), w[0].data_ptr(), w[1].data_ptr(), y.data_ptr())
    assert fake_library.launched == [(plan, pointers, (5, 16, 32), 7)]
    assert (y.shape, y.dtype) == ((5, 16), torch.float16)


def test_tuning_times_every_plan_and_returns_the_fastest(fake_library, monkeypatch):
    x, w = small_operands()
    copies = [w, tuple(t.clone() for t in w)]
    streamk = next(c for c in CONFIGURATIONS if c.stream_k)

    class Timer:
        def __init__(self, launch, count):
            before = len(fake_library.launched)
            for i in range(count):
                launch(i)
            launched = fake_library.launched[before:]
            assert [p[2] for _, p, _, _ in launched] == [c[0].data_ptr() for c in copies]
            (plan,) = {plan for plan, _, _, _ in launched}
            self.timing = SimpleNamespace(median_us=2.0 if plan.configuration == streamk else 3.0)

    monkeypatch.setattr(peer, "GraphTimer", Timer)
    monkeypatch.setattr(peer, "run_interleaved", lambda timers, rounds: None)
    multiply, found = peer.tune(copies, x)
    assert found["plan"] == streamk.name
    assert found["vllm_plan"] == "64x64x256_1x8_one_warpgroup"
    assert not any("swap" in name for name in found["tuning_us"])
    assert found["cutlass"] == "4.7.0"
    multiply(copies[1], x)
    plan, pointers, _, _ = fake_library.launched[-1]
    assert plan == peer.Plan(streamk)
    assert pointers[2] == copies[1][0].data_ptr()


def test_the_plan_is_printed_behind_the_row():
    row = {"n": 16, "k": 32, "m": 1, "kernel": "cutlass-w8a8", "time_us": 1.0, "spread": 0.0, "gb_per_s": 1.0}
    row |= {"tops": 1.0, "share_of_limit": 1.0, "relative_error": 0.0, "correct": True}
    assert report.format_row({**row, "plan": "the plan"}) == report.format_row(row) + "  the plan"
    assert competitors.KERNELS["cutlass-w8a8"].tune is peer.tune


@pytest.fixture(scope="module")
def library():
    if not (os.environ.get("FASTGEMM_CUTLASS_LIBRARY") or os.environ.get("CUTLASS_DIR")):
        pytest.skip("neither FASTGEMM_CUTLASS_LIBRARY nor CUTLASS_DIR is set")
    peer.load.cache_clear()
    return peer.load()


def test_library_needs_workspace_for_stream_k_alone(library):
    assert int(library.version.split(".")[0]) >= 3
    for c in CONFIGURATIONS:
        sizes = [library.workspace_bytes(peer.Plan(c), m, 4096, 4096, 132) for m in (1, 13, 256, 1000, 4096)]
        assert all(s >= 0 for s in sizes)
        assert any(sizes) == c.stream_k, c.name
        assert 1 < library.call("stages", c) < 16
        assert 100_000 < library.call("shared_bytes", c) <= 227 * 1024


def test_library_refuses_what_cutlass_cannot_do(library):
    for c in CONFIGURATIONS:
        with pytest.raises(peer.CutlassError, match="cannot multiply m=0, n=16, k=32"):
            library.workspace_bytes(peer.Plan(c), 0, 16, 32, 132)
        for sizes in ((16, 16, 24), (16, 12, 32)):  # rows of 24 bytes in, then out
            with pytest.raises(peer.CutlassError, match=r"problem not supported by this kernel \(11\)"):
                library.gemm(peer.Plan(c), (0,) * 5, sizes, 132, 0, 0, 0)
    streamk = next(c for c in CONFIGURATIONS if c.stream_k)
    with pytest.raises(peer.CutlassError, match="workspace missing or too small"):
        library.gemm(peer.Plan(streamk), (0,) * 5, (256, 4096, 4096), 132, 0, 0, 0)


@pytest.fixture
def hopper(library):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def operands(m, n, k):
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    options = {"dtype": torch.int8, "device": "cuda", "generator": generator}
    x, w = torch.randint(-128, 128, (m, k), **options), torch.randint(-128, 128, (n, k), **options)
    x_scale = torch.rand(m, device="cuda", generator=generator) * 0.1
    w_scale = torch.rand(n, device="cuda", generator=generator) * 0.01
    # float64 holds every partial sum below 2^53 exactly.
    sums = (x.double() @ w.double().t()).to(torch.int64)
    exact = sums.double() * x_scale.double()[:, None] * w_scale.double()
    return SimpleNamespace(int8=x, scale=x_scale), (w, w_scale), exact


def assert_rounded(y, exact):
    """Two fp32 products (2^-24 each, and the sum's conversion) and one rounding to fp16 (2^-11, half of 2^-24)."""
    bound = exact.abs() * (2**-11 + 2**-21) + 2**-25
    assert y.dtype == torch.float16
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (272, 544), (8192, 1056)])
@pytest.mark.parametrize("m", [1, 13, 256, 1000])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_products_are_exact_up_to_rounding(hopper, configuration, m, n, k):
    x, w, exact = operands(m, n, k)
    guard = 8
    for plan in (
        peer.Plan(configuration),
        peer.Plan(configuration, raster=1, swizzle=2, dependent=True),
        peer.Plan(configuration, raster=2, swizzle=8),
    ):
        buffer = torch.full((m + 2 * guard, n), torch.inf, dtype=torch.float16, device="cuda")
        y = peer.multiply(w, x, plan, buffer[guard : guard + m])
        assert_rounded(y, exact)
        assert bool(buffer[:guard].isinf().all())
        assert bool(buffer[guard + m :].isinf().all())


@pytest.mark.gpu
def test_a_chain_of_dependent_launches_in_a_graph_is_exact(hopper):
    problems = [operands(m, 1024, 1024) for m in (64, 200, 7)]
    plans = [peer.Plan(c, dependent=True) for c in CONFIGURATIONS]
    for x, w, _ in problems:
        peer.multiply(w, x, plans[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [(peer.multiply(w, x, plan), exact) for plan in plans for x, w, exact in problems]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(a[0].data_ptr() != b[0].data_ptr() for a, b in pairwise(outputs))
    for y, exact in outputs:
        assert_rounded(y, exact)


@pytest.mark.gpu
def test_bench_times_the_plan_it_found(hopper, tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--shapes", "512x1024", "--m", "1,300", "--rounds", "4", "--against", "cutlass-w8a8"]
    assert bench.main([*arguments, "--json", str(path)]) == 0
    rows = [r for r in json.loads(path.read_text())["rows"] if r["kernel"] == "cutlass-w8a8"]
    assert len(rows) == 2
    for row in rows:
        assert row["correct"]
        assert row["plan"] == next(iter(row["tuning_us"]))
        assert row["vllm_plan"] in row["tuning_us"]
        assert len(row["tuning_us"]) > len(CONFIGURATIONS)
