"""The benchmarks: ``python tests/benchmarks [PART ...] [--json FILE]``, or ``tox -e bench``.

Run it so, and what is measured is the installed package, not the working tree. Each part runs in a process of its own;
its tables are printed as they come, and all rows go into one JSON file at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rows

PARTS = ("round_trip", "training", "watchers", "footprint", "start", "ranks", "files")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    default = Path(os.environ.get("TOX_ENV_DIR", ".tox"), "bench.json")
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=str(__doc__).partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help=f"where the rows go ({default})")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of one part, for the process that asked for it
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    return args


def run_one(part: str, to: Path) -> None:
    """Run one part in this process."""
    found = []
    for table in importlib.import_module(part).measure():
        table.print()
        found += [row.to_json() for row in table.rows]
    to.write_text(json.dumps(found))


def run_all(parts: list[str], to: Path) -> int:
    """Run the parts one after the other; return how many failed."""
    about, found, failed = rows.machine(), [], 0
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    begin = time.monotonic()
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="bench") as home:
            here, out = os.path.dirname(os.path.abspath(__file__)), Path(home, "rows")
            env = {**os.environ, "FORGATHER_JOBS_DIR": os.path.join(home, "jobs")}
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
            failed += subprocess.run([sys.executable, here, part, "--rows", str(out)], env=env).returncode != 0
            found += json.loads(out.read_text()) if out.exists() else []
    unmet = sum(row["met"] is False for row in found)
    aims = sum(row["met"] is not None for row in found)
    about["seconds"] = round(time.monotonic() - begin)
    rows.write(to, about, found)
    print(f"\n{aims - unmet} of {aims} aims met in {about['seconds']} s; all rows: {to}")
    return failed


def main() -> int:
    args = arguments()
    if args.rows is not None:
        run_one(args.parts[0], args.rows)
        return 0
    return run_all(args.parts or list(PARTS), args.json)


if __name__ == "__main__":
    sys.exit(main())
