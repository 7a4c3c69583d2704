"""The benchmark's arithmetic, report and figure without a GPU; one small run with one."""

import json
import subprocess
from itertools import pairwise, permutations

import pytest
import torch

from fastgemm.bench import __main__ as bench
from fastgemm.bench import competitors, device, plot, report, timing


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--shapes", "4096x4096"]) == bench.EXIT_NO_GPU
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in captured.err


def test_weights_are_rotated_past_the_cache():
    l2 = 50 * 2**20
    for weight in (2**20, 8 * 2**20, 2**30):
        copies = timing.weight_copies(weight, l2)
        assert (copies - 1) * weight >= 2 * l2
        assert (copies - 2) * weight < 2 * l2


def test_the_spread_needs_four_samples():
    assert timing.Timing(1, 1, [1.0, 2.0, 3.0]).spread == 0
    assert timing.Timing(1, 1, [1.0, 2.0, 3.0, 4.0]).spread == pytest.approx(2.5 / 2.5)


def test_median_and_spread():
    t = timing.Timing(launches=1, copies=1, samples_us=[10.0, 12.0, 11.0, 30.0, 10.5])
    assert t.median_us == 11.0
    low, high = 10.25, 21.0
    assert t.spread == pytest.approx((high - low) / 11.0)


class Recorder:
    """A timer that only says that it had its turn."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def sample(self):
        self.turns.append(self.name)


def orders(names, rounds):
    turns, between = [], []
    timing.run_interleaved([Recorder(name, turns) for name in names], rounds, lambda: between.append(len(turns)))
    assert between == [len(names) * (number + 1) for number in range(rounds)]
    return [tuple(turns[start : start + len(names)]) for start in range(0, len(turns), len(names))]


def test_every_round_has_each_kernel_once_and_an_order_of_its_own():
    names = "abcde"
    found = orders(names, 200)
    assert all(sorted(order) == list(names) for order in found)
    assert found == orders(names, 200)
    # Each of the 20 pairs of neighbours is expected 200 * 4 / 20 = 40 times.
    followers = [pair for order in found for pair in pairwise(order)]
    assert all(20 < followers.count(pair) < 60 for pair in permutations(names, 2))


def test_limits_are_bytes_or_operations():
    kernel = competitors.KERNELS["fastgemm"]
    n, k = 4096, 4096
    decode = report.limit_us(kernel, n, k, 1, 3e12, "NVIDIA H100 80GB HBM3")
    assert decode == pytest.approx((n * k / 2 + n * 4 + k + n * 2) / 3e12 * 1e6)
    prefill = report.limit_us(kernel, n, k, 4096, 3e12, "NVIDIA H100 80GB HBM3")
    assert prefill == pytest.approx(2 * 4096 * n * k / 1979e12 * 1e6)
    assert report.limit_us(kernel, n, k, 4096, 3e12, "Unknown") < prefill
    assert device.stated_tops("NVIDIA H100 80GB HBM3", "fp16") == 989
    assert device.stated_tops("NVIDIA A100-SXM4-80GB", "int8") == 624
    assert device.stated_tops("NVIDIA L40S", "int8") == 733


@pytest.mark.parametrize(
    ("name", "int8"),
    [
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H100 PCIe", 1513),
        ("NVIDIA H200", 1979),
        ("NVIDIA H200 NVL", 1671),
        ("NVIDIA A100-SXM4-80GB", 624),
        ("NVIDIA A10G", 140),
        ("NVIDIA A10", 250),
        ("NVIDIA L4", 242),
        ("NVIDIA RTX A6000", 310),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA L400", None),
    ],
)
def test_a_stated_rate_is_of_that_gpu(name, int8):
    assert device.stated_tops(name, "int8") == int8


def test_the_commit_says_whether_the_package_differs(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "kernels" / "fastgemm"
    for name in ("bench/device.py", "csrc/api.cu"):
        (package / name).parent.mkdir(parents=True)
        (package / name).touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(device, "__file__", str(package / "bench/device.py"))
    clean = device.git_commit()
    assert len(clean) == 40
    (tmp_path / "other").touch()
    assert device.git_commit() == clean
    (package / "csrc/api.cu").write_text("// changed")
    assert device.git_commit() == clean + "-dirty"
    monkeypatch.setenv("GIT_COMMIT", "named")
    assert device.git_commit() == "named"


def test_a_row_follows_from_its_times_and_sizes():
    n, k, m = 4096, 8192, 64
    t = timing.Timing(launches=20, copies=4, samples_us=[10.0, 12.0, 11.0, 30.0, 10.5])
    weights = {"fastgemm": 4, "w8a8": 8, "cublas-fp16": 16, "grouped": 4.25, "w4a16-humming": 4.125}
    for name, bits in weights.items():
        kernel = competitors.KERNELS[name]
        moved = n * k * bits / 8 + n * 4 + m * k * (2 if "16" in name else 1) + m * n * 2
        row = report.make_row(kernel, n, k, m, t, kernel.tolerance, 3e12, "NVIDIA H100")
        assert (row["time_us"], row["min_us"], row["launches_per_sample"], row["weight_copies"]) == (11, 10, 20, 4)
        assert row["gb_per_s"] == pytest.approx(moved / 11e-6 / 1e9)
        assert row["tops"] == pytest.approx(2 * m * n * k / 11e-6 / 1e12)
        assert row["limit_us"] == pytest.approx(moved / 3e12 * 1e6)
        assert row["share_of_limit"] == pytest.approx(row["limit_us"] / 11)
        assert row["correct"] is True
        assert report.make_row(kernel, n, k, m, t, kernel.tolerance * 1.01, 3e12, "")["correct"] is False


def rows():
    found = []
    for m in (1, 64):
        for name, time in (("fastgemm", 5.0), ("cublas-fp16", 15.0 + m)):
            t = timing.Timing(launches=20, copies=4, samples_us=[time, time + 0.5, time + 0.25, time + 0.1])
            kernel = competitors.KERNELS[name]
            found.append(report.make_row(kernel, 4096, 4096, m, t, 2e-4, 3e12, "NVIDIA H100"))
    found.append({"n": 4096, "k": 4096, "m": 1, "kernel": "humming", "unavailable": "not available: not installed"})
    report.add_speedups(found)
    return found


def test_rows_carry_the_speedup_over_fp16_of_the_same_size():
    found = rows()
    for row in found:
        if row["kernel"] == "fastgemm":
            base = next(r for r in found if r["kernel"] == "cublas-fp16" and r["m"] == row["m"])
            assert row["speedup_over_fp16"] == pytest.approx(base["time_us"] / row["time_us"])
    assert found[-1]["speedup_over_fp16"] is None
    assert "not installed" in report.format_row(found[-1])
    assert len(report.format_row(found[0])) == len(report.header())


def test_a_wrong_result_is_marked():
    t = timing.Timing(launches=1, copies=1, samples_us=[1.0])
    for error in (0.1, float("nan")):
        row = report.make_row(competitors.KERNELS["fastgemm"], 16, 32, 1, t, error, 1e12, "")
        assert row["correct"] is False
        assert report.format_row(row).endswith("WRONG")


def test_json_and_figure(tmp_path):
    path, figure = tmp_path / "out" / "result.json", tmp_path / "figure.png"
    report.write_json(path, {"gpu": "NVIDIA H100", "git_commit": "abc"}, {"rounds": 4}, rows())
    document = json.loads(path.read_text())
    for row in document["rows"][:4]:
        assert {"n", "k", "m", "kernel", "time_us", "speedup_over_fp16", "samples_us"} <= row.keys()
    assert plot.main([str(path), str(figure)]) == 0
    assert figure.stat().st_size > 10_000


def test_unreadable_results_are_refused(tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text('{"rows": [], "environment": {}}')
    assert plot.main([str(empty), str(tmp_path / "f.png")]) == 1
    assert "no timed rows" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": 3}', '{"rows": [{"kernel": "a", "time_us": 1}]}', "no JSON"])
def test_other_files_are_not_drawn(tmp_path, capsys, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert plot.main([str(path), str(tmp_path / "f.png")]) == 1
    assert capsys.readouterr().err.startswith("fastgemm.bench.plot: ")


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("place", ["", "file/result.png"])
def test_what_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch, capsys, option, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.main([option, str(tmp_path / place)]) == bench.EXIT_FAILED
    assert f"cannot write {tmp_path / place}: " in capsys.readouterr().err


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="unknown kernel nothing"):
        competitors.select(["fastgemm", "nothing"])
    assert [k.name for k in competitors.select(["fastgemm"])] == ["fastgemm", "cublas-fp16"]


@pytest.mark.parametrize("text", ["", "0", "1,-2", "1,x", "1.5"])
def test_token_counts_are_checked(text):
    with pytest.raises(ValueError, match="--m takes positive numbers"):
        bench._parse_tokens(text)
    assert bench._parse_tokens("1, 16,1") == [1, 16]


@pytest.mark.gpu
def test_small_run(tmp_path):
    path = tmp_path / "result.json"
    against = "w8a8,cublas-fp16,int-mm,w4a16,fastgemm-sm80,grouped,grouped-sm80,asymmetric,asymmetric-sm80,unfused"
    arguments = ["--shapes", "512x1024", "--m", "1,40", "--rounds", "5", "--against", against]
    assert bench.main([*arguments, "--json", str(path), "--plot", str(tmp_path / "f.png")]) == 0
    document = json.loads(path.read_text())
    assert len(document["rows"]) == 22
    assert all(row["correct"] and row["time_us"] > 0 for row in document["rows"])


def test_energy_is_counted_from_step_to_step_of_the_counter(monkeypatch):
    """A counter that advances only every 90 ms still gives the energy of a launch: 300 W for 1 ms."""

    class Gpu:
        now, launches = 0.0, 0

        def sustain(self, seconds):
            count = max(1, round(seconds * 1e3))
            self.now += count * 1e-3
            self.launches += count
            return count

        def energy_joules(self):
            return 300 * 0.09 * (self.now // 0.09)

        def take(self):
            return {}

        def sample(self):
            pass

    gpu = Gpu()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.now)
    gpu.sustain(0.05)
    found = bench._sustained(gpu, gpu)
    assert found["energy_mj"] == pytest.approx(300, rel=0.02)
    assert found["power_w"] == pytest.approx(300, rel=0.02)
    assert found["sustained_us"] == pytest.approx(1000)
