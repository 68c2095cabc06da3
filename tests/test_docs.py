"""README and docs say what is true of the code."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from service.cli.main import app
from service.settings import Settings

ROOT = Path(__file__).parent.parent
AHEAD = {"design.md", "protocol.md"}
"""Maps of the whole, which name what is not built yet, too."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(EXPUNGE_\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert set(rows) == {f"EXPUNGE_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default: Any = field.default
        shown = rows[f"EXPUNGE_{name.upper()}"]
        if isinstance(default, int) and default >= 2**20:
            assert shown == f"{default // 2**20} MiB"
        elif isinstance(default, int):
            assert shown == f"`{default}`"


def test_make_verbs_in_the_docs_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
        assert named <= verbs, page.name


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def test_commands_in_the_docs_exist() -> None:
    known = set(commands(typer.main.get_command(app)))
    for page in (page for page in PAGES if page.name not in AHEAD):
        for named in re.findall(r"(?:`|^|/)expunge ((?:[a-z]+(?:-[a-z]+)* ?)+)", page.read_text(), re.MULTILINE):
            words = tuple(named.split())
            assert words[:1] in known or words[:2] in known, f"{page.name}: expunge {named}"


def test_every_decision_is_listed_and_has_its_parts() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in pages:
        assert f"({page.name})" in index
        parts = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences", "Alternatives"], page.name


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "decisions" / "0011-dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[\[<>=!~;]", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", text), name


def test_make_help_lists_every_verb() -> None:
    listed = subprocess.run(
        ["/usr/bin/env", "make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split())
    assert {line.split()[0] for line in listed.splitlines()} == phony
