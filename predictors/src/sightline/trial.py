"""`sightline self-check`: load a model, try it as a server does at its start, and say what is wrong with it."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

OK, REFUSED, WRONG = 0, 1, 2

_CLASSES = {
    "describe": "sightline.models.qwen_vl:QwenVL",
    "generate": "sightline.models.kimi_vl.model:KimiVL",
    "embed": "sightline.models.colqwen:ColQwen",
    "enhance": "sightline.models.gpt_oss.model:GptOss",
    "blip": "sightline.models.blip:Blip",
}


def self_check(
    context: typer.Context,
    predictor: Annotated[str, typer.Argument(help=f"One of {', '.join(_CLASSES)}; its settings' flags may follow.")],
    write: Annotated[
        Path | None, typer.Option(help="Write what it makes of the golden picture here, for --golden-file.")
    ] = None,
) -> None:
    """Try a model as its server does before it is ready: exit 0, or 1 and the reason. Settings are those of `serve`."""
    if predictor not in _CLASSES:
        typer.echo(f"sightline self-check: no predictor {predictor}; there are {', '.join(_CLASSES)}", err=True)
        raise SystemExit(WRONG)
    raise SystemExit(_tried(predictor, context.args, write))


def _tried(predictor: str, argv: Sequence[str], write: Path | None) -> int:
    from sightline.fit import SETTINGS
    from sightline.models.loading import LoadFailed
    from sightline.models.selfcheck import checked, tried
    from sightline.settings import load

    settings = load(SETTINGS[predictor], ["--auth", "off", *argv], prog=f"sightline self-check {predictor}")
    module, _, name = _CLASSES[predictor].partition(":")
    build = getattr(importlib.import_module(module), name)
    try:
        if write is None:
            checked(build, settings)
        else:
            tried(build(settings)).write(write)
    except LoadFailed as fault:
        typer.echo(f"refused: {fault.reason}: {fault}", err=True)
        return REFUSED
    typer.echo(f"wrote {write}" if write else f"{settings.model} passes")
    return OK
