"""`sightline conformance`: the options, the run, the report, the exit code."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.conformance.suite import Failed

OK, BROKEN, UNREACHABLE = 0, 1, 2


def conformance(
    url: Annotated[str, typer.Option(help="The server's address, such as http://127.0.0.1:8080.")] = "",
    grpc: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Its gRPC address, if it has one.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model; default: the first that the server lists.")] = None,
    openai: Annotated[
        bool | None, typer.Option("--openai/--no-openai", help="OpenAI routes; default: checked when there are any.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SIGHTLINE_API_KEY")] = None,
    request: Annotated[
        Path | None,
        typer.Option(help="A V2 request in JSON that the model takes; default: made from its metadata.", exists=True),
    ] = None,
    select: Annotated[list[str] | None, typer.Option(help="Ids of checks, such as errors.*; repeatable.")] = None,
    intrusive: Annotated[bool, typer.Option(help="Also try to take the model away. Not on a server in use.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the model to be ready before the checks.")] = 30.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    list_checks: Annotated[bool, typer.Option("--list", help="Print the checks and stop.")] = False,
    document: Annotated[bool, typer.Option(help="Print our OpenAPI document of the protocol and stop.")] = False,
) -> None:
    """Check any KServe V2 server from outside: exit 0 when it does all that the protocol asks for, 1 when not.

    2: nothing answers there, or the command was wrong.
    """
    from rich.console import Console

    from sightline.conformance import report, schema
    from sightline.conformance.catalogue import selected
    from sightline.conformance.run import Unreachable, run, wait_until_ready
    from sightline.conformance.target import Address, Target

    if document:
        sys.stdout.write(schema.document())
        raise SystemExit(OK)
    try:
        checks = selected(select or (), intrusive=intrusive or list_checks)
        body: Any = json.loads(request.read_text("utf-8")) if request else None
    except ValueError as error:
        raise _wrong(str(error)) from error
    if list_checks:
        for check in checks:
            sys.stdout.write(f"{check.id:32} {check.level:10} {check.sentence}\n")
        raise SystemExit(OK)
    if not url.startswith(("http://", "https://")):
        raise _wrong("--url must be an http:// or https:// address")
    address = Address(
        url=url.rstrip("/"), grpc=grpc, model=model, api_key=api_key, openai=openai, request=body,
        timeout_seconds=timeout, intrusive=intrusive,
    )  # fmt: skip
    notes = Console(stderr=True)
    try:
        with notes.status("waiting for the model …") as status:
            wait_until_ready(address, wait)
            results = run(checks, address, lambda group: status.update(f"{group} …"))
    except Unreachable as error:
        raise _wrong(str(error)) from error
    if as_json:
        with Target(address) as target:
            sys.stdout.write(report.as_json(results, url=address.url, model=_name(target)) + "\n")
    elif as_markdown:
        sys.stdout.write(report.as_markdown({"": results}))
    else:
        report.print_table(results, Console(), title=address.url)
    raise SystemExit(BROKEN if report.failed_musts(results) else OK)


def _name(target: "Any") -> str | None:  # noqa: ANN401 - a Target, imported when it is needed
    try:
        return str(target.model)
    except Failed:
        return None


def _wrong(message: str) -> SystemExit:
    sys.stderr.write(f"sightline: {message}\n")
    return SystemExit(UNREACHABLE)
