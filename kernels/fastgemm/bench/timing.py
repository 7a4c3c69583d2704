"""Times GPU work: CUDA graphs of many launches, weights rotated past the L2 cache, competitors interleaved."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# Launches of one graph replay last at least this long, so that a replay's own cost (microseconds) disappears.
MIN_REPLAY_US = 1000.0
MAX_LAUNCHES = 500
WARM_UP_REPLAYS = 3
ORDER_SEED = 0


@dataclass
class Timing:
    """Times of one kernel in microseconds per launch, one sample for each interleaved round."""

    launches: int
    copies: int
    samples_us: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples_us)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 with fewer than four samples."""
        if len(self.samples_us) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_us, n=4)
        return (high - low) / self.median_us


def weight_copies(weight_bytes: float, l2_bytes: int) -> int:
    """Copies of a weight that, used in turn, are gone from the L2 cache before they are used again."""
    return 1 + math.ceil(2 * l2_bytes / weight_bytes)


def _elapsed_us(work: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _capture(launch: Callable[[int], object], launches: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    return graph


class GraphTimer:
    """One kernel's launches captured in a graph; `launch(i)` must use weight copy i % copies."""

    def __init__(self, launch: Callable[[int], object], copies: int):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first calls compile, tune and allocate, and must not be captured
            for i in range(copies):
                launch(i)
        torch.cuda.current_stream().wait_stream(stream)
        # Launches outside a graph would be timed at the rate of the host.
        trial = _capture(launch, copies)
        trial.replay()
        estimate = min(_elapsed_us(trial.replay) for _ in range(3)) / copies
        rotations = max(1, min(math.ceil(MIN_REPLAY_US / (estimate * copies)), MAX_LAUNCHES // copies))
        self.timing = Timing(launches=rotations * copies, copies=copies)
        self._graph = _capture(lambda i: launch(i % copies), self.timing.launches)
        for _ in range(WARM_UP_REPLAYS):
            self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> None:
        """Add the time of one replay."""
        self.timing.samples_us.append(_elapsed_us(self._graph.replay) / self.timing.launches)

    def sustain(self, seconds: float) -> int:
        """Replay for about `seconds` without a pause; returns the number of launches."""
        replays = max(1, math.ceil(seconds * 1e6 / (self.timing.median_us * self.timing.launches)))
        for _ in range(replays):
            self._graph.replay()
        torch.cuda.synchronize()
        return replays * self.timing.launches


def run_interleaved(timers: Sequence[GraphTimer], rounds: int, between: Callable[[], None] | None = None) -> None:
    """`rounds` samples of every timer in turn, so that a drift of the clocks meets all of them.

    Each round has an order of its own (random, the same in every run): at the power limit a kernel finds the clock that
    the ones before it left, and in a fixed order always the same ones.  `between` runs after each round, outside the
    timed region.
    """
    shuffle = random.Random(ORDER_SEED).shuffle
    order = list(timers)
    for _ in range(rounds):
        shuffle(order)
        for timer in order:
            timer.sample()
        if between is not None:
            between()


def read_bandwidth(size_bytes: int = 4 * 2**30) -> float:
    """Bytes per second at which a sum reads a buffer much larger than the L2 cache; best of several runs."""
    free, _ = torch.cuda.mem_get_info()
    count = int(min(size_bytes, free // 2)) // 4
    buffer = torch.ones(count, device="cuda")
    total = torch.empty((), device="cuda")
    for _ in range(3):
        torch.sum(buffer, dim=0, out=total)
    best = min(_elapsed_us(lambda: torch.sum(buffer, dim=0, out=total)) for _ in range(10))
    return count * 4 / (best * 1e-6)
