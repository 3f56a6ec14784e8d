"""The ``gyrokv`` command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit status, 2 for a mistake of the user."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f'gyrokv: the command line needs {" and ".join(missing)}: pip install "gyrokv[cli]"', file=sys.stderr)
        return 2
    from .app import run

    return run(arguments)
