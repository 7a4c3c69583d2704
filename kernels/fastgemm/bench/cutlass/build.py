"""Compiles the CUTLASS peer from a checkout of CUTLASS, and finds it again.

    git clone https://github.com/NVIDIA/cutlass
    CUTLASS_DIR=$PWD/cutlass python -m fastgemm.bench.cutlass.build                  # into the cache
    CUTLASS_DIR=$PWD/cutlass python -m fastgemm.bench.cutlass.build --output libcutlass_w8a8.so

A configuration takes nvcc about a minute and 4 GB of memory; `--jobs` of them are compiled at a time. Objects and
library are cached under the folder of `fastgemm.build`, by a hash of the source, the options, the version and folder
of CUTLASS and the version of nvcc. `$FASTGEMM_CUTLASS_LIBRARY` names a library built elsewhere.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...build import (
    EXIT_FAILED,
    EXIT_NO_COMPILER,
    BuildError,
    CompilerNotFoundError,
    cache_dir,
    compiler_id,
    copy_to,
    find_nvcc,
    locked,
    run_compiler,
)
from .configurations import CONFIGURATIONS, Configuration

SOURCE = Path(__file__).resolve().with_name("w8a8.cu")
LIBRARY_NAME = "libcutlass_w8a8.so"
TARGET = "-gencode=arch=compute_90a,code=sm_90a"
# GDC: the kernels wait for their predecessor, so that they can be launched as its dependents.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-DNDEBUG",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-diag-suppress=20012",
    TARGET,
)
HOW_TO = (
    "set CUTLASS_DIR to a checkout of https://github.com/NVIDIA/cutlass (nvcc builds from it), or "
    "FASTGEMM_CUTLASS_LIBRARY to a library built with python -m fastgemm.bench.cutlass.build"
)


def include_dir() -> Path:
    """The headers of the checkout `$CUTLASS_DIR` names.

    Raises:
        BuildError: the variable is not set, or names no checkout.
    """
    named = os.environ.get("CUTLASS_DIR")
    if not named:
        raise BuildError(f"cutlass-w8a8 needs CUTLASS, which is no part of this project: {HOW_TO}")
    include = Path(named).expanduser().resolve() / "include"
    if not (include / "cutlass" / "version.h").is_file():
        raise BuildError(f"CUTLASS_DIR names {named}, which has no include/cutlass/version.h: {HOW_TO}")
    return include


def command(nvcc: str, include: Path, configuration: Configuration, target: Path) -> list[str]:
    """The call of nvcc that makes one configuration's object file."""
    return [nvcc, *FLAGS, f"-I{include}", *configuration.macros(), "-c", str(SOURCE), "-o", str(target)]


def _folder(nvcc: str, include: Path) -> Path:
    digest = hashlib.sha256(repr((FLAGS, str(include), compiler_id(nvcc))).encode())
    for path in (SOURCE, include / "cutlass" / "version.h"):
        digest.update(path.read_bytes() + b"\0")
    return cache_dir() / f"cutlass-{digest.hexdigest()[:16]}"


def compile_objects(configurations: Sequence[Configuration] = CONFIGURATIONS, jobs: int = 1) -> list[Path]:
    """Compile the configurations that are not in the cache yet; returns their object files in the same order.

    Raises:
        CompilerNotFoundError: no nvcc.
        BuildError: no CUTLASS, it does not compile, or the cache cannot be written.
    """
    include, nvcc = include_dir(), find_nvcc()
    folder = _folder(nvcc, include)

    def compile_one(configuration: Configuration) -> Path:
        found = folder / f"{configuration.name}.o"
        with locked(folder / f"{configuration.name}.lock"):
            if not found.exists():
                with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                    target = Path(scratch) / found.name
                    run_compiler(command(nvcc, include, configuration, target))
                    os.replace(target, found)
        return found

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return list(pool.map(compile_one, configurations))
    except OSError as error:
        raise BuildError(f"cannot write the CUTLASS peer: {error} (set FASTGEMM_CACHE to a writable folder)") from error


def build(output: Path | None = None, jobs: int | None = None) -> Path:
    """Build the library if it is not in the cache; returns its path.

    Args:
        output: also copy the library to this path.
        jobs: compilers at a time, None for one per processor, at most four.

    Raises:
        BuildError: as `compile_objects`.
    """
    objects = compile_objects(jobs=jobs or min(4, os.cpu_count() or 1))
    nvcc, folder = find_nvcc(), objects[0].parent
    # The set of configurations is part of the name: their objects are shared between sets.
    names = hashlib.sha256(repr([o.name for o in objects]).encode()).hexdigest()[:8]
    library = folder / names / LIBRARY_NAME
    try:
        library.parent.mkdir(exist_ok=True)
        with locked(library.parent / "lock"):
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
                    linked = Path(scratch) / LIBRARY_NAME
                    options = ["-shared", "-Wno-deprecated-gpu-targets", "-Xlinker=-s", TARGET]
                    run_compiler([nvcc, *options, *map(str, objects), "-o", str(linked)])
                    os.replace(linked, library)
        return copy_to(library, output) if output is not None else library
    except OSError as error:
        raise BuildError(f"cannot write the CUTLASS peer: {error} (set FASTGEMM_CACHE to a writable folder)") from error


def find_or_build() -> Path:
    """`$FASTGEMM_CUTLASS_LIBRARY`, else the cached library, else a new one from `$CUTLASS_DIR`.

    Raises:
        BuildError: none of these is possible; the message says what to set.
    """
    named = os.environ.get("FASTGEMM_CUTLASS_LIBRARY")
    if not named:
        return build()
    if not Path(named).is_file():
        raise BuildError(f"FASTGEMM_CUTLASS_LIBRARY names {named}, which is not a file")
    return Path(named)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 failed, 3 no nvcc)."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgemm.bench.cutlass.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="also copy the library here")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    options = parser.parse_args(arguments)
    try:
        if options.jobs is not None and options.jobs < 1:
            raise BuildError(f"--jobs must be at least 1, got {options.jobs}")
        print(build(options.output, options.jobs))
    except CompilerNotFoundError as error:
        print(f"fastgemm.bench.cutlass.build: {error}", file=sys.stderr)
        return EXIT_NO_COMPILER
    except BuildError as error:
        print(f"fastgemm.bench.cutlass.build: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
