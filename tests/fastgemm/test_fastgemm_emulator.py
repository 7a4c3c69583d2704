"""The Hopper kernels' own sources on the CPU emulator (emulator/emulator.h: what it models and what not)."""

import collections
import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastgemm.build import SOURCE_DIR

EMULATOR = Path(__file__).parent / "emulator"
HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
OBJECTS = (
    "fiber",
    "scheduler",
    "barriers",
    "copies",
    "wgmma",
    "launch",
    "cuda_runtime",
    "product",
    "reference",
)
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi")
# The kernels run little beside the emulator: what counts is how long they take to compile.
KERNEL_FLAGS = ("-O1", "-fno-gcse", "-w", "-include", "cuda_on_host.h")
# The one instruction in sm90/ that is written as text there.
LOP3 = (
    "multiply.cuh",
    'asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(nibbles) : "r"(w), "r"(0x80808080u), "r"(0xF0F0F0F0u));',
    "nibbles = lop3(w, 0x80808080u, 0xF0F0F0F0u, 0x28);",
)


def cuda_include():
    """The folder with the CUDA headers, or None."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    compilers = [os.environ.get("FASTGEMM_NVCC"), shutil.which("nvcc")]
    roots = [Path(root) for root in named if root]
    roots += [Path(nvcc).resolve().parent.parent for nvcc in compilers if nvcc]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for root in roots:
        if all((root / "include" / header).is_file() for header in HEADERS):
            return root / "include"
    return None


def patch(tree, file, old, new):
    """Replace `old`, which is there exactly once, in tree/sm90/file."""
    path = tree / "sm90" / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"sm90/{file} has {text.count(old)} times, not once: {old}")
    path.write_text(text.replace(old, new))


@contextlib.contextmanager
def locked(path):
    """One process at a time makes `path`."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Emulator:
    """Compiles kernel instances with the emulator and runs them."""

    def __init__(self, folder, include):
        self.folder = folder
        self.include = include
        folder.mkdir(exist_ok=True)
        objects = folder / "objects"
        self.objects = [objects / f"{name}.o" for name in OBJECTS]
        with locked(objects):
            if not objects.exists():
                tree = self._tree(folder / "unchanged")
                objects.mkdir()
                for target in self.objects:
                    self._compile(tree, target, "-O3", EMULATOR / f"{target.stem}.cpp")

    def _tree(self, tree, *patches):
        """A copy of the kernels with the stand-ins for common/ptx_*.cuh."""
        (tree / "common").mkdir(parents=True)
        shutil.copytree(SOURCE_DIR / "sm90", tree / "sm90")
        shutil.copy(SOURCE_DIR / "fastgemm.h", tree)
        shutil.copy(SOURCE_DIR / "common" / "gemm_args.h", tree / "common")
        for stand_in in (EMULATOR / "common").iterdir():
            shutil.copy(stand_in, tree / "common")
        for file, old, new in (LOP3, *patches):
            patch(tree, file, old, new)
        return tree

    def _compile(self, tree, target, *arguments):
        includes = [f"-I{tree}", f"-I{EMULATOR}", "-isystem", self.include]
        command = ["g++", *FLAGS, *includes, *arguments, "-c", "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]

    def program(self, kind):
        """The program that runs products of `kind`, all tiles."""
        with locked(self.folder / kind):
            program = self.folder / kind / "emulator"
            return program if program.exists() else self.build(kind, kind)

    def build(self, name, kind, tile=None, *patches):
        """The same from changed sources; with `tile` one instance alone."""
        tree = self._tree(self.folder / name, *patches)
        defines = [f"-DEMULATED_KIND={kind}", *([f"-DEMULATED_TILE={tile}"] if tile else [])]
        self._compile(tree, tree / "driver.o", *KERNEL_FLAGS, *defines, EMULATOR / "driver.cpp")
        program = tree / "emulator"
        subprocess.run(["g++", "-o", program, tree / "driver.o", *self.objects], check=True)
        return program


def run(program, seeds, *tile):
    """(exit status, lines) of the products of `seeds`; with `tile` of one tile."""
    command = [program, str(seeds.start), str(len(seeds)), *tile]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    return result.returncode, result.stdout.splitlines() or [result.stderr]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("the emulator's fibers are written for x86-64 Linux")
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    include = cuda_include()
    if include is None:
        pytest.skip("no CUDA headers on this machine (CUDA_HOME, nvcc's folder, /usr/local/cuda*)")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers compile what they share once
    return Emulator(folder / "emulator", include)


TILES = ["2x8", "2x16", "2x32", "1x64", "2x64", "2x96", "1x128", "2x128", "2x192", "2x256"]
FEW_TOKENS = {"2x8", "2x16", "2x32"}
SHARES = {
    "Int4Config": {"nothing", "tokens"},
    "Int8Config": {"nothing", "tokens", "weights"},
    "GroupedConfig": {"nothing"},
    "ZeroPointConfig": {"nothing", "tokens"},
}
VARIANTS = {"GroupedConfig", "ZeroPointConfig"}
# Seed s takes tile s % 10 and way s / 10 % 6 to divide the work; whatever else is random.
SEEDS = range(180)


def launches_of(lines):
    launches = [line.removeprefix("launch ").split() for line in lines if line.startswith("launch ")]
    return [dict(field.split("=") for field in fields) for fields in launches]


@pytest.mark.parametrize(
    "kind",
    ["Int4Config", "Int8Config", *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(VARIANTS))],
)
def test_products_of_every_tile_split_and_shared_operand(emulator, kind):
    status, lines = run(emulator.program(kind), SEEDS)
    assert (status, lines[-1].split(",")[0]) == (0, f"OK {len(SEEDS)} launches")

    launches = launches_of(lines)
    assert len(launches) == len(SEEDS)
    seen = collections.defaultdict(lambda: collections.defaultdict(set))
    for launch in launches:
        for field, value in launch.items():
            seen[launch["tile"]][field].add(value)
    assert list(seen) == TILES
    for tile, fields in seen.items():
        few = tile in FEW_TOKENS
        assert fields["split"] == ({"1", "2", "3", "4", "8"} if few else {"1", "2", "4", "8"}), tile
        assert fields["share"] == ({"nothing"} if few else SHARES[kind]), tile
        assert fields["ready"] == {"0", "1"}, tile
        assert fields["tiles"] >= {"whole", "shared"}, tile
        assert len(fields["dtype"]) >= 3, tile
    together = {field: {launch[field] for launch in launches} for field in launches[0]}
    assert together["dtype"] == {"f16", "bf16", "f32"} | (set() if kind in VARIANTS else {"i32"})
    assert together["bias"] == ({"0"} if kind in VARIANTS else {"0", "1"})
    assert {launch["tile"] for launch in launches if launch["tiles"] == "mixed"} == set(TILES)
    both_steps = {"2x8", "2x16"} if kind != "Int8Config" else set()
    assert {tile for tile, fields in seen.items() if fields["columns"] == {"128", "256"}} == both_steps


@dataclass(frozen=True)
class Mutation:
    """A mistake that the emulator must find: `old` in sm90/file becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    kind: str = "Int4Config"
    instance: tuple[int, int, int] = (1, 64, 256)  # warpgroups, tokens, columns of a step

    @property
    def tile(self):
        return f"{self.instance[0]}x{self.instance[1]}"


MUTATIONS = [
    Mutation(
        # Of the last piece of the tile before.  These kernels once had this mistake.
        "buffer_still_read",
        "epilogue.cuh",
        "if (kWide || (kOddPieces && c == 0))",
        "if (kWide)",
    ),
    Mutation(
        "no_wait_between_pieces",
        "epilogue.cuh",
        "else ptx::bulk_wait_read<1>();",
        "",
        instance=(1, 128, 256),
    ),
    Mutation(
        "exit_while_stores_read",
        "gemm_kernel.cuh",
        "if (C::kTensorStore && threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();",
        "",
    ),
    Mutation(
        "exchange_area_still_read",
        "gemm_kernel.cuh",
        "        if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();\n",
        "",
    ),
    Mutation(
        "fragments_overwritten",
        "multiply.cuh",
        "ptx::wgmma_wait<1>();\n      if (h == 0",
        "ptx::wgmma_wait<2>();\n      if (h == 0",
    ),
    Mutation(
        "stage_released_early",
        "multiply.cuh",
        "ptx::wgmma_wait<1>();\n    if (step > 0) release_stage<C>(p, s, previous, lane);\n    previous = at.stage;",
        "ptx::wgmma_wait<2>();\n    if (step > 0) release_stage<C>(p, s, previous, lane);\n    previous = at.stage;",
        kind="Int8Config",
    ),
    Mutation(
        "exit_before_the_pair_reports",
        "produce.cuh",
        "if (C::kShares && p.share != kShareNothing) {",
        "if (false) {",
    ),
    Mutation(
        "partial_sums_sent_early",
        "gemm_kernel.cuh",
        "ptx::barrier_wait_cluster(s.receive_free, parity ^ 1);",
        ";",
        instance=(2, 8, 128),
    ),
    Mutation(
        "deadlock",
        "gemm_kernel.cuh",
        ": C::kConsumerWarps);",
        ": C::kConsumerWarps + 1);",
        instance=(2, 8, 128),
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_in_the_kernel_is_found(emulator, mutation):
    instance = ", ".join(map(str, mutation.instance))
    change = (mutation.file, mutation.old, mutation.new)
    status, lines = run(emulator.build(mutation.name, mutation.kind, instance, change), range(300))
    assert (status, lines[-1][:4]) == (1, "FAIL")
    # It is the mistake that fails, not the product.
    seed = int(re.match(r"FAIL seed (\d+),", lines[-1])[1])
    status, lines = run(emulator.program(mutation.kind), range(seed, seed + 1), mutation.tile)
    assert (status, lines[-1].split(",")[0]) == (0, "OK 1 launches")


def test_sources_without_what_is_to_be_changed_are_refused(tmp_path):
    (tmp_path / "sm90").mkdir()
    (tmp_path / "sm90" / "multiply.cuh").write_text("int a; int a;")
    for old in ("int b;", "int a;"):
        with pytest.raises(ValueError, match="multiply.cuh has"):
            patch(tmp_path, "multiply.cuh", old, "")
