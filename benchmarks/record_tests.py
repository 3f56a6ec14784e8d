"""Run pytest and write what came of it: commit, machine, versions, counts. Arguments after ``--`` go to pytest."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

from gyrokv.env import environment

OUTCOMES = ("passed", "failed", "skipped", "error")


class Counts:
    """Counts each test once: by its call, or by its set-up when that failed or skipped."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            outcome = "error" if report.failed and report.when == "setup" else report.outcome
            self.counts[outcome] += 1
            if report.failed:
                self.failures.append(report.nodeid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", help="commit of a tree that is no git checkout")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    options = parser.parse_args()
    counts = Counts()
    status = pytest.main(options.pytest, plugins=[counts])
    machine = environment()
    machine["commit"] = machine["commit"] or options.commit
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": machine,
        "command": "pytest " + " ".join(options.pytest),
        "exit": int(status),
        **counts.counts,
        "failures": counts.failures,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(counts.counts))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
