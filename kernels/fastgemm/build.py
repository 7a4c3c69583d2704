"""Compiles csrc/ into one shared library with nvcc, and finds it again.

    python -m fastgemm.build                       # all architectures, into the cache
    python -m fastgemm.build --arch native         # only what this machine's GPUs need
    python -m fastgemm.build --arch sm_90a --output libfastgemm.so
    python -m fastgemm.build --check-spills        # compile everything, fail on register spills

The library needs neither torch headers nor libcuda at build time. It is cached under `$FASTGEMM_CACHE`
(default `$XDG_CACHE_HOME/fastgemm`, `~/.cache/fastgemm`) by a hash of the sources, the flags and the version
of nvcc; a file lock and an atomic rename make concurrent first uses safe. `$FASTGEMM_LIBRARY` names a library
built elsewhere; `$FASTGEMM_NVCC` or `$CUDA_HOME` the compiler.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent / "csrc"
LIBRARY_NAME = "libfastgemm.so"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
# Code for GPUs newer than any architecture above: translated by the driver at load time.
PORTABLE = "compute_80"
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets")

EXIT_FAILED = 1
EXIT_NO_COMPILER = 3


class BuildError(RuntimeError):
    """The library is missing and could not be built."""


class CompilerNotFoundError(BuildError):
    """There is no nvcc on this machine."""


def find_nvcc() -> str:
    """Path of nvcc: `$FASTGEMM_NVCC`, `$CUDA_HOME`, `$CUDA_PATH`, the PATH, /usr/local/cuda.

    Raises:
        CompilerNotFoundError: there is none, or `$FASTGEMM_NVCC` is no program.
    """
    named = os.environ.get("FASTGEMM_NVCC")
    if named:
        if not _is_program(named):
            raise CompilerNotFoundError(f"FASTGEMM_NVCC names {named}, which is not an executable file")
        return named
    candidates = [f"{os.environ[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and _is_program(candidate):
            return candidate
    raise CompilerNotFoundError(
        "no nvcc found to compile the FastGEMM kernels: install the CUDA toolkit (12.4 or newer), set "
        "FASTGEMM_NVCC or CUDA_HOME, or set FASTGEMM_LIBRARY to a library built with python -m fastgemm.build"
    )


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _nvcc_version(nvcc: str) -> str:
    try:
        result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{nvcc} does not run: {error.strerror}") from error
    if result.returncode != 0:
        raise BuildError(f"{nvcc} --version failed: {result.stderr.strip()}")
    return result.stdout


def compiler_id(nvcc: str) -> str:
    """Short hash of what this nvcc says its version is.

    Raises:
        BuildError: it does not run.
    """
    return hashlib.sha256(_nvcc_version(nvcc).encode()).hexdigest()[:8]


def native_architectures() -> tuple[str, ...]:
    """Architectures of the GPUs torch sees on this machine.

    Raises:
        BuildError: there is no GPU, or one older than sm_80.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError(
            "there is no CUDA GPU on this machine that torch can use: python -m fastgemm.build --arch all, or a list, "
            "builds without one"
        )
    found = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            name = torch.cuda.get_device_name(index)
            raise BuildError(f"GPU {index} ({name}, sm_{major}{minor}) is too old: FastGEMM needs sm_80 or newer")
        # Code for sm_86 does not run on sm_87: Tegra takes no binaries of desktop GPUs.
        exact = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}
        found.add(exact.get((major, minor), PORTABLE))
    return tuple(sorted(found))


def check_architectures(architectures: Sequence[str]) -> None:
    """Raise BuildError unless these are names out of `ARCHITECTURES` and `PORTABLE`, at least one."""
    unknown = set(architectures) - {*ARCHITECTURES, PORTABLE}
    if unknown or not architectures:
        raise BuildError(f"unknown architecture {sorted(unknown)}: choose from {[*ARCHITECTURES, PORTABLE]}")


def sources(architectures: Sequence[str]) -> list[Path]:
    """The .cu files of a library for these architectures."""
    hopper = "sm_90a" in architectures
    folders = ["common", "sm80", "ablation", "elementwise", "attention", "sm90" if hopper else "sm90_absent"]
    files = [SOURCE_DIR / "api.cu"]
    for folder in folders:
        files += sorted((SOURCE_DIR / folder).glob("*.cu"))
    return files


def _targets(source: Path, architectures: Sequence[str]) -> list[str]:
    """-gencode options of one source: the Hopper kernels exist for sm_90a alone."""
    if source.parent.name == "sm90":
        architectures = ["sm_90a"]
    options = []
    for name in architectures:
        virtual = "compute_" + name.split("_")[1]
        options.append(f"-gencode=arch={virtual},code={name}")
    return options


def source_hash() -> str:
    """Hash of every file under csrc/ and of the compiler flags."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(p for p in SOURCE_DIR.rglob("*") if p.suffix in {".cu", ".cuh", ".h"}):
        digest.update(str(path.relative_to(SOURCE_DIR)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Folder of the built libraries."""
    if os.environ.get("FASTGEMM_CACHE"):
        return Path(os.environ["FASTGEMM_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastgemm"


def _library_dir_name(architectures: Sequence[str], compiler: str) -> str:
    return f"{source_hash()}-{'+'.join(sorted(architectures))}-{compiler}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, created if missing, against other processes and other threads."""
    # The lock belongs to the open file, so it goes away with the process however that ends.
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run_compiler(command: list[str]) -> str:
    """Run a command; returns what it printed.

    Raises:
        BuildError: it failed; the message ends with what it printed.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"compilation failed: {' '.join(command)}\n{result.stdout}{result.stderr}".rstrip())
    return result.stdout + result.stderr


def _compile_all(
    nvcc: str, architectures: Sequence[str], folder: Path, extra: Sequence[str] = ()
) -> list[tuple[Path, Path, str]]:
    """Compile every source, in parallel; returns (source, object, what the compiler said) of each."""

    def compile_one(source: Path) -> tuple[Path, Path, str]:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        command = [nvcc, *FLAGS, *extra, *_targets(source, architectures), f"-I{SOURCE_DIR}"]
        return source, target, run_compiler([*command, "-c", str(source), "-o", str(target)])

    # Those that take longest first: the last one to finish sets the time. The Hopper instances are short files.
    files = sorted(sources(architectures), key=lambda p: (p.parent.name == "sm90", p.stat().st_size), reverse=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, files))


def copy_to(library: Path, output: Path) -> Path:
    """Copy a library; `output`, which is returned, appears complete or not at all.

    Raises:
        BuildError: it cannot be written.
    """
    partial = output.parent / f".{output.name}.{os.getpid()}"
    try:
        shutil.copy2(library, partial)
        os.replace(partial, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise BuildError(f"cannot write {output}: {error.strerror}") from error
    return output


def build(architectures: Sequence[str] = ARCHITECTURES, output: Path | None = None) -> Path:
    """Build the library if it is not in the cache; returns its path.

    Args:
        architectures: names out of `ARCHITECTURES` and `PORTABLE`.
        output: also copy the library to this path.

    Raises:
        CompilerNotFoundError: no nvcc.
        BuildError: it does not compile, or the cache or `output` cannot be written.
    """
    check_architectures(architectures)
    nvcc = find_nvcc()
    folder = cache_dir() / _library_dir_name(architectures, compiler_id(nvcc))
    library = folder / LIBRARY_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            with locked(folder / "lock"):
                if not library.exists():
                    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                        objects = [str(o) for _, o, _ in _compile_all(nvcc, architectures, Path(scratch))]
                        linked = Path(scratch) / LIBRARY_NAME
                        run_compiler([nvcc, "-shared", "-Wno-deprecated-gpu-targets", *objects, "-o", str(linked)])
                        os.replace(linked, library)
    except OSError as error:
        raise BuildError(
            f"cannot write the FastGEMM library: {error} (set FASTGEMM_CACHE to a writable folder)"
        ) from error
    return library if output is None else copy_to(library, output)


def find_or_build() -> Path:
    """The library for this machine: `$FASTGEMM_LIBRARY`, else the cached one, else a new one for its GPUs.

    Raises:
        BuildError: none of these is possible; the message says what to do.
    """
    named = os.environ.get("FASTGEMM_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise BuildError(f"FASTGEMM_LIBRARY names {named}, which is not a file")
        return Path(named)
    native = native_architectures()
    try:
        return build(native)
    except CompilerNotFoundError:
        for architectures in (native, ARCHITECTURES):
            if set(native) <= set(architectures):
                for library in sorted(cache_dir().glob(_library_dir_name(architectures, "*") + "/" + LIBRARY_NAME)):
                    return library
        raise


def _parse_architectures(text: str) -> tuple[str, ...]:
    if text == "all":
        return ARCHITECTURES
    if text == "native":
        return native_architectures()
    return tuple(name.strip() for name in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 failed, 3 no nvcc)."""
    parser = argparse.ArgumentParser(prog="python -m fastgemm.build", description="Compile the FastGEMM kernels.")
    parser.add_argument(
        "--arch",
        default="all",
        help=f"all, native, or a comma-separated list of {', '.join(ARCHITECTURES)}, {PORTABLE}",
    )
    parser.add_argument("--output", type=Path, help="also copy the library here")
    parser.add_argument(
        "--check-spills",
        action="store_true",
        help="compile, print every kernel's registers, fail on register spills",
    )
    options = parser.parse_args(arguments)
    if options.check_spills and options.output is not None:
        parser.error("--check-spills makes no library: leave out --output")
    try:
        architectures = _parse_architectures(options.arch)
        if options.check_spills:
            from .spills import check_spills

            return EXIT_FAILED if check_spills(architectures) else 0
        print(build(architectures, options.output))
    except CompilerNotFoundError as error:
        print(f"fastgemm.build: {error}", file=sys.stderr)
        return EXIT_NO_COMPILER
    except BuildError as error:
        print(f"fastgemm.build: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
