"""Build the documentation as a site, with pages made from the method table and the parser: ``tox -e site``.

``python docs/site.py FOLDER`` writes it to ``FOLDER/html``, by mkdocs-material. A link that leads nowhere is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from forgather_control.cli import verbs as cli_verbs
from forgather_control.wire import discovery, schemas
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.methods import COMMON

ROOT = Path(__file__).resolve().parent.parent
#: The order of the pages, under their headings; the README is the first page of the site.
NAVIGATION: dict[str, list[str]] = {
    "Begin": ["index", "tutorial", "guides"],
    "Use": ["command-line", "python", "change", "watch", "ranks", "other-hosts", "assistants", "stacks"],
    "Reference": ["verbs", "methods", "wire", "promises", "limits", "speed"],
    "Help": ["troubleshooting", "from-forgather", "SECURITY"],
    "Project": ["pages", "developing", "CHANGELOG"],
}
_SHOWN = (".md", ".svg", ".py")
CONFIG: dict[str, Any] = {
    "site_name": "forgather_control",
    "docs_dir": "pages",
    "site_dir": "html",
    "use_directory_urls": False,
    "theme": {"name": "material", "font": False, "features": ["navigation.sections", "content.code.copy"]},
    "markdown_extensions": ["tables", "toc", "pymdownx.superfences"],
    "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
    "plugins": ["search"],
}


def placed(path: Path) -> Path:
    """Return the place in the site of a file of the project."""
    named = {"README.md": "index.md", "docs/README.md": "pages.md", "examples": "pages.md"}
    return Path(named.get(path.as_posix()) or (path.relative_to("docs") if path.parts[0] == "docs" else path))


def moved(text: str, source: Path) -> str:
    """Return a page with its links as they are in the site."""

    def link(found: re.Match[str]) -> str:
        target, mark, anchor = found[1].partition("#")
        if not target or "://" in target:
            return found[0]
        there = placed(Path(os.path.normpath(source.parent / target)))
        return f"]({os.path.relpath(there, placed(source).parent)}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def copied(pages: Path) -> None:
    """Copy the pages that there are, and what they show, into one folder."""
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")]
    files += [file for folder in ("docs", "examples") for file in (ROOT / folder).rglob("*") if file.suffix in _SHOWN]
    for file in files:
        source = file.relative_to(ROOT)
        place = pages / placed(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text("utf-8")
        place.write_text(moved(text, source) if file.suffix == ".md" else text, "utf-8")


def verbs() -> Iterator[str]:
    """The help of each verb."""
    yield "# Verbs\n\nWhat `forgather-control help VERB` prints. In all verbs:\n"
    yield f"```text\n{cli_verbs.EPILOG}\n```\n"
    for verb, parser in cli_verbs.whole("forgather-control", width=100)[1].items():
        parser.epilog = None
        yield f"## {verb}\n\n```text\n{parser.format_help().strip()}\n```\n"


def methods() -> Iterator[str]:
    """Each method of the wire, with its parameters, its result and its errors; what many share, once."""
    described = discovery.document(BUILTIN)["methods"]
    errors = [{error["code"]: error["message"] for error in method["errors"]} for method in described]
    shared = {code: text for code, text in errors[0].items() if all(code in one for one in errors)}
    common = [param.name for param in COMMON]
    command = next(method for method in described if BUILTIN[method["name"]].is_command)
    yield "# Methods\n\nWhat a job answers to `rpc.discover`, in words. Every method can answer these errors:\n"
    yield from _errors(shared)
    yield "\n## Commands\n\nEvery command takes these parameters, besides its own, and answers its record:\n"
    yield from _parameters(param for param in command["params"] if param["name"] in common)
    yield from _result(command["result"]["schema"])
    for method, own_errors in zip(described, errors):
        is_command = method["name"] in BUILTIN and BUILTIN[method["name"]].is_command
        yield f"\n## {method['name']}\n\n{method['description']}\n"
        yield from _parameters(one for one in method["params"] if not (is_command and one["name"] in common))
        yield from () if is_command else _result(method["result"]["schema"])
        yield from _errors({code: text for code, text in own_errors.items() if code not in shared})


def _parameters(params: Iterable[dict[str, Any]]) -> Iterator[str]:
    rows = [*map(_parameter, params)]
    yield from ["| parameter | value | unless given | what it does |\n|---|---|---|---|", *rows, ""] if rows else []


def _errors(errors: dict[int, str]) -> Iterator[str]:
    rows = [_row(str(code), text.replace("``", "`")) for code, text in errors.items()]
    yield from ["| error | when |\n|---|---|", *rows, ""] if rows else []


def _parameter(param: dict[str, Any]) -> str:
    schema = param["schema"]
    default = "(required)" if param["required"] else f"`{json.dumps(schema.get('default'))}`"
    return _row(f"`{param['name']}`", schemas.expected(schema), default, param.get("description", ""))


def _result(schema: dict[str, Any]) -> Iterator[str]:
    is_list = schema.get("type") == "array"
    members = (schema["items"] if is_list else schema).get("properties", {})
    yield f"Result: {'a list of ' if is_list else ''}`{schema.get('title', 'value')}`\n"
    if members:
        yield "| member | value |\n|---|---|"
        for name, member in members.items():
            kinds = member.get("type", "object")
            choices = f": {', '.join(map(str, member['enum']))}" if "enum" in member else ""
            yield _row(f"`{name}`", (" or ".join(kinds) if isinstance(kinds, list) else kinds) + choices)
        yield ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(re.sub(r'[|]', r'&#124;', ' '.join(cell.split())) for cell in cells)} |"


def main(folder: str) -> int:
    place = Path(folder).resolve()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    copied(place / "pages")
    for name, lines in (("verbs", verbs()), ("methods", methods())):
        (place / "pages" / f"{name}.md").write_text("\n".join(lines), "utf-8")
    there = {path.stem for path in (place / "pages").glob("*.md")}
    known = {name for names in NAVIGATION.values() for name in names}
    if there - known:
        raise SystemExit(f"docs/site.py: in no section: {', '.join(sorted(there - known))}")
    nav = [{title: [f"{name}.md" for name in names if name in there]} for title, names in NAVIGATION.items()]
    (place / "mkdocs.yml").write_text(json.dumps({**CONFIG, "nav": nav}), "utf-8")  # JSON is YAML
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(words, cwd=place, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
