"""Small hand-written records of cells and results of fastgemm.bench."""

from __future__ import annotations

# Tables of what was measured alone, with no cell of the paper: of nothing they have no rows.
MEASURED_ALONE = {"table2_c4", "accuracy_tasks", "end_to_end", "table_seeds"}
PROTOCOL = "joined with two newlines, tokenized once, non-overlapping windows, tail dropped"
FORMATS = {"fp16": "W16A16", "rtn": "W4A8", "awq": "W4A16-g128", "gptq": "W4A16-g128", "smoothquant": "W8A8"}


def cell_record(
    method="odyssey",
    model="llama-7b",
    value=None,
    *,
    dataset="wikitext2",
    window=2048,
    text="aa",
    tokens="t1",
    outcome="ok",
    tasks=None,
    digest=None,
    commit="0123456789abcdef",
    **settings,
) -> dict:
    """A record; `value` is its perplexity, `tasks` maps lm-eval tasks to (metric, value), `settings` the method's."""
    if method == "odyssey":
        settings = {"clipping": "learned", "compensation": "gptq"} | settings
    if method == "rtn":
        settings = {"symmetric": True} | settings
    record = {
        "digest": digest,
        "outcome": outcome,
        "reason": None if outcome == "ok" else "the reason",
        "started": "2026-01-01T00:00:00+00:00",
        "config": {
            "method": {"name": method, **settings},
            "model": {"name": model, "path": None},
            "accuracy": {
                "perplexity": {"dataset": dataset, "path": None, "window": window, "max_windows": None},
                "tasks": list(tasks or ()),
            },
            "calibration": {"seed": 0},
            "seed": 0,
        },
        "device": "cpu",
        "environment": {"cpu": "Abacus 3000", "gpu": None, "git_commit": commit, "host": "here"},
        "model": {"name": model, "dtype": "float32", "fingerprint": "ff"},
        "method": {"name": method, "label": FORMATS.get(method, "W4A8"), "arithmetic": "integer"},
        "timings": {"total_s": 12.0},
        "accuracy": {},
    }
    if value is not None:
        record["accuracy"]["perplexity"] = {
            dataset: {
                "value": value, "protocol": PROTOCOL, "window": window, "windows": 10, "text_sha256": text * 32,
                "tokens_sha256": tokens * 32, "simulated": False,
            }
        }  # fmt: skip
    if tasks:
        record["accuracy"]["tasks"] = {
            task: {"metric": metric, "value": figure, "version": 1, "num_fewshot": 0, "items": 100,
                   "prompts_sha256": task[0] * 64, "simulated": False}
            for task, (metric, figure) in tasks.items()
        }  # fmt: skip
    return record


def gemm_result(rows, gpu="GPU 1", commit="fedcba9876543210") -> dict:
    """A result of fastgemm.bench from (n, k, m, kernel, microseconds, correct) tuples."""
    baseline = {row[:3]: row[4] for row in rows if row[3] == "cublas-fp16"}
    return {
        "format": 2,
        "environment": {"gpu": gpu, "git_commit": commit, "date": "2026-01-02T00:00:00+00:00"},
        "settings": {"rounds": 3},
        "rows": [
            {
                "n": n, "k": k, "m": m, "kernel": kernel, "time_us": time, "spread": 0.01, "gb_per_s": 1000.0,
                "tops": 2 * n * k * m / time / 1e6, "share_of_limit": 0.5, "relative_error": 1e-4, "correct": correct,
                "note": "", "speedup_over_fp16": baseline[n, k, m] / time if (n, k, m) in baseline else None,
            }
            for n, k, m, kernel, time, correct in rows
        ],
    }  # fmt: skip
