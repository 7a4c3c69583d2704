"""Tables and figures from records.

    python -m experiments overview [DIR ...] [--format terminal|md|csv] [--plot FILE.png]

DIR is an output directory of run.py or a directory of committed records (default: outputs).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.overview import overview, overview_markdown, plot_overview, print_overview
from odyssey.record import find_records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Draw tables and figures from records.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("overview", help="one row per cell: outcome, perplexity, size, speed")
    command.add_argument("directories", nargs="*", default=["outputs"], metavar="DIR", help="where records are")
    command.add_argument("--format", choices=("terminal", "md", "csv"), default="terminal")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw perplexity against size (PNG and SVG)")
    options = parser.parse_args(arguments)

    records = [record for directory in options.directories for record in find_records(Path(directory))]
    if not records:
        print(f"error: no records under {', '.join(options.directories)}; run run.py first", file=sys.stderr)
        return 1
    frame = overview(records)
    if options.format == "terminal":
        print_overview(frame)
    elif options.format == "md":
        print(overview_markdown(frame), end="")
    else:
        print(frame.drop(columns="_method").to_csv(index=False), end="")
    if options.plot and not plot_overview(frame, options.plot):
        print("error: no record has both a perplexity and a size; nothing plotted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
