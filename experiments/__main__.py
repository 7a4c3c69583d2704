"""Tables and figures from records.

    python -m experiments table2_perplexity|table6_ablation|...|all [DIR ...] [--format terminal|md|tex|csv]
    python -m experiments gemm [RESULT.json ...] [--plot FILE.png]
    python -m experiments overview [DIR ...] [--format terminal|md|csv] [--plot FILE.png]
    python -m experiments status [DIR ...]
    python -m experiments report

DIR is an output directory of run.py or a directory of committed results. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.catalogue import CATALOGUE, Selection
from experiments.figures import draw_gemm
from experiments.gemm import gemm_table
from experiments.measured import MixedProtocolsError
from experiments.overview import overview, overview_markdown, plot_overview, print_overview
from experiments.report import RESULTS, write_report
from experiments.sources import SourceError, Sources, load_gemm, load_sources
from experiments.status import status_table
from experiments.table import FORMATS, Table
from odyssey.record import find_records

FAILED = 1
_SUFFIXES = {"terminal": "txt", "md": "md", "tex": "tex", "csv": "csv"}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (SourceError, MixedProtocolsError) as error:
        return _error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Draw tables and figures from records.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, entry in {**CATALOGUE, "all": None}.items():
        command = commands.add_parser(name, help=entry.help if entry else "every table above")
        command.set_defaults(run=_all if entry is None else _one)
        command.add_argument("directories", nargs="*", type=Path, metavar="DIR", help="where records are (results)")
        command.add_argument("--format", choices=FORMATS, default="terminal")
        command.add_argument("--model", help="only records of this model")
        command.add_argument("--dataset", help="only perplexities on this data set")
        command.add_argument("--window", type=int, help="only perplexities with windows of so many tokens")
        command.add_argument("--text", help="only perplexities on the text whose SHA-256 begins like this")
        command.add_argument("--protocol", metavar="DIGEST", help="only perplexities of this protocol")
        if entry is None:
            command.add_argument("--output", type=Path, metavar="DIR", help="one file per table, and the figures")
        elif entry.draw:
            command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figure (PNG and SVG)")

    command = commands.add_parser("gemm", help="single matrix products: time, ratio to cuBLAS fp16, GB/s, TOP/s")
    command.set_defaults(run=_gemm)
    command.add_argument("results", nargs="*", type=Path, metavar="RESULT.json", help="results/*/gemm/*.json")
    command.add_argument("--format", choices=FORMATS, default="terminal")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw speed-up against M (PNG and SVG)")

    command = commands.add_parser("overview", help="one row per cell: outcome, perplexity, size, speed")
    command.set_defaults(run=_overview)
    command.add_argument("directories", nargs="*", default=["outputs"], metavar="DIR", help="where records are")
    command.add_argument("--format", choices=("terminal", "md", "csv"), default="terminal")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw perplexity against size (PNG and SVG)")

    command = commands.add_parser("status", help="every cell: outcome, duration, host, reason")
    command.set_defaults(run=_status)
    command.add_argument("directories", nargs="*", type=Path, metavar="DIR", help="output directories (outputs)")
    command.add_argument("--format", choices=FORMATS, default="terminal")

    command = commands.add_parser("report", help="write results/README.md and its figures from committed results")
    command.set_defaults(run=_report)
    command.add_argument("directory", nargs="?", type=Path, default=RESULTS, metavar="DIR")
    return parser


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return FAILED


def _sources(options: argparse.Namespace) -> Sources:
    sources = load_sources(options.directories or [RESULTS])
    for line in sources.damaged:
        print(f"left out: {line}", file=sys.stderr)
    return sources


def _selection(options: argparse.Namespace) -> Selection:
    return Selection(options.model, options.dataset, options.window, options.text, protocol=options.protocol)


def _one(options: argparse.Namespace) -> int:
    entry, sources = CATALOGUE[options.command], _sources(options)
    _print(entry.table(sources, _selection(options)), options.format)
    if entry.draw and options.plot:
        entry.draw(sources, options.plot)
    return 0


def _all(options: argparse.Namespace) -> int:
    """All tables that can be drawn; those that cannot are named at the end and make the exit code 1."""
    if options.format == "csv" and options.output is None:
        return _error("all --format csv: several tables are not one CSV file; add --output DIR")
    sources, refused = _sources(options), []
    for name, entry in CATALOGUE.items():
        try:
            table = entry.table(sources, _selection(options))
        except MixedProtocolsError as error:
            refused.append(f"{name}: {error}")
            continue
        if options.output is None:
            _print(table, options.format)
            print()
            continue
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.{_SUFFIXES[options.format]}").write_text(table.render(options.format))
        if entry.draw:
            entry.draw(sources, options.output / name)
    for line in refused:
        _error(line)
    return FAILED if refused else 0


def _gemm(options: argparse.Namespace) -> int:
    sources = load_gemm(options.results or sorted(RESULTS.glob("*/gemm/*.json")))
    for line in sources.skipped:
        print(f"left out: {line}", file=sys.stderr)
    if not sources.gemm:
        return _error("no result of fastgemm.bench; python -m fastgemm.bench --json FILE writes one")
    several = len(sources.gemm) > 1
    if several and (options.format == "csv" or options.plot):
        return _error("gemm: name one result for --format csv and --plot; results of several runs are not comparable")
    for document in sources.gemm:
        _print(gemm_table(document), options.format)
        if options.plot:
            try:
                draw_gemm(document, options.plot)
            except ValueError as error:
                return _error(str(error))
    return 0


def _overview(options: argparse.Namespace) -> int:
    records = [record for directory in options.directories for record in find_records(Path(directory))]
    if not records:
        return _error(f"no records under {', '.join(options.directories)}; run run.py first")
    frame = overview(records)
    if options.format == "terminal":
        print_overview(frame)
    elif options.format == "md":
        print(overview_markdown(frame), end="")
    else:
        print(frame.drop(columns="_method").to_csv(index=False), end="")
    if options.plot and not plot_overview(frame, options.plot):
        return _error("no record has both a perplexity and a size; nothing plotted")
    return 0


def _status(options: argparse.Namespace) -> int:
    directories = options.directories or [Path("outputs")]
    for directory in directories:
        if not directory.is_dir():
            problem = "not a directory" if directory.exists() else "no such directory"
            return _error(f"{directory}: {problem}; run.py writes its cells to output_dir (outputs)")
    _print(status_table(directories), options.format)
    return 0


def _report(options: argparse.Namespace) -> int:
    for path in write_report(options.directory):
        print(path)
    return 0


def _print(table: Table, format: str) -> None:
    print(table.render(format), end="")


if __name__ == "__main__":
    sys.exit(main())
