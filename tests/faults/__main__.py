"""`python -m tests.faults [--list] [--only NAME ...] [--jobs N]`: exit code 0 if every fault was caught."""

from __future__ import annotations

import argparse
import sys

from tests.faults.runner import CannotJudge, Fault, judge_all
from tests.faults.table import FAULTS


def chosen(names: list[str] | None) -> list[Fault]:
    return [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]


def show(faults: list[Fault]) -> None:
    for fault in faults:
        print(f"{fault.name}\n    {fault.file}\n  - {fault.old}\n  + {fault.new}\n    " + "\n    ".join(fault.tests))


def run(faults: list[Fault], jobs: int) -> int:
    caught = 0
    try:
        for verdict in judge_all(faults, jobs=jobs):
            print(verdict, flush=True)
            caught += verdict.caught
    except CannotJudge as reason:
        sys.exit(f"faults: {reason}")
    print(f"{caught} caught, {len(faults) - caught} not caught")
    return int(caught < len(faults))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the faults, run none")
    parser.add_argument("--only", action="append", metavar="NAME", help="only faults whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree to work in (default 2)")
    options = parser.parse_args()
    faults = chosen(options.only)
    if not faults:
        parser.error("no such fault" if options.only else "the table has no faults yet")
    if options.list:
        show(faults)
        return 0
    return run(faults, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
