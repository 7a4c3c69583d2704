"""Single matrix products, timed by fastgemm.bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from odyssey.errors import OdysseyError, UnsupportedError

if TYPE_CHECKING:
    from odyssey.cell import Cell

GEMM_NAME = "gemm.json"


def time_products(cell: Cell) -> None:
    """Times the products of the gemm group; the result stays beside the record, where tables and figures find it."""
    from fastgemm.bench.__main__ import EXIT_NO_GPU, EXIT_WRONG
    from fastgemm.bench.__main__ import main as bench

    group, path = cell.config.gemm, cell.directory / GEMM_NAME
    arguments = {
        "--shapes": ",".join(group.shapes),
        "--m": ",".join(map(str, group.m)),
        "--against": ",".join(group.against),
        "--rounds": str(group.rounds),
        "--json": str(path),
    }
    code = bench([f"{name}={value}" for name, value in arguments.items()])
    if code == EXIT_NO_GPU:
        raise UnsupportedError("gemm.bench=fastgemm: needs an NVIDIA GPU, and torch can use none on this machine")
    cell.record["gemm"] = {"file": GEMM_NAME, "all_correct": code != EXIT_WRONG}
    if code not in (0, EXIT_WRONG):
        raise OdysseyError(f"gemm: python -m fastgemm.bench ended with code {code}; its last lines say why")
    if code == EXIT_WRONG:
        raise OdysseyError("gemm: a kernel's result was wrong; its rows have no time, the others are kept")
