"""Results for people and programs: a table in the terminal, Markdown, JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sightline.conformance.catalogue import CHECKS, GROUPS
from sightline.conformance.suite import Level, Outcome, Result

MARKS: Mapping[Outcome, str] = {Outcome.PASS: "✓", Outcome.FAIL: "✗", Outcome.SKIP: "–"}
_STYLES: Mapping[Outcome, str] = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.SKIP: "dim"}
_CHECK = {check.id: check for check in CHECKS}


def failed_musts(results: Sequence[Result]) -> list[Result]:
    """What the protocol asks for and the server does not do."""
    return [r for r in results if r.outcome is Outcome.FAIL and _CHECK[r.id].level is Level.MUST]


def as_json(results: Sequence[Result], *, url: str, model: str | None) -> str:
    """Everything, for programs."""
    entries = [
        asdict(result) | {"level": check.level, "group": check.group, "sentence": check.sentence}
        for result in results
        for check in (_CHECK[result.id],)
    ]
    body = {"url": url, "model": model, "conforms": not failed_musts(results), "results": entries}
    return json.dumps(body, indent=2, ensure_ascii=False)


def as_markdown(columns: Mapping[str, Sequence[Result]]) -> str:
    """One table for each group: a row for each check, a column for each server."""
    lines: list[str] = []
    by_server = {name: {result.id: result for result in results} for name, results in columns.items()}
    for group in GROUPS:
        checks = [check for check in group.checks if any(check.id in results for results in by_server.values())]
        if not checks:
            continue
        lines += [f"### {group.title}", "", _row("check", "level", "what holds", *columns)]
        lines.append("|---|---|---|" + ":-:|" * len(columns))
        for check in checks:
            found = (results.get(check.id) for results in by_server.values())
            marks = [MARKS[result.outcome] if result else "" for result in found]
            lines.append(_row(f"`{check.id}`", check.level, check.sentence, *marks))
        lines.append("")
    return "\n".join(lines)


def as_summary(columns: Mapping[str, Sequence[Result]]) -> str:
    """A row for each group: how many of the checks that apply to a server it passes."""
    lines = [_row("", *columns), "|---|" + ":-:|" * len(columns)]
    for group in GROUPS:
        ids = {check.id for check in group.checks}
        cells = [_share([result for result in results if result.id in ids]) for results in columns.values()]
        if any(cells):
            lines.append(_row(group.title, *cells))
    for level, title in ((Level.MUST, "**the protocol's musts**"), (None, "**all**")):
        cells = [
            _share([result for result in results if level is None or _CHECK[result.id].level is level])
            for results in columns.values()
        ]
        lines.append(_row(title, *cells))
    return "\n".join(lines) + "\n"


def print_table(results: Sequence[Result], console: Console, *, title: str) -> None:
    """For a terminal: every check, its reason when it did not pass, and the sums."""
    table = Table(title=title, title_justify="left", expand=True, show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what holds, or what happened instead", ratio=1)
    group = None
    for result in results:
        check = _CHECK[result.id]
        if check.group != group:
            table.add_section()
            group = check.group
        style = _STYLES[result.outcome]
        told = check.sentence if result.outcome is Outcome.PASS else result.reason
        table.add_row(result.id, check.level, f"[{style}]{MARKS[result.outcome]}[/]", _plain(told), style=None)
    console.print(table)
    words = {Outcome.PASS: "passed", Outcome.FAIL: "failed", Outcome.SKIP: "skipped"}
    counts = [f"{sum(result.outcome is outcome for result in results)} {word}" for outcome, word in words.items()]
    broken = failed_musts(results)
    verdict = f"[red]{len(broken)} of the protocol's musts fail[/]" if broken else "[green]every must holds[/]"
    console.print(f"{', '.join(counts)}; {verdict}")


def _share(results: Sequence[Result]) -> str:
    """`passed/applicable`; a dash where nothing applies, nothing where nothing was run."""
    if not results:
        return ""
    applicable = [result for result in results if result.outcome is not Outcome.SKIP]
    return f"{sum(r.outcome is Outcome.PASS for r in applicable)}/{len(applicable)}" if applicable else "–"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """Square brackets are markup to rich."""
    return text.replace("[", r"\[")
