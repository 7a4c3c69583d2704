"""What Slurm says of jobs, without accounting: `scontrol show job`, and the last lines of a job's log."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from odyssey.outcomes import CRASH, INTERRUPTED, OOM, RESUME, TIMEOUT

ENDED = frozenset(
    {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)
_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill|out of memory", re.IGNORECASE)
_TIME = re.compile(r"due to time limit|timed-out too many times", re.IGNORECASE)
# 128 + SIGUSR2, which announces the end, from before submitit had its handler for it.
_TOLD_TOO_EARLY = "140:0"


@dataclass(frozen=True)
class JobState:
    """name: Slurm's word. reason: why it waits or ended, or None. exit_code: "code:signal". node: where it ran."""

    name: str
    reason: str | None = None
    exit_code: str | None = None
    node: str | None = None

    def text(self) -> str:
        where = f" on {self.node}" if self.node and self.name == "RUNNING" else ""
        why = f" ({self.reason})" if self.reason and self.name == "PENDING" else ""
        return f"{self.name.lower()}{where}{why}"


def job_states(job_ids: list[str]) -> dict[str, JobState]:
    """State of every task of the arrays, by "job_task"; those that Slurm has forgotten are left out."""
    states: dict[str, JobState] = {}
    for job_id in job_ids:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, check=False
        )
        for line in shown.stdout.splitlines():
            states.update(_parse(line))
    return states


def _parse(line: str) -> dict[str, JobState]:
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    if "JobState" not in fields:
        return {}
    reason = fields.get("Reason")
    state = JobState(
        fields["JobState"].partition("+")[0],
        None if reason in (None, "None") else reason,
        fields.get("ExitCode"),
        fields.get("NodeList") if fields.get("NodeList") not in ("", "(null)") else None,
    )
    array = fields.get("ArrayJobId")
    if array is None:
        return {fields["JobId"]: state}
    return {f"{array}_{task}": state for task in expand_tasks(fields.get("ArrayTaskId", ""))}


def expand_tasks(text: str) -> list[int]:
    """Array indices as Slurm writes them: "3", "0-2", "0,4-6%2"."""
    tasks: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            tasks += range(int(first), int(last or first) + 1)
    return tasks


def outcome_of(state: JobState | None, job_id: str, log: Path) -> tuple[str, str]:
    """Outcome and reason of a job that left no word of its own."""
    try:
        tail = log.read_text(errors="replace")[-4000:]
    except OSError:
        tail = ""
    name = state.name if state else None
    if name == "OUT_OF_MEMORY" or (state is not None and state.reason == "OutOfMemory") or _MEMORY.search(tail):
        return OOM, f"Slurm killed job {job_id} for more host memory than it asked for; raise memory_gb; {RESUME}"
    told = state is not None and state.exit_code == _TOLD_TOO_EARLY
    if name in ("TIMEOUT", "DEADLINE") or told or _TIME.search(tail):
        return TIMEOUT, f"job {job_id} reached its time limit; {RESUME}, or raise time_min"
    if name in ("CANCELLED", "PREEMPTED"):
        return INTERRUPTED, f"job {job_id} was {name.lower()}; {RESUME}"
    if state is None:
        return CRASH, f"Slurm no longer knows job {job_id}, and it left no record; see {log}; {RESUME}"
    return CRASH, f"job {job_id} ended as {name} (exit code {state.exit_code}) and left no record; see {log}; {RESUME}"
