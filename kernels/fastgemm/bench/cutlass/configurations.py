"""The tiles, clusters and schedules of CUTLASS's GEMM that are compiled, and which of them vLLM takes."""

from dataclasses import dataclass

ONE_WARPGROUP, PING_PONG, COOPERATIVE = range(3)
_SCHEDULE_NAMES = ("one_warpgroup", "pingpong", "cooperative")


@dataclass(frozen=True)
class Configuration:
    """One instance of the GEMM.

    Attributes:
        tile: tokens, output features and reduction columns of a CTA's tile (features, tokens, columns if swapped).
        cluster: CTAs of a cluster along the first two of these.
        schedule: ONE_WARPGROUP, PING_PONG or COOPERATIVE.
        stream_k: tiles of the last wave share the reduction (CUTLASS's stream-K scheduler, its own heuristic).
        swap: the weights fill the rows of a tile and the tokens its columns.
    """

    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    schedule: int
    stream_k: bool = False
    swap: bool = False

    @property
    def name(self) -> str:
        """Name in records, and suffix of the C functions: "128x256x128_2x1_cooperative"."""
        parts = ["x".join(map(str, self.tile)), "x".join(map(str, self.cluster)), _SCHEDULE_NAMES[self.schedule]]
        return "_".join(parts + ["streamk"] * self.stream_k + ["swap"] * self.swap)

    def macros(self) -> list[str]:
        """Options of nvcc that make w8a8.cu this configuration."""
        values = {
            "NAME": self.name,
            **dict(zip(("M", "N", "K"), self.tile, strict=True)),
            **dict(zip(("CLUSTER_M", "CLUSTER_N"), self.cluster, strict=True)),
            "SCHEDULE": self.schedule,
            "STREAM_K": int(self.stream_k),
            "SWAP": int(self.swap),
        }
        return [f"-DCW_{key}={value}" for key, value in values.items()]


# The five that vLLM's cutlass_scaled_mm has for int8 on compute capability 9.0 (scaled_mm_sm90_int8_dispatch.cuh).
_VLLM_32_SMALL_N = Configuration((64, 64, 256), (1, 8), ONE_WARPGROUP)
_VLLM_32_LARGE_N = Configuration((64, 128, 256), (1, 4), ONE_WARPGROUP)
_VLLM_64 = Configuration((64, 64, 256), (1, 1), ONE_WARPGROUP)
_VLLM_128 = Configuration((64, 128, 128), (2, 1), PING_PONG)
_VLLM_LARGE = Configuration((128, 128, 128), (2, 1), PING_PONG)

# 128 int32 sums per thread are the most that fit, so 128 x 256 and 256 x 128 take two cooperating warpgroups.
CONFIGURATIONS = (
    _VLLM_32_SMALL_N,
    _VLLM_32_LARGE_N,
    _VLLM_64,
    _VLLM_128,
    _VLLM_LARGE,
    Configuration((128, 256, 128), (2, 1), COOPERATIVE),
    Configuration((256, 128, 128), (2, 1), COOPERATIVE),
    Configuration((256, 128, 128), (1, 2), COOPERATIVE),
    Configuration((128, 256, 128), (2, 1), COOPERATIVE, stream_k=True),
    Configuration((64, 128, 128), (1, 1), PING_PONG),
    Configuration((64, 16, 256), (1, 1), ONE_WARPGROUP, swap=True),
)


def vllm_choice(m: int, n: int) -> Configuration:
    """The configuration that vLLM takes for m tokens and n output features."""
    if m <= 32:
        return _VLLM_32_SMALL_N if n < 8192 else _VLLM_32_LARGE_N
    if m <= 64:
        return _VLLM_64
    return _VLLM_128 if m <= 128 else _VLLM_LARGE
