"""`sightline fit`: which model fits which device, in which type, with how many sequences at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sightline.memory import (
    FLOATS,
    PROFILES,
    TEXT_TOKENS,
    Anatomy,
    Estimate,
    Load,
    Profile,
    Scheme,
    as_json,
    bytes_of,
    estimate,
    load_of,
    table,
)
from sightline.models.published import PUBLISHED
from sightline.settings import BlipSettings, DescribeSettings, EmbedSettings, EnhanceSettings, GenerateSettings

if TYPE_CHECKING:
    from sightline.settings import EngineSettings

OK, TOO_SMALL, WRONG = 0, 1, 2

SETTINGS: dict[str, "type[EngineSettings]"] = {
    "describe": DescribeSettings,
    "generate": GenerateSettings,
    "embed": EmbedSettings,
    "enhance": EnhanceSettings,
    "blip": BlipSettings,
}
_PREDICTORS = {
    "qwen2_vl": "describe",
    "qwen2_5_vl": "describe",
    "kimi_vl": "generate",
    "colqwen": "embed",
    "gpt_oss": "enhance",
    "blip": "blip",
}

FROM = (
    "Computed: parameters counted on the model's own classes, times the bytes of their type; the cache from heads and "
    "layers; activations by formulas held against peaks that were measured on a CPU (docs/fit.md).\n"
    "Assumed, not measured: a GPU's overhead."
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command may say of the load; None: as the predictor's settings have it."""

    concurrency: int | None = None
    context: int | None = None
    width: int | None = None
    images: int = 1
    text_tokens: int = TEXT_TOKENS


def predictor_of(anatomy: Anatomy) -> str:
    """Which predictor serves a model."""
    return _PREDICTORS[anatomy.kind]


def load_for(anatomy: Anatomy, wish: Wish = Wish(), settings: "EngineSettings | None" = None) -> Load:
    """The load of a predictor: a wish first, then its settings, then their defaults."""
    kind = SETTINGS[predictor_of(anatomy)]

    def of(name: str) -> Any:  # noqa: ANN401
        if settings is not None:
            return getattr(settings, name, None)
        return kind.model_fields[name].default if name in kind.model_fields else None

    made = load_of(
        anatomy,
        concurrency=wish.concurrency or of("max_batch"),
        new_tokens=of("max_tokens") or 0,
        width=wish.width or of("max_width"),
        text_tokens=wish.text_tokens,
        images=wish.images,
        batch_tokens=of("max_batch_tokens"),
    )
    return made if wish.context is None else replace(made, context=wish.context, prompt=min(made.prompt, wish.context))


def estimates(
    anatomy: Anatomy, profile: Profile, schemes: Sequence[Scheme], wish: Wish, dtype: str = "bfloat16"
) -> list[Estimate]:
    """One for each way in which the weights may be held."""
    load = load_for(anatomy, wish)
    return [estimate(anatomy, scheme, load, profile, dtype) for scheme in schemes]


def fit(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder with a config.json, or a published model's id; default: all those."),
    ] = None,
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "gpu-1x24",
    memory: Annotated[str | None, typer.Option(help="Instead of a profile: what a GPU has, such as 24GiB.")] = None,
    device: Annotated[str, typer.Option(help="With --memory: cuda or cpu.")] = "cuda",
    quantization: Annotated[str | None, typer.Option(help="8bit, 4bit, mxfp4 or none; default: each.")] = None,
    dtype: Annotated[str, typer.Option(help="Floating type of what is not quantised.")] = "bfloat16",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Sequences at once; default: max_batch.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence; default: by the settings.")] = None,
    max_width: Annotated[
        int | None, typer.Option(min=28, help="Images are resized to it; default: the setting's.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Of one prompt.")] = 1,
    as_json_: Annotated[bool, typer.Option("--json", help="For programs; bytes.")] = False,
) -> None:
    """Say what a model takes and whether it fits: exit 0 when it does in one of the ways shown, 1 when in none.

    Without a model: exit 0 when each published one fits in one way. 2: the command was wrong.
    """
    try:
        where = _profile(profile, memory, device)
        wish = Wish(concurrency, context, max_width, images)
        names = [model] if model else list(PUBLISHED)
        found = [_of_model(name, where, wish, quantization, dtype) for name in names]
    except ValueError as error:
        typer.echo(f"sightline fit: {error}", err=True)
        raise SystemExit(WRONG) from error
    rows = [(anatomy.name, made) for anatomy, all_made in found for made in all_made]
    fits = all(any(made.fits for made in all_made) for _, all_made in found)
    if as_json_:
        said = [
            {
                "model": anatomy.name,
                "predictor": predictor_of(anatomy),
                "parameters": anatomy.parameters,
                **as_json(made),
            }
            for anatomy, all_made in found
            for made in all_made
        ]
        typer.echo(json.dumps({"fits": fits, "from": FROM, "estimates": said}, indent=2))
    else:
        typer.echo(table(rows))
        typer.echo(f"\n{FROM}")
    raise SystemExit(OK if fits else TOO_SMALL)


def _of_model(
    name: str, profile: Profile, wish: Wish, quantization: str | None, dtype: str
) -> tuple[Anatomy, list[Estimate]]:
    from sightline.models.anatomy import anatomy_of
    from sightline.models.loading import LoadFailed

    if dtype not in FLOATS:
        raise ValueError(f"--dtype must be one of {', '.join(FLOATS)}")
    try:
        anatomy = anatomy_of(name)
    except LoadFailed as error:
        raise ValueError(str(error)) from error
    schemes = _schemes(anatomy, quantization, dtype)
    return anatomy, estimates(anatomy, profile, schemes, wish, dtype)


def _schemes(anatomy: Anatomy, quantization: str | None, dtype: str) -> Sequence[Scheme]:
    if quantization is None:
        return anatomy.schemes
    if quantization == "none":
        return (cast("Scheme", dtype),)
    if quantization in FLOATS or quantization not in anatomy.schemes:
        ways = [scheme for scheme in anatomy.schemes if scheme not in FLOATS]
        raise ValueError(f"{anatomy.name} is held as {', '.join([*ways, 'none'])}, not as {quantization}")
    return (quantization,)


def _profile(name: str, memory: str | None, device: str) -> Profile:
    if device not in ("cuda", "cpu"):
        raise ValueError("--device must be cuda or cpu")
    if memory is not None:
        return Profile(bytes_of(memory), "cuda" if device == "cuda" else "cpu")
    if name not in PROFILES:
        raise ValueError(f"no profile {name}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
