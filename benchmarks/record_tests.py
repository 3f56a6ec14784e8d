"""Run pytest and write what came of it: commit, machine, versions, counts. Arguments after ``--`` go to pytest.

The file is written every few seconds, so a run that is stopped leaves its counts, with ``exit`` null.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from gyrokv.env import environment

OUTCOMES = ("passed", "failed", "skipped", "error")


class Counts:
    """Counts each test once: by its call, or by its set-up when that failed or skipped."""

    def __init__(self, out: Path, about: dict) -> None:
        self.out, self.about = out, about
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.failures: list[str] = []
        self.written = time.monotonic()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            outcome = "error" if report.failed and report.when == "setup" else report.outcome
            self.counts[outcome] += 1
            if report.failed:
                self.failures.append(report.nodeid)
        if time.monotonic() - self.written > 5:
            self.write(None)

    def write(self, status: int | None) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        result = {"when": when, **self.about, "exit": status, **self.counts, "failures": self.failures}
        self.out.write_text(json.dumps(result, indent=1) + "\n")
        self.written = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", help="commit of a tree that is no git checkout")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = environment()
    machine["commit"] = machine["commit"] or options.commit
    counts = Counts(options.out, {"environment": machine, "command": "pytest " + " ".join(options.pytest)})
    status = int(pytest.main(options.pytest, plugins=[counts]))
    counts.write(status)
    print(json.dumps(counts.counts))
    return status


if __name__ == "__main__":
    sys.exit(main())
