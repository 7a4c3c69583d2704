"""End-to-end latency from results of `python -m odyssey.latency` and from cells with latency=engine: rows, the cells of
tables, and the ratios that the paper gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from experiments import paper
from experiments.comparison import NOT_RUN
from experiments.measured import Measurement, format_label, joined_notes, model_of, short_commit
from experiments.style import engine_rank, method_name, model_name, model_rank
from experiments.table import Column, Table
from odyssey.record import OK

# The lengths of the paper's table 4 and figures 1 and 6.
INPUT_LEN, OUTPUT_LEN = 1024, 128
# The number format of the paper's method, and the name that tables give it.
FORMAT, METHOD = "w4a8", "odyssey"
BASELINE = "fp16"
COMPARED = (BASELINE, "w8a8", FORMAT)
# Our format beside which the paper's ratios stand here: the same bit widths, in our engine.
SAME_FORMAT = {"trtllm-fp16": BASELINE, "trtllm-w8a8": "w8a8"}


@dataclass(frozen=True)
class Timed:
    """One row with where it comes from. run: rows of one run share it, and only their ratios mean anything."""

    row: dict
    device: str
    commit: str | None
    run: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.row["model"], self.row["batch_size"], self.row["method"]

    @property
    def ok(self) -> bool:
        return self.row["outcome"] == OK


def timed_rows(documents: Iterable[dict], records: Iterable[dict] = ()) -> list[Timed]:
    """Every row of the paper's lengths, one for each model, batch size, method and GPU.

    Of several, one that did not fail counts, of the run in which most of COMPARED took turns, since ratios need both of
    their methods in one run; among equals that of the commit that was run last.
    """
    found: list[Timed] = []
    for content, run in _runs(documents, records):
        device, commit = _device(content), short_commit(content["environment"].get("git_commit"))
        rows = [row for row in content["rows"] if (row["input_len"], row["output_len"]) == (INPUT_LEN, OUTPUT_LEN)]
        found += [Timed(row, device, commit, run) for row in rows]
    compared = {(timed.run, *timed.key) for timed in found if timed.ok and timed.key[2] in COMPARED}
    together = Counter(each[:3] for each in compared)
    last = {timed.commit: order for order, timed in enumerate(found)}
    found.sort(key=lambda timed: (timed.ok, together[timed.run, *timed.key[:2]], last[timed.commit]))
    return sorted({(timed.device, *timed.key): timed for timed in found}.values(), key=_rank)


def _device(content: dict) -> str:
    """Where a run was timed, which may be the CPU of a machine that has a GPU, and the dtype of what is not quantized
    where that is not float16."""
    environment = content["environment"]
    gpu = environment.get("gpu")
    name = gpu["name"] if isinstance(gpu, dict) else gpu
    if not name or str(content.get("device", "")).startswith("cpu"):
        name = environment.get("cpu") or "CPU"
    dtypes = {row["dtype"] for row in content["rows"] if row.get("dtype")} - {"float16"}
    return ", ".join([name, *sorted(dtypes)])


def _runs(documents: Iterable[dict], records: Iterable[dict]) -> Iterator[tuple[dict, str]]:
    ordered = [(document.get("started", ""), document, document["path"]) for document in documents]
    for record in records:
        latency = record.get("latency", {})
        rows = latency.get("rows") or _failed_rows(record)
        if rows:
            content = {key: record[key] for key in ("environment", "device") if key in record}
            content = {"environment": {}, **content, "rows": rows}
            ordered.append((record.get("started", ""), content, record["path"]))
    for _, content, path in sorted(ordered, key=lambda each: (each[0], each[2])):
        yield content, path


def _failed_rows(record: dict) -> list[dict]:
    """The rows that a cell of the decode engine would have had, had it not failed before it timed anything."""
    group = record.get("config", {}).get("latency", {})
    if record.get("outcome") in (None, OK) or group.get("engine") != "odyssey":
        return []
    measured = {key: group[key] for key in ("batch_size", "input_len", "output_len")}
    own = format_label(record).lower().replace("w16a16", BASELINE)
    return [
        {
            "model": model_of(record), "method": method, **measured, "outcome": record["outcome"],
            "reason": record.get("reason"), **dict.fromkeys(("prefill_ms", "total_ms", "floor_ms")),
        }
        for method in dict.fromkeys([own, *group["against"]])
    ]  # fmt: skip


def _rank(timed: Timed) -> tuple:
    model, batch_size, method = timed.key
    return *model_rank(model), timed.device, batch_size, engine_rank(method), method


def speedup(timed: Timed, rows: Iterable[Timed], baseline: str) -> float | None:
    """Total time of `baseline` in the same run, model and batch size over that of `timed`."""
    other = _beside(timed, rows, baseline)
    if other is None or not (other.ok and timed.ok):
        return None
    return other.row["total_ms"] / timed.row["total_ms"]


def _beside(timed: Timed, rows: Iterable[Timed], method: str) -> Timed | None:
    wanted = (timed.run, timed.device, *timed.key[:2], method)
    return next((other for other in rows if (other.run, other.device, *other.key) == wanted), None)


def latencies(rows: list[Timed], batch_size: int = 1) -> list[Measurement]:
    """Milliseconds of every method at one batch size, and the ratios of the paper's table 4.

    The paper's are over TensorRT-LLM; ours are over the same format in this project's engine, and the note says so. Of
    models that the paper does not have there are only the milliseconds.
    """
    found = []
    for timed in rows:
        if timed.row["batch_size"] != batch_size:
            continue
        name = METHOD if timed.row["method"] == FORMAT else timed.row["method"]
        found.append(_measurement(timed, name, timed.row["total_ms"] if timed.ok else None))
        if name != METHOD or timed.row["model"] not in paper.MODEL_NAMES:
            continue
        for engine, baseline in SAME_FORMAT.items():
            note = f"measured: over {method_name(baseline)} in the same engine and run"
            note = joined_notes([note, turns_note(timed, baseline)])
            found += _ratio(timed, rows, baseline, f"{METHOD} over {engine}", note)
    return found


def speedups(rows: list[Timed], batch_size: int = 1) -> list[Measurement]:
    """W4A8 over FP16 in the same engine and run (the paper's figure 6)."""
    found = []
    for timed in rows:
        if timed.row["method"] == FORMAT and timed.row["batch_size"] == batch_size:
            found += _ratio(timed, rows, BASELINE, METHOD, turns_note(timed, BASELINE))
    return found


def _ratio(timed: Timed, rows: list[Timed], baseline: str, name: str, note: str | None = None) -> list[Measurement]:
    """The speed-up over `baseline` in the same run, or how one of the two failed; nothing where one is absent."""
    other = _beside(timed, rows, baseline)
    failed = next((each for each in (timed, other) if each is not None and not each.ok), None)
    if failed is not None:
        return [_measurement(failed, name, None)]
    return [] if other is None else [_measurement(timed, name, other.row["total_ms"] / timed.row["total_ms"], note)]


def _measurement(timed: Timed, method: str, value: float | None, note: str | None = None) -> Measurement:
    row = timed.row
    if value is None:
        note = f"{row['outcome']}: {row.get('reason')}"
    return Measurement(
        model=row["model"], method=method, format=row.get("format", ""), recipe=None, value=value,
        outcome=row["outcome"], device=timed.device, commit=timed.commit, note=note,
    )  # fmt: skip


def end_to_end_table(rows: list[Timed]) -> Table:
    """Every row: both phases, the floor, energy, and the ratio to FP16 of the same run."""
    columns = (
        Column("model", "model"),
        Column("batch_size", "batch", "{:d}"),
        Column("method", "method"),
        Column("prefill_ms", "prefill ms", "{:.1f}"),
        Column("decode_ms_per_token", "ms/token", "{:.3f}"),
        Column("step_p99_ms", "p99", "{:.3f}"),
        Column("measured_total_ms", "total ms", "{:.1f}", absent=NOT_RUN),
        Column("floor_ms", "floor ms", "{:.1f}"),
        Column("over_floor", "over floor", "{:.2f}x"),
        Column("speedup_over_fp16", "vs FP16", "{:.2f}x"),
        Column("tokens_per_s", "tokens/s", "{:.0f}"),
        Column("memory_gib", "GiB", "{:.1f}"),
        Column("energy_j_per_token", "J/token", "{:.3f}"),
        Column("device", "device"),
        Column("commit", "commit"),
        Column("note", "note"),
    )
    drawn = []
    for timed in rows:
        row = timed.row
        front = (model_name(row["model"]), row["batch_size"], method_name(row["method"]))
        back = (timed.device, timed.commit)
        if not timed.ok:
            drawn.append((*front, *(None,) * 10, *back, f"{row['outcome']}: {row['reason']}"))
            continue
        floor, peak = row["floor_ms"], row.get("peak_memory_bytes")
        # Peers of another engine are held against no floor: theirs is that of the format.
        floor = floor if row.get("engine", "odyssey") == "odyssey" else None
        drawn.append(
            (*front, row["prefill_ms"], row["decode_ms_per_token"], (row.get("step_ms") or {}).get("p99"),
             row["total_ms"], floor, row["total_ms"] / floor if floor else None, speedup(timed, rows, BASELINE),
             row["tokens_per_s"], peak / 2**30 if peak else None, row.get("energy_j_per_token"), *back, _note(timed))
        )  # fmt: skip
    notes = (
        f"{INPUT_LEN} tokens in, {OUTPUT_LEN} out, greedy; medians of runs in one process, in turns where the "
        "note says nothing else. Floor: the "
        "prefill's operations at the measured matrix peaks, bytes of weights and KV cache at the measured bandwidth "
        "(docs/engine.md).",
    )
    return Table("end_to_end", "End-to-end latency in the decode engine", columns, tuple(drawn), notes)


def weights_note(row: dict) -> str | None:
    """Whether a row's weights were random, and its random int4 had the mean that older ones had: activations then grew
    until they were not finite (docs/engine.md)."""
    if row.get("weights") != "random":
        return None
    biased = "w4" in row["method"] and "random_mean" not in row
    return "random weights, int4 of mean -0.5" if biased else "random weights"


def turns_note(timed: Timed, baseline: str) -> str | None:
    """That a row did not take turns with `baseline`: what does not fit into memory together is timed one by one."""
    together = timed.row.get("interleaved_with")
    if together is not None and len(together) == 1:
        return "in turns with no other"
    return None if together is None or baseline in together else f"not in turns with {method_name(baseline)}"


def _note(timed: Timed) -> str | None:
    row = timed.row
    reasons = row.get("gpu", {}).get("throttle_reasons")
    parts = [weights_note(row), turns_note(timed, BASELINE)]
    if reasons:
        parts.append(f"throttled: {', '.join(reasons)}")
    if row.get("backend"):
        parts.append(f"kernel: {row['backend']}")
    return joined_notes(parts)
