"""Check with ``mypy --strict`` that Python blocks of the README and of docs/ use the public interface as it is typed.

A script, run by ``tox -e types``. Names that a block takes from its surroundings, such as ``model``, may be anything.
Recipes for other frameworks are left out: these have no types for the hooks that the recipes write.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Blocks are pieces of scripts: they may use names, and subclass trainers, that mypy does not know here.
OPTIONS = ("--strict", "--ignore-missing-imports", "--allow-subclassing-any", "--disable-error-code", "name-defined")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: each.start(1)].count("\n") + 1, each[1]) for each in found]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for page in (ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "stacks.md"})):
            for line, block in blocks(page):
                name = "_".join(page.relative_to(ROOT).with_suffix("").parts).replace("-", "_")
                file = Path(folder) / f"{name}_line_{line}.py"
                file.write_text(block, "utf-8")
                files.append(str(file))
        print(f"{len(files)} blocks")
        return subprocess.run([sys.executable, "-m", "mypy", *OPTIONS, *files], cwd=ROOT).returncode if files else 1


if __name__ == "__main__":
    sys.exit(main())
