"""Loads the compiled kernels (C ABI of csrc/fastgemm.h) through ctypes; error codes become exceptions."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p

_GEMM_ARGUMENTS = (
    [c_void_p] * 6 + [c_int64] * 3 + [c_int, c_void_p, c_int64, c_int, c_void_p]
)  # x, x_scale, w, w_scale, bias, out; m, n, k; out_dtype; workspace, its bytes; arch; stream
_ABLATION_TAIL = [c_int64] * 3 + [c_int, c_void_p, c_int64, c_int, c_void_p, c_void_p]
# m, n, k; out_dtype; workspace, its bytes; arch; plan; stream
_SIGNATURES = {
    "fg_w4a8_gemm": _GEMM_ARGUMENTS,
    "fg_w8a8_gemm": _GEMM_ARGUMENTS,
    "fg_quantize_per_token": [c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    "fg_rms_norm_quant": [c_void_p] * 3 + [c_float, c_int] + [c_void_p] * 3 + [c_int64] * 2 + [c_void_p],
    "fg_silu_mul_quant": [c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    "fg_rms_norm": [c_void_p] * 3 + [c_float, c_int] + [c_void_p] * 2 + [c_int64] * 2 + [c_void_p],
    "fg_silu_mul": [c_void_p, c_int, c_void_p, c_int64, c_int64, c_void_p],
    "fg_rope_append": [c_void_p] * 7 + [c_int] + [c_int64] * 6 + [c_void_p],
    "fg_decode_attention": (
        [c_void_p] * 5 + [c_float, c_int] + [c_void_p] * 2 + [c_int64] * 6 + [c_int] * 2 + [c_void_p, c_int64, c_void_p]
    ),  # qkv, cos_sin, lengths, k_cache, v_cache; softmax_scale; dtype; out, scale; sizes; splits, cache_ready;
    # workspace, its bytes; stream
    "fg_ablation_grouped_gemm": [c_void_p] * 5 + _ABLATION_TAIL,
    "fg_ablation_asymmetric_gemm": [c_void_p] * 7 + _ABLATION_TAIL,
    "fg_ablation_plan": [c_int, c_int64, c_int64, c_int64, c_int, c_void_p],
    "fg_ablation_unpack": [c_void_p, c_void_p, c_int64, c_int64, c_void_p],
}
_WORKSPACE_SIGNATURES = {
    "fg_gemm_workspace_bytes": [c_int, c_int64, c_int64, c_int64, c_int],
    "fg_ablation_workspace_bytes": [c_int, c_int64, c_int64, c_int64, c_int],
    "fg_decode_attention_workspace_bytes": [c_int64] * 6 + [c_int],
}


class FastGemmError(RuntimeError):
    """The kernels could not be loaded, or a launch was refused."""


class Library:
    """The functions of one loaded shared library; each raises FastGemmError where the C function returns an
    error."""

    def __init__(self, path: str):
        try:
            self._dll = ctypes.CDLL(path)
        except OSError as error:
            raise FastGemmError(f"cannot load the FastGEMM library {path}: {error}") from error
        self.path = path
        self._functions: dict[str, Callable] = {}
        self._error_string = self._find("fg_error_string", [c_int], c_char_p)

    def _find(self, name: str, argument_types: list, result_type: type) -> Callable:
        if name not in self._functions:
            try:
                function = getattr(self._dll, name)
            except AttributeError as error:
                raise FastGemmError(f"{self.path} is no FastGEMM library of this version: {error}") from error
            function.argtypes, function.restype = argument_types, result_type
            self._functions[name] = function
        return self._functions[name]

    def _call(self, name: str, *arguments) -> None:
        code = self._find(name, _SIGNATURES[name], c_int)(*arguments)
        if code != 0:
            raise FastGemmError(f"{name} failed with code {code}: {self._error_string(code).decode()}")

    def _workspace_bytes(self, name: str, *sizes: int) -> int:
        return self._find(name, _WORKSPACE_SIGNATURES[name], c_int64)(*sizes)

    def w4a8_gemm(self, *arguments) -> None:
        """fg_w4a8_gemm."""
        self._call("fg_w4a8_gemm", *arguments)

    def w8a8_gemm(self, *arguments) -> None:
        """fg_w8a8_gemm."""
        self._call("fg_w8a8_gemm", *arguments)

    def gemm_workspace_bytes(self, kind: int, m: int, n: int, k: int, arch: int) -> int:
        """fg_gemm_workspace_bytes; kind 0 is W4A8, 1 is W8A8."""
        return self._workspace_bytes("fg_gemm_workspace_bytes", kind, m, n, k, arch)

    def quantize_per_token(self, *arguments) -> None:
        """fg_quantize_per_token."""
        self._call("fg_quantize_per_token", *arguments)

    def rms_norm_quant(self, *arguments) -> None:
        """fg_rms_norm_quant."""
        self._call("fg_rms_norm_quant", *arguments)

    def silu_mul_quant(self, *arguments) -> None:
        """fg_silu_mul_quant."""
        self._call("fg_silu_mul_quant", *arguments)

    def rms_norm(self, *arguments) -> None:
        """fg_rms_norm."""
        self._call("fg_rms_norm", *arguments)

    def silu_mul(self, *arguments) -> None:
        """fg_silu_mul."""
        self._call("fg_silu_mul", *arguments)

    def rope_append(self, *arguments) -> None:
        """fg_rope_append."""
        self._call("fg_rope_append", *arguments)

    def decode_attention(self, *arguments) -> None:
        """fg_decode_attention."""
        self._call("fg_decode_attention", *arguments)

    def decode_attention_workspace_bytes(self, *sizes: int) -> int:
        """fg_decode_attention_workspace_bytes of batch, num_heads, kv_heads, head_dim, max_len, window, splits."""
        return self._workspace_bytes("fg_decode_attention_workspace_bytes", *sizes)

    def ablation_grouped_gemm(self, *arguments) -> None:
        """fg_ablation_grouped_gemm."""
        self._call("fg_ablation_grouped_gemm", *arguments)

    def ablation_asymmetric_gemm(self, *arguments) -> None:
        """fg_ablation_asymmetric_gemm."""
        self._call("fg_ablation_asymmetric_gemm", *arguments)

    def ablation_unpack(self, *arguments) -> None:
        """fg_ablation_unpack."""
        self._call("fg_ablation_unpack", *arguments)

    def ablation_workspace_bytes(self, kind: int, m: int, n: int, k: int, arch: int) -> int:
        """fg_ablation_workspace_bytes; kind 0 is grouped, 1 is asymmetric."""
        return self._workspace_bytes("fg_ablation_workspace_bytes", kind, m, n, k, arch)

    def ablation_plan(self, *arguments) -> None:
        """fg_ablation_plan."""
        self._call("fg_ablation_plan", *arguments)


@functools.cache
def load() -> Library:
    """The library for this machine's GPUs, built on first use where no built one is found.

    Raises:
        FastGemmError: there is no library and it cannot be built, or it cannot be loaded.
    """
    from .build import BuildError, find_or_build  # here, so that `python -m fastgemm.build` imports it once

    try:
        path = find_or_build()
    except BuildError as error:
        raise FastGemmError(str(error)) from error
    return Library(str(path))
