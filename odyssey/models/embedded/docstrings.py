"""More text for the embedded model's gradients: the docstrings of CPython's standard library.

The help topics alone are too few to train on. Docstrings are the nearest text that every CPython carries;
they are parsed from the library's source files, which are never imported. They serve training only, neither
calibration nor measurement.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

from odyssey.models.embedded.text import distinct_paragraphs, normalise, repeated_keys

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"}
_SKIPPED |= {"site-packages", "dist-packages"}


def module_docstrings(source: str) -> str:
    """All docstrings of one module's `source`, in order of appearance, normalised, joined by blank lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (normalise(ast.get_docstring(node) or "") for node in nodes)
    return "\n\n".join(docstring for docstring in docstrings if docstring)


def stdlib_docstrings(held_out: Iterable[str]) -> dict[str, str]:
    """Docstrings of the running Python's standard library, module file -> text, sorted by file.

    Tests, demos and third-party packages are left out, and so is every paragraph that occurs in one of the
    `held_out` texts or in an earlier module (see `distinct_paragraphs`).
    Raises RuntimeError where the installation holds no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen = repeated_keys(held_out)
    modules = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if _SKIPPED.intersection(name.parts):
                continue
            try:
                docstrings = module_docstrings(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                # Templates and deliberately broken files are no Python source.
                continue
            if text := distinct_paragraphs(docstrings, seen):
                modules[name.as_posix()] = text
    if not modules:
        raise RuntimeError(f"no standard library source under {root}: train with a complete CPython")
    return modules
