"""Building and finding the library, with a stand-in compiler: locking, caching, errors."""

import ctypes
import re
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fastgemm import build, library, spills

# Other processes load the module by its path: importing the package would load torch in each of them.
LOAD_BUILD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("build", {str(Path(build.__file__).resolve())!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
"""

FAKE_NVCC = """\
#!/bin/sh
case "$*" in *--version*) echo "fake compiler 1.0"; exit 0 ;; esac
echo "$*" >> "$FAKE_NVCC_LOG"
sleep 0.02
if [ -n "$FAKE_NVCC_FAIL" ]; then echo "error: this does not compile" >&2; exit 1; fi
while [ $# -gt 1 ]; do
    if [ "$1" = "-o" ]; then printf compiled > "$2"; fi
    shift
done
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    path = tmp_path / "nvcc"
    path.write_text(FAKE_NVCC)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("FASTGEMM_NVCC", str(path))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(log))
    monkeypatch.setenv("FASTGEMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTGEMM_LIBRARY", raising=False)
    return log


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTGEMM_NVCC", raising=False)
    monkeypatch.delenv("FASTGEMM_LIBRARY", raising=False)
    monkeypatch.setenv("FASTGEMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.os, "access", lambda *a: False)


def test_every_source_is_compiled_for_its_architectures_and_linked_once(fake_nvcc):
    path = build.build(["sm_80", "sm_90a"])
    lines = fake_nvcc.read_text().splitlines()
    compiled = [line for line in lines if " -c " in line]
    assert len(compiled) == len(build.sources(["sm_80", "sm_90a"]))
    assert len(lines) == len(compiled) + 1
    for line in compiled:
        assert "code=sm_90a" in line
        assert ("code=sm_80" in line) == ("csrc/sm90/" not in line)
    assert path.read_text() == "compiled"
    assert sorted(p.name for p in path.parent.iterdir()) == [build.LIBRARY_NAME, "lock"]


def test_hopper_sources_are_left_out_without_sm_90a():
    folders = {p.parent.name for p in build.sources(["sm_80", "sm_89"])}
    assert "sm90" not in folders
    assert "sm90_absent" in folders


def test_a_second_build_compiles_nothing(fake_nvcc):
    first = build.build(["sm_80"])
    calls = fake_nvcc.read_text()
    assert build.build(["sm_80"]) == first
    assert fake_nvcc.read_text() == calls


def test_the_cache_depends_on_sources_architectures_and_compiler(fake_nvcc, monkeypatch):
    paths = {build.build(["sm_80"]), build.build(["sm_86"])}
    monkeypatch.setattr(build, "_nvcc_version", lambda nvcc: "another version")
    paths.add(build.build(["sm_80"]))
    monkeypatch.setattr(build, "source_hash", lambda: "other")
    paths.add(build.build(["sm_80"]))
    assert len(paths) == 4


def test_output_is_a_copy(fake_nvcc, tmp_path):
    output = tmp_path / "lib.so"
    assert build.build(["sm_80"], output) == output
    assert output.read_text() == "compiled"


@pytest.mark.parametrize("output", ["missing/lib.so", "folder"])
def test_an_output_that_cannot_be_written_is_named_and_leaves_nothing(fake_nvcc, tmp_path, output):
    (tmp_path / "folder").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(build.BuildError, match=f"cannot write .*{output}: ") as refused:
        build.build(["sm_80"], tmp_path / output)
    assert "FASTGEMM_CACHE" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "cache"])


def test_eight_processes_build_once(fake_nvcc):
    code = LOAD_BUILD + "print(build.build(['sm_80']).read_text())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert [p.communicate(timeout=240)[0].strip() for p in processes] == ["compiled"] * 8
    links = [line for line in fake_nvcc.read_text().splitlines() if "-shared" in line]
    assert len(links) == 1


def test_a_killed_builder_leaves_no_lock_and_no_broken_library(fake_nvcc, tmp_path):
    code = LOAD_BUILD + textwrap.dedent(
        """
        def hang(*a, **k):
            print("building", flush=True)
            import time; time.sleep(600)
        build._compile_all = hang
        build.build(["sm_80"])
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "building"
    process.kill()
    process.wait()
    begin = time.monotonic()
    assert build.build(["sm_80"]).read_text() == "compiled"
    assert time.monotonic() - begin < 60


def test_a_failed_compilation_says_so_and_leaves_nothing(fake_nvcc, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_FAIL", "1")
    with pytest.raises(build.BuildError, match="this does not compile"):
        build.build(["sm_80"])
    assert not list(build.cache_dir().rglob(build.LIBRARY_NAME))
    assert build.main(["--arch", "sm_80"]) == build.EXIT_FAILED


@pytest.mark.parametrize("work", [build.build, spills.check_spills])
def test_unknown_architecture_is_refused(fake_nvcc, work):
    with pytest.raises(build.BuildError, match=r"unknown architecture \['hopper', 'sm_75'\]"):
        work(["sm_75", "sm_80", "hopper"])
    with pytest.raises(build.BuildError, match="unknown architecture"):
        work([])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(8, 0)], ("sm_80",)),
        ([(8, 6), (8, 9), (8, 6)], ("sm_86", "sm_89")),
        ([(9, 0)], ("sm_90a",)),
        ([(8, 7)], ("compute_80",)),
        ([(12, 0), (9, 0)], ("compute_80", "sm_90a")),
    ],
)
def test_native_architectures_are_those_of_the_gpus(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert build.native_architectures() == expected


def test_machines_without_a_usable_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(build.BuildError, match="no CUDA GPU on this machine"):
        build.native_architectures()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    with pytest.raises(build.BuildError, match=r"GPU 1 \(T4, sm_75\) is too old"):
        build.native_architectures()


def test_unwritable_cache_is_one_clear_error(fake_nvcc, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGEMM_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="FASTGEMM_CACHE"):
        build.build(["sm_80"])


def test_without_a_compiler_the_error_says_what_to_do(no_nvcc, capsys):
    with pytest.raises(build.CompilerNotFoundError, match="FASTGEMM_LIBRARY"):
        build.build()
    assert build.main(["--check-spills"]) == build.EXIT_NO_COMPILER
    assert capsys.readouterr().err.startswith("fastgemm.build: no nvcc found")


@pytest.mark.parametrize("kind", ["missing", "folder", "not executable"])
def test_a_named_compiler_that_is_none_is_refused(fake_nvcc, monkeypatch, tmp_path, kind, capsys):
    """Whatever else this machine has: the variable says which compiler is meant."""
    named = tmp_path / "named"
    if kind == "folder":
        named.mkdir()
    elif kind == "not executable":
        named.write_text("#!/bin/sh\n")
    monkeypatch.setenv("FASTGEMM_NVCC", str(named))
    assert build.main(["--arch", "sm_80"]) == build.EXIT_NO_COMPILER
    assert capsys.readouterr().err == f"fastgemm.build: FASTGEMM_NVCC names {named}, which is not an executable file\n"


def test_a_compiler_that_does_not_run_is_one_line(fake_nvcc, monkeypatch, tmp_path, capsys):
    named = tmp_path / "named"
    named.write_text("no program")
    named.chmod(0o755)
    monkeypatch.setenv("FASTGEMM_NVCC", str(named))
    assert build.main(["--arch", "sm_80"]) == build.EXIT_FAILED
    assert capsys.readouterr().err == f"fastgemm.build: {named} does not run: Exec format error\n"


def test_without_a_compiler_a_cached_library_is_used(fake_nvcc, monkeypatch):
    monkeypatch.setattr(build, "native_architectures", lambda: ("sm_80",))
    built = build.build(build.ARCHITECTURES)
    monkeypatch.delenv("FASTGEMM_NVCC")
    monkeypatch.setattr(build.os, "access", lambda *a: False)
    assert build.find_or_build() == built


def test_without_a_compiler_only_a_library_for_these_gpus_is_used(fake_nvcc, monkeypatch):
    everything, alone = build.build(build.ARCHITECTURES), build.build(["sm_86"])
    monkeypatch.delenv("FASTGEMM_NVCC")
    monkeypatch.setattr(build.os, "access", lambda *a: False)
    monkeypatch.setattr(build, "native_architectures", lambda: ("sm_86",))
    assert build.find_or_build() == alone
    monkeypatch.setattr(build, "native_architectures", lambda: ("sm_80", "sm_89"))
    assert build.find_or_build() == everything
    monkeypatch.setattr(build, "native_architectures", lambda: (build.PORTABLE,))
    with pytest.raises(build.CompilerNotFoundError):
        build.find_or_build()


def test_the_source_hash_covers_names_contents_and_flags(monkeypatch, tmp_path):
    (tmp_path / "sm80").mkdir()
    (tmp_path / "api.cu").write_text("int a;")
    (tmp_path / "sm80/gemm.cuh").write_text("int b;")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    hashes = [build.source_hash()]
    (tmp_path / "sm80/notes.txt").write_text("no source")
    assert build.source_hash() == hashes[0]
    (tmp_path / "sm80/gemm.cuh").write_text("int c;")
    hashes.append(build.source_hash())
    (tmp_path / "sm80/gemm.cuh").rename(tmp_path / "gemm.cuh")
    hashes.append(build.source_hash())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    hashes.append(build.source_hash())
    assert len(set(hashes)) == 4


def test_named_library_is_used_or_refused(monkeypatch, tmp_path):
    path = tmp_path / "mine.so"
    monkeypatch.setenv("FASTGEMM_LIBRARY", str(path))
    with pytest.raises(build.BuildError, match="FASTGEMM_LIBRARY names"):
        build.find_or_build()
    path.write_text("no library")
    assert build.find_or_build() == path
    with pytest.raises(library.FastGemmError, match="cannot load the FastGEMM library"):
        library.Library(str(path))


def declared_functions():
    """Name -> ctypes of the arguments, as the headers declare them."""
    text = "".join((build.SOURCE_DIR / name).read_text() for name in ("fastgemm.h", "ablation/ablation.h"))
    kinds = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}
    found = {}
    for name, arguments in re.findall(r"FG_API [\w*\s]+?\b(fg_\w+)\(([^)]*)\)", text):
        types = [" ".join(a.split()[:-1]) + "*" * a.count("*") for a in arguments.split(",")]
        found[name] = [ctypes.c_void_p if "*" in t else kinds[t] for t in types]
    return found


def test_signatures_are_those_of_the_headers():
    declared = declared_functions()
    assert declared.pop("fg_error_string") == [ctypes.c_int]
    assert declared == library._SIGNATURES | library._WORKSPACE_SIGNATURES


@pytest.mark.parametrize("name", list(library._SIGNATURES))
def test_error_codes_become_exceptions(monkeypatch, name):
    class Dll:
        code = 0

        def __getattr__(self, function):
            if function == "fg_silu_mul":
                raise AttributeError("undefined symbol: fg_silu_mul")
            if function == "fg_error_string":
                return lambda code: f"reason {code}".encode()
            return lambda *arguments: self.code if function == name else -1

    dll = Dll()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: dll)
    call = getattr(library.Library("lib.so"), name.removeprefix("fg_"))
    if name == "fg_silu_mul":
        with pytest.raises(library.FastGemmError, match=r"lib.so is no FastGEMM library of this version: undefined"):
            call()
        return
    call()
    for dll.code in (1, 1002):
        with pytest.raises(library.FastGemmError, match=f"{name} failed with code {dll.code}: reason {dll.code}"):
            call()


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTGEMM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "fastgemm"
    monkeypatch.setenv("FASTGEMM_CACHE", str(tmp_path / "here"))
    assert build.cache_dir() == tmp_path / "here"


def test_a_report_without_kernels_is_not_taken_for_one_without_spills(fake_nvcc, capsys):
    assert build.main(["--check-spills", "--arch", "sm_80"]) == build.EXIT_FAILED
    captured = capsys.readouterr()
    assert "no kernel" in captured.err
    assert "no register spills" not in captured.out
    with pytest.raises(SystemExit):
        build.main(["--check-spills", "--output", "lib.so"])


@pytest.mark.parametrize(
    ("stores", "loads", "lost", "problems"),
    [(0, 0, "", 0), (4, 0, "", 2), (0, 4, "", 2), (0, 0, "ptxas info : (C7510) Potential Performance Loss", 1)],
)
def test_spills_and_lost_optimizations_are_counted(fake_nvcc, monkeypatch, capsys, stores, loads, lost, problems):
    report = textwrap.dedent(
        f"""
        {lost}
        ptxas info    : Compiling entry function 'first' for 'sm_80'
            8 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
        ptxas info    : Used 40 registers
        ptxas info    : Compiling entry function 'second' for 'sm_90a'
            8 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
        ptxas info    : Used 41 registers
        """
    )
    monkeypatch.setattr(spills, "_compile_all", lambda *a: [(Path("kernel.cu"), Path("kernel.o"), report)])
    assert spills.check_spills(["sm_80"]) == problems
    assert build.main(["--check-spills", "--arch", "sm_80"]) == (build.EXIT_FAILED if problems else 0)
    assert ("no register spills, no lost" in capsys.readouterr().out) == (problems == 0)


def test_assembler_report_is_read():
    text = textwrap.dedent(
        """
        ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register
        ptxas info    : Compiling entry function 'good' for 'sm_80'
        ptxas info    : Function properties for good
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Used 40 registers, used 1 barriers
        ptxas info    : Compiling entry function 'bad' for 'sm_90a'
        ptxas info    : Function properties for bad
            16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
        ptxas info    : Used 255 registers, 16 bytes cumulative stack size
        """
    )
    kernels, warnings = spills.parse_report(text)
    assert kernels == [
        spills.KernelReport("good", "sm_80", 40, 0, 0, 0),
        spills.KernelReport("bad", "sm_90a", 255, 16, 12, 20),
    ]
    assert len(warnings) == 1
