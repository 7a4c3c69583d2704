"""Reads the assembler's report of every kernel: registers, shared memory, spills, and lost optimizations."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .build import BuildError, _compile_all, check_architectures, find_nvcc

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'")
_SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
# setmaxnreg ignored; wgmma serialized: correct code at a fraction of its speed.
_LOST = re.compile(r"\(C75(?:07|08|1\d)\)|wgmma\.mma_async instructions are serialized|setmaxnreg ignored")


@dataclass(frozen=True)
class KernelReport:
    """One kernel for one architecture; sizes in bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse_report(text: str) -> tuple[list[KernelReport], list[str]]:
    """Kernels and warnings of lost optimizations in the output of `nvcc -Xptxas -v`."""
    kernels, warnings = [], []
    name = arch = ""
    stack = stores = loads = 0
    for line in text.splitlines():
        if _LOST.search(line):
            warnings.append(line.strip())
        elif match := _ENTRY.search(line):
            name, arch = match["name"], match["arch"]
        elif match := _SPILLS.search(line):
            stack, stores, loads = int(match["stack"]), int(match["stores"]), int(match["loads"])
        elif name and (match := _REGISTERS.search(line)):
            kernels.append(KernelReport(name, arch, int(match["registers"]), stack, stores, loads))
            name = ""
    return kernels, warnings


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = result.stdout.splitlines()
    return lines if result.returncode == 0 and len(lines) == len(names) else names


def check_spills(architectures: Sequence[str]) -> int:
    """Compile everything, print one line per kernel; returns the number of spilling kernels and lost
    optimizations.

    Raises:
        BuildError: unknown architecture, no nvcc, it does not compile, or its report names no kernel.
    """
    check_architectures(architectures)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = _compile_all(find_nvcc(), architectures, Path(scratch), ["-Xptxas=-v"])
    problems = count = 0
    for source, _, text in sorted(compiled):
        kernels, warnings = parse_report(text)
        count += len(kernels)
        for kernel, name in zip(kernels, _demangle([k.name for k in kernels]), strict=True):
            spilled = kernel.spill_stores + kernel.spill_loads
            problems += spilled > 0
            verdict = (
                f"SPILLS {kernel.spill_stores} B stored, {kernel.spill_loads} B loaded" if spilled else "no spills"
            )
            print(f"{kernel.arch:7} {kernel.registers:3} registers  {verdict:10}  {source.name}: {name[:120]}")
        for warning in warnings:
            problems += 1
            print(f"LOST OPTIMIZATION in {source.name}: {warning}")
    if count == 0:
        raise BuildError("the compiler reported no kernel with -Xptxas=-v: nothing was checked")
    print(f"{problems} problem(s)" if problems else "no register spills, no lost optimizations")
    return problems
