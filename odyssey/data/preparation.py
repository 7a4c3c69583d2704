"""Prepares a directory for data.root on a connected machine, and checks one: official rows, checksums, resumable."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from odyssey.data.hub import HUB_DATASETS
from odyssey.data.task_files import check_task_files, local_file_names, task_columns
from odyssey.data.texts import C4_TRAIN, C4_VALIDATION
from odyssey.errors import ConfigError, MissingDataError, OdysseyError

# In the format of sha256sum: `sha256sum -c SHA256SUMS` checks a directory, too.
CHECKSUMS = "SHA256SUMS"
_EVALUATED_SPLITS = {
    "lambada_openai": "test", "piqa": "validation", "winogrande": "validation", "arc_easy": "test",
    "hellaswag": "validation",
}  # fmt: skip
LOCAL_ONLY = "hellaswag_preprocessed"
_WIKITEXT_ROWS = {"wikitext2/wiki.test.raw": 4358, "wikitext2/wiki.train.raw": 36718}
_C4_ROWS = {C4_VALIDATION: 45576, C4_TRAIN: 356317}


@dataclass(frozen=True)
class Part:
    """What is fetched at once. files: relative to the directory. fetch: write them under a directory; None for what the
    hub does not have. check: raise MissingDataError unless the files under a directory have the official rows."""

    files: tuple[str, ...]
    fetch: Callable[[Path], None] | None
    check: Callable[[Path], None]


def parts() -> dict[str, Part]:
    """Everything that is known, by name: the evaluation tasks, WikiText-2, C4's shards for evaluation and calibration,
    the local variant of HellaSwag."""
    found = {
        name: Part(
            local_file_names(name),
            lambda to, name=name: _fetch_task(name, to),
            lambda root, name=name: check_task_files(name, root),
        )
        for name in (*_EVALUATED_SPLITS, "mmlu", LOCAL_ONLY)
    }
    found[LOCAL_ONLY] = replace(found[LOCAL_ONLY], fetch=None)
    for name, file in (("wikitext2", "wikitext2/wiki.test.raw"), ("wikitext2_train", "wikitext2/wiki.train.raw")):
        found[name] = Part(
            (file,),
            lambda to, file=file: _fetch_wikitext(file, to),
            lambda root, file=file: _check_wikitext(file, root),
        )
    for name, shard in (("c4", C4_VALIDATION), ("calibration", C4_TRAIN)):
        found[name] = Part(
            (f"c4/{Path(shard).name}",),
            lambda to, shard=shard: _fetch_c4(shard, to),
            lambda root, shard=shard: _check_c4(shard, root),
        )
    return found


def part_names(text: str) -> list[str]:
    """Names from a list with commas; `paper` is what the paper's tables need: all tasks, WikiText-2, C4 and the
    calibration shard. Raises ConfigError for an unknown one."""
    known = [name for name, part in parts().items() if part.fetch is not None]
    of_the_paper = [name for name in known if name != "wikitext2_train"]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or set(names) - {"paper", *known}:
        raise ConfigError(f"--tasks={text}: allowed: paper, {', '.join(known)}")
    return list(dict.fromkeys(each for name in names for each in (of_the_paper if name == "paper" else (name,))))


def fetch(names: Iterable[str], to: Path, say: Callable[[str], None] = print) -> list[str]:
    """Write the parts under `to`; returns one line per part that could not be had.

    Files appear under their names when they are whole, and in SHA256SUMS after that: what was stopped goes on at the
    first part that is missing or whose files are not the ones in SHA256SUMS.
    """
    known, problems = parts(), []
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        part = known[name]
        sums = read_checksums(to)
        if all((to / file).is_file() and sums.get(file) == file_sha256(to / file) for file in part.files):
            say(f"{name}: there")
            continue
        say(f"{name}: fetching {', '.join(part.files)}")
        try:
            part.fetch(to)
            part.check(to)
        except OdysseyError as error:
            problems.append(f"{name}: {error}")
            continue
        except Exception as error:  # datasets and the hub raise a different class for every way a download can fail
            first = (str(error).strip() or "no message").splitlines()[0][:200]
            problems.append(f"{name}: the hub's copy cannot be read ({type(error).__name__}: {first}); run this again")
            continue
        _write_checksums(to, {**read_checksums(to), **{file: file_sha256(to / file) for file in part.files}})
    return problems


def verify(root: Path, names: Iterable[str] | None = None, say: Callable[[str], None] = print) -> list[str]:
    """Check files against SHA256SUMS and the official rows; returns one line per problem.

    names: parts that have to be there; None checks those of which there is a file or a checksum.
    """
    if not root.is_dir():
        return [f"{root}: no such directory"]
    try:
        sums = read_checksums(root)
    except MissingDataError as error:
        return [str(error)]
    problems, checked = [], 0
    for name, part in parts().items():
        present = [file for file in part.files if (root / file).is_file()]
        if names is None and not present and not any(file in sums for file in part.files):
            continue
        if names is not None and name not in names:
            continue
        checked += 1
        found = [f"{root / file}: is missing" for file in part.files if file not in present]
        found += [
            f"{root / file}: its SHA-256 is not the one in {CHECKSUMS}; fetch it again"
            for file in present
            if file in sums and file_sha256(root / file) != sums[file]
        ]
        if not found:
            try:
                part.check(root)
            except MissingDataError as error:
                found = [str(error)]
        problems += found
        if not found:
            known = "checksums and rows" if all(file in sums for file in part.files) else "rows; no checksum"
            say(f"{name}: ok ({known})")
    of_parts = {file for part in parts().values() for file in part.files}
    problems += [
        f"{root / file}: is in {CHECKSUMS} and missing"
        for file in sums
        if file not in of_parts and not (root / file).is_file()
    ]
    if not checked and not problems:
        problems.append(f"{root}: has none of the known files; python -m odyssey.data fetch --tasks paper --to {root}")
    return problems


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(root: Path) -> dict[str, str]:
    """File -> SHA-256 of SHA256SUMS, empty when there is none. Raises MissingDataError for a damaged one."""
    path, sums = root / CHECKSUMS, {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        digest, space, file = line.partition("  ")
        if not space or len(digest) != 64:
            raise MissingDataError(f"{path}: a line is not 'SHA-256  file'; remove the file and fetch again")
        sums[file] = digest
    return sums


def _write_checksums(root: Path, sums: dict[str, str]) -> None:
    with _whole_file(root / CHECKSUMS) as file:
        file.writelines(f"{sums[name]}  {name}\n" for name in sorted(sums))


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator:
    """A text file that gets its name when it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _rows(name: str, split: str) -> Iterable[dict]:
    from datasets import load_dataset

    hub = HUB_DATASETS[name]
    return load_dataset(hub.repository, hub.config, split=split)


def _fetch_task(name: str, to: Path) -> None:
    files = [to / file for file in local_file_names(name)]
    splits = ("test", "dev") if name == "mmlu" else (_EVALUATED_SPLITS[name],)
    columns = task_columns(name)
    for file, split in zip(files, splits, strict=False):
        rows = list(_rows(name, split))
        with _whole_file(file) as lines:
            lines.writelines(json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)
    if name == "piqa":
        with _whole_file(files[1]) as lines:
            lines.writelines(f"{int(row['label'])}\n" for row in rows)


def _fetch_wikitext(file: str, to: Path) -> None:
    split = Path(file).name.split(".")[1]
    with _whole_file(to / file) as lines:
        # The hub's rows have empty lines as "", the original files as a blank.
        lines.writelines(row["text"] or " \n" for row in _rows("wikitext2", split))


def _check_wikitext(file: str, root: Path) -> None:
    with (root / file).open(encoding="utf-8", newline="\n") as lines:
        found = sum(1 for _ in lines)
    if found != _WIKITEXT_ROWS[file]:
        raise MissingDataError(
            f"{root / file}: has {found} lines, the official split has {_WIKITEXT_ROWS[file]}; fetch it again"
        )


def _fetch_c4(shard: str, to: Path) -> None:
    from huggingface_hub import hf_hub_download

    # The hub's client resumes a download that was stopped.
    source = hf_hub_download(HUB_DATASETS["c4"].repository, shard, repo_type="dataset")
    target = to / "c4" / Path(shard).name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.rename(target)


def _check_c4(shard: str, root: Path) -> None:
    file, count, found = root / "c4" / Path(shard).name, _C4_ROWS[shard], 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                found += 1
                if not isinstance(json.loads(line)["text"], str):
                    raise TypeError
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise MissingDataError(f"{file}: row {found} cannot be read; fetch it again") from error
    if found != count:
        raise MissingDataError(f"{file}: has {found} rows, the official shard has {count}; fetch it again")
