"""`sightline`: serve a model, run the demonstration, caption an image or a batch of them over HTTP."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sightline.conformance.command import conformance
from sightline.fit import fit
from sightline.jobs.command import batch
from sightline.trial import self_check

app = typer.Typer(
    help="Vision-language models as KServe predictors, and the caption→enhance pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """Serve one predictor, or several in one process; `sightline serve describe --help` lists its settings."""
    _tame_threads()
    from sightline.server.serve import main as serve_main

    raise SystemExit(serve_main(context.args))


@app.command(
    "show-config",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def show_config(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Print what `serve` with the same words would have in force, secrets hidden, and where each value comes from."""
    from sightline.configuration import shown_as_table, told
    from sightline.server.serve import read_command

    answer = told(read_command(context.args, "sightline show-config"))
    if as_json:
        import json

        typer.echo(json.dumps(answer, indent=2))
    else:
        typer.echo(shown_as_table(answer), nl=False)


@app.command()
def caption(
    image: Annotated[Path, typer.Argument(help="Image file.", exists=True, dir_okay=False)],
    url: Annotated[str, typer.Option(envvar="SIGHTLINE_URL", help="The pipeline's address.")] = "http://127.0.0.1:8080",
    enhance: Annotated[
        bool | None,
        typer.Option("--enhance/--no-enhance", help="Default: what the pipeline is set to."),
    ] = None,
    level: Annotated[str | None, typer.Option(help="Reasoning level: low, medium or high.")] = None,
    explain: Annotated[bool, typer.Option(help="Show added terms and what each step did.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="SIGHTLINE_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer.")] = False,
) -> None:
    """Caption one image by a running pipeline."""
    from sightline.client import Client, RequestFailed

    try:
        with Client(url, api_key=api_key) as client:
            answer = client.caption(image.read_bytes(), enhance=enhance, level=level, explain=explain)
    except RequestFailed as error:
        typer.echo(f"sightline: {error}", err=True)
        raise SystemExit(1) from error
    if as_json or explain:
        import json

        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        typer.echo(answer["caption"])


@app.command()
def demo(
    port: Annotated[int, typer.Option(envvar="PORT", help="Gateway; the five models use the next five.")] = 8080,
    once: Annotated[bool, typer.Option("--exit", envvar="DEMO_EXIT", help="Stop after the samples.")] = False,
) -> None:
    """Start the gateway and all five models on 127.0.0.1, show what they do, keep serving until Ctrl-C."""
    from sightline.demo import run

    def import_server() -> Callable[[Sequence[str]], int]:
        from sightline.nursery import import_models
        from sightline.server.serve import main as serve_main

        import_models()
        return serve_main

    _tame_threads()
    raise SystemExit(run(port, import_server, keep_serving=not once))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def render(context: typer.Context) -> None:
    """Print everything the operator would apply for a VisionPipeline: `sightline render -f pipeline.yaml`."""
    try:
        from sightline_operator.render.cli import main as render_main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sightline_operator":
            raise
        typer.echo("sightline: `render` is the operator's: pip install sightline-operator", err=True)
        raise SystemExit(1) from error
    raise SystemExit(render_main(context.args))


app.command()(conformance)
app.command()(fit)
app.command("self-check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(self_check)
app.add_typer(batch, name="batch")


def _tame_threads() -> None:
    """Before torch is imported: OpenMP threads that spin while they wait make a shared CPU ten times slower."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point of the `sightline` command."""
    sys.exit(app())
