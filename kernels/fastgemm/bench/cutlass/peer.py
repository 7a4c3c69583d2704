"""Calls the CUTLASS peer through ctypes, and finds its fastest plan for a size before that is timed."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass, replace

import torch

from ...build import BuildError
from ...library import FastGemmError
from ..problem import Activations
from ..timing import GraphTimer, run_interleaved
from .build import find_or_build
from .configurations import CONFIGURATIONS, ONE_WARPGROUP, Configuration, vllm_choice

_SIZES = [c_int64] * 3
_SIGNATURES = {
    "version": ([], c_int),
    "stages": ([], c_int),
    "shared_bytes": ([], c_int),
    "workspace_bytes": ([*_SIZES, c_int, c_int, c_int], c_int64),  # m, n, k; raster, swizzle, multiprocessors
    "gemm": ([c_void_p] * 5 + _SIZES + [c_int] * 4 + [c_void_p, c_int64, c_void_p], c_int),
}  # gemm: x, x_scale, w, w_scale, out; m, n, k; raster, swizzle, multiprocessors, dependent; workspace, bytes; stream
_RASTERS = ("automatic", "along M", "along N")
# cutlass::Status
_STATUS = (
    "success",
    "misaligned operand",
    "invalid data type",
    "invalid layout",
    "invalid problem",
    "not supported",
    "workspace missing or too small",
    "internal error",
    "architecture mismatch",
    "insufficient driver",
    "memory allocation failed",
    "problem not supported by this kernel",
)

TUNING_ROUNDS = 3
TUNED_CONFIGURATIONS = 2
TUNED_SWIZZLES = (1, 2, 4, 8)


class CutlassError(RuntimeError):
    """CUTLASS refused a problem, or a launch failed."""


@dataclass(frozen=True)
class Plan:
    """A configuration and the settings that CUTLASS takes at run time.

    Attributes:
        raster: index into "automatic", "along M", "along N": the order of the output's tiles.
        swizzle: width of the blocks of tiles that the order is applied to.
        dependent: programmatic dependent launch.
    """

    configuration: Configuration
    raster: int = 0
    swizzle: int = 1
    dependent: bool = False

    def __str__(self) -> str:
        text = self.configuration.name
        if self.raster or self.swizzle > 1:
            text += f", {_RASTERS[self.raster]}, swizzle {self.swizzle}"
        return text + (", dependent launch" if self.dependent else "")


class Library:
    """A loaded peer library.

    Raises:
        FastGemmError: it cannot be loaded, or lacks a configuration.
    """

    def __init__(self, path: str):
        try:
            dll = ctypes.CDLL(path)
        except OSError as error:
            raise FastGemmError(f"cannot load the CUTLASS library {path}: {error}") from error
        self.path = path
        self._functions: dict[tuple[str, str], Callable] = {}
        for configuration in CONFIGURATIONS:
            for name, (arguments, result) in _SIGNATURES.items():
                try:
                    function = getattr(dll, f"cw_{name}_{configuration.name}")
                except AttributeError as error:
                    reason = f"{path} was not built from this version of fastgemm.bench.cutlass: {error}"
                    raise FastGemmError(reason) from error
                function.argtypes, function.restype = arguments, result
                self._functions[name, configuration.name] = function

    def call(self, name: str, configuration: Configuration, *arguments: int) -> int:
        """The C function `name` of a configuration."""
        return self._functions[name, configuration.name](*arguments)

    @property
    def version(self) -> str:
        """Version of CUTLASS that the library was built from, "4.7.0"."""
        number = self.call("version", CONFIGURATIONS[0])
        return f"{number // 100}.{number // 10 % 10}.{number % 10}"

    def workspace_bytes(self, plan: Plan, m: int, n: int, k: int, multiprocessors: int) -> int:
        """Bytes of workspace of one product.

        Raises:
            CutlassError: a size is not positive, or is too large.
        """
        found = self.call("workspace_bytes", plan.configuration, m, n, k, plan.raster, plan.swizzle, multiprocessors)
        if found < 0:
            raise CutlassError(f"CUTLASS cannot multiply m={m}, n={n}, k={k}")
        return found

    def gemm(self, plan: Plan, pointers: tuple[int, ...], sizes: tuple[int, ...], *rest: int) -> None:
        """Launch one product.

        Args:
            plan: what to run.
            pointers: x [m, k] int8, x_scale [m] fp32, w [n, k] int8, w_scale [n] fp32, out [m, n] fp16.
            sizes: m, n, k.
            rest: multiprocessors; workspace, its bytes; stream.

        Raises:
            CutlassError: not supported, or the launch failed.
        """
        multiprocessors, workspace, workspace_bytes, stream = rest
        settings = (plan.raster, plan.swizzle, multiprocessors, int(plan.dependent))
        code = self.call("gemm", plan.configuration, *pointers, *sizes, *settings, workspace, workspace_bytes, stream)
        if code != 0:
            reason = _STATUS[code] if 0 < code < len(_STATUS) else "unknown status"
            m, n, k = sizes
            raise CutlassError(f"CUTLASS {plan} failed at m={m}, n={n}, k={k}: {reason} ({code})")


@functools.cache
def load() -> Library:
    """The peer library, built on first use where `$CUTLASS_DIR` is set.

    Raises:
        FastGemmError: there is none and it cannot be built; the message says what to set.
    """
    try:
        path = find_or_build()
    except BuildError as error:
        raise FastGemmError(str(error)) from error
    return Library(str(path))


def check() -> None:
    """Refuse before anything is measured.

    Raises:
        FastGemmError: no library, or no Hopper GPU.
    """
    load()
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise FastGemmError(f"cutlass-w8a8 needs a GPU of compute capability 9.0, this one has {capability}")


def vllm_plan(m: int, n: int) -> Plan:
    """What vLLM's cutlass_scaled_mm runs: its configuration, CUTLASS's defaults otherwise."""
    return Plan(vllm_choice(m, n))


def multiply(
    w: tuple[torch.Tensor, torch.Tensor], x: Activations, plan: Plan | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """out[m, n] in fp16 = (x.int8 w^T) scaled by row and by column, on the current stream.

    Args:
        w: weight [n, k] int8 and its scale [n] fp32, contiguous on the GPU.
        x: int8 [m, k] and scale [m] fp32.
        plan: None for vLLM's.
        out: [m, n] fp16 to write to, None for a new tensor.

    Raises:
        CutlassError: CUTLASS does not take these sizes (n not a multiple of 8, k of 16), or the launch failed.
    """
    weight, w_scale = w
    (m, k), n = x.int8.shape, weight.shape[0]
    plan = plan or vllm_plan(m, n)
    library = load()
    if out is None:
        out = torch.empty(m, n, dtype=torch.float16, device=weight.device)
    with torch.cuda.device(weight.device):
        multiprocessors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        size = library.workspace_bytes(plan, m, n, k, multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=weight.device) if size else None
        pointers = tuple(t.data_ptr() for t in (x.int8, x.scale, weight, w_scale, out))
        stream = torch.cuda.current_stream().cuda_stream
        address = 0 if workspace is None else workspace.data_ptr()
        library.gemm(plan, pointers, (m, n, k), multiprocessors, address, size, stream)
    return out


def _refined(plan: Plan) -> list[Plan]:
    """The plan with the other orders of its tiles; a schedule without persistent CTAs has no order."""
    if plan.configuration.schedule == ONE_WARPGROUP:
        return []
    return [replace(plan, raster=r, swizzle=s) for r in (1, 2) for s in TUNED_SWIZZLES]


def find_plan(time_plans: Callable[[list[Plan]], dict[Plan, float]], m: int, n: int) -> tuple[Plan, dict[Plan, float]]:
    """The fastest plan and the times of all that were tried.

    First vLLM's plan and every configuration with dependent launch, then the orders of tiles of the fastest two,
    at last the fastest without dependent launch.

    Args:
        time_plans: times in microseconds of the plans that run.

    Raises:
        CutlassError: none runs.
    """
    times = time_plans([vllm_plan(m, n), *(Plan(c, dependent=not c.stream_k) for c in CONFIGURATIONS)])
    if not times:
        raise CutlassError(f"CUTLASS has no configuration for m={m}, n={n}")

    def fastest() -> list[Plan]:
        return sorted(times, key=times.__getitem__)

    best = {plan.configuration: plan for plan in reversed(fastest())}  # of each configuration, the fastest stays
    order = sorted(best, key=lambda c: times[best[c]])
    for configuration in order[:TUNED_CONFIGURATIONS]:
        times.update(time_plans(_refined(best[configuration])))
    plain = replace(fastest()[0], dependent=False)
    if plain not in times:
        times.update(time_plans([plain]))
    return fastest()[0], times


def tune(copies: list, x: Activations) -> tuple[Callable[[object, Activations], torch.Tensor], dict[str, object]]:
    """Find the fastest plan for these activations, with the benchmark's own timing.

    Args:
        copies: weights as `multiply` takes them, used in turn.

    Returns:
        The call to time, and what was found, for the record.

    Raises:
        CutlassError: CUTLASS takes none of these sizes.
    """
    n = copies[0][0].shape[0]
    out = torch.empty(x.int8.shape[0], n, dtype=torch.float16, device=x.int8.device)

    def time_plans(plans: list[Plan]) -> dict[Plan, float]:
        timers = {}
        for plan in plans:
            try:
                multiply(copies[0], x, plan, out)
            except CutlassError:
                continue
            timers[plan] = GraphTimer(lambda i, plan=plan: multiply(copies[i], x, plan, out), len(copies))
        run_interleaved(list(timers.values()), TUNING_ROUNDS)
        return {plan: timer.timing.median_us for plan, timer in timers.items()}

    m = x.int8.shape[0]
    plan, times = find_plan(time_plans, m, n)
    found = {
        "plan": str(plan),
        "vllm_plan": str(vllm_plan(m, n)),
        "tuning_us": {str(p): round(t, 3) for p, t in sorted(times.items(), key=lambda item: item[1])},
        "cutlass": load().version,
    }
    return lambda w, activations: multiply(w, activations, plan), found
