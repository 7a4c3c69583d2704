"""Local copies of the evaluation data, for machines without the hub (data.root):

python -m odyssey.data fetch --tasks paper|NAME,... --to DIR
python -m odyssey.data verify DIR [--tasks paper|NAME,...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from odyssey.data.preparation import fetch, part_names, parts, verify
from odyssey.errors import OdysseyError


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 when something is missing or wrong (one line each on standard error), 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m odyssey.data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    known = ", ".join(name for name, part in parts().items() if part.fetch is not None)
    tasks = f"paper (what its tables need) or names with commas: {known}"
    command = commands.add_parser("fetch", help="download from the hub; what is there and whole is kept")
    command.add_argument("--tasks", required=True, metavar="NAMES", help=tasks)
    command.add_argument("--to", required=True, type=Path, metavar="DIR", help="becomes data.root")
    command = commands.add_parser("verify", help="check rows and checksums of a directory")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--tasks", metavar="NAMES", help=f"what has to be there, default: what is there; {tasks}")
    options = parser.parse_args(arguments)
    try:
        names = part_names(options.tasks) if options.tasks is not None else None
        if options.command == "fetch":
            problems = fetch(names, options.to.expanduser())
        else:
            problems = verify(options.directory.expanduser(), names)
    except OdysseyError as error:
        print(f"odyssey.data: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
