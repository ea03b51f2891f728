"""`sightline batch`: caption a folder, a list or a bucket from a terminal; stop it at any time, and go on.

Exit codes: 0 every item has a result · 1 some have none, and are listed · 2 the command was wrong · 42 input or store
cannot be used · 44 another pipeline answers than when it began · 75 no answer for too long · 130, 143 stopped.
"""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sightline.jobs.going import Going
    from sightline.jobs.laptop import Laptop, Order, Standing
    from sightline.jobs.page import Input, Location

DEFAULT_URL = "http://127.0.0.1:8080"
WRONG = 2

batch = typer.Typer(
    help="Caption a folder, a list or a bucket: stop at any time, go on where it stopped, every result once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Url = Annotated[str, typer.Option("--url", envvar="SIGHTLINE_URL", help="Address of the pipeline or predictor.")]
_Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SIGHTLINE_BATCH_STORE",
        help="Where batches are kept until they are whole: a folder, s3://, gs:// or az://. Default: your own folder.",
    ),
]
_Key = Annotated[str | None, typer.Option("--api-key", envvar="SIGHTLINE_API_KEY", help="Better in the environment.")]
_Width = Annotated[int, typer.Option("--max-in-flight", min=1, max=1024, help="Images that are asked at once.")]
_Attempts = Annotated[int, typer.Option("--max-attempts", min=1, max=100, help="Of one image, before it has failed.")]
_Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds for one attempt.")]
_Out = Annotated[Path, typer.Option("--out", "-o", help="The results, one line of JSON each. Failures lie beside it.")]
_Again = Annotated[bool, typer.Option("--again", help="Begin anew, though the same command was run before.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over an --out that is not of this batch.")]


@batch.command("run")
def run(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A folder, a .jsonl or .csv list, or s3://, gs://, az://.")
    ],
    out: _Out,
    url: _Url = DEFAULT_URL,
    predictor: Annotated[
        str | None, typer.Option(help="Ask this model of a predictor (KServe V2) instead of a pipeline.")
    ] = None,
    store: _Store = None,
    enhance: Annotated[
        bool | None, typer.Option("--enhance/--no-enhance", help="Default: what the pipeline is set to.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Instead of the pipeline's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one caption.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    reuse: Annotated[bool, typer.Option("--reuse", help="Ask once about images that are the same bytes.")] = False,
    suffix: Annotated[
        list[str] | None, typer.Option(help="Endings of images in a folder; repeatable. Default: .jpg .jpeg .png .webp")
    ] = None,
    max_items: Annotated[int, typer.Option(min=1, help="A folder with more is refused.")] = 1_000_000,
    sidecars: Annotated[bool, typer.Option("--sidecars", help="Also a .txt beside every image.")] = False,
    sidecars_to: Annotated[str | None, typer.Option(help="Or below this folder or address.")] = None,
    existing: Annotated[
        str, typer.Option(help="Of images that have a .txt: skip them, overwrite it, or append to it.")
    ] = "overwrite",
    parquet: Annotated[bool, typer.Option("--parquet", help="Also a table, beside --out.")] = False,
    again: _Again = False,
    overwrite: _Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    width: _Width = 8,
    attempts: _Attempts = 3,
    timeout: _Timeout = 120.0,
    api_key: _Key = None,
) -> None:
    """Caption everything in INPUT. The same command again goes on where it stopped, or says that all is done.

    Ctrl-C finishes what is open and says how to go on; a second one leaves at once. Nothing is lost either way.
    """
    from sightline.jobs.laptop import Order
    from sightline.jobs.page import Location, Options

    place = _input(source, tuple(suffix or ()), max_items)
    generation = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    kind = "openai" if place.format == "OpenAIBatch" else "gateway" if predictor is None else "v2"
    if existing not in ("skip", "overwrite", "append"):
        raise _wrong("--existing is skip, overwrite or append")
    beside = _folder(place) if sidecars or (existing != "overwrite" and sidecars_to is None) else None
    order = Order(
        input=place,
        out=str(out.absolute()),
        url=url,
        kind=kind,
        model=predictor or "describe",
        options=Options(
            enhance="Auto" if enhance is None else "Always" if enhance else "Never",
            prompt=prompt,
            generation={name: value for name, value in generation.items() if value is not None},
            reuse=reuse,
        ),
        sidecars=beside if sidecars_to is None else Location(_address(sidecars_to)),
        existing=existing,
        parquet=parquet,
    )
    if dry_run:
        raise SystemExit(_end(_dry_run(_laptop(store), order)))
    work = _going(store, api_key, width, attempts, timeout)
    raise SystemExit(_end(work.ordered(order, is_anew=again, may_overwrite=overwrite)))


@batch.command("resume")
def resume(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help="As `status` lists it, or its beginning.")],
    url: Annotated[str | None, typer.Option("--url", help="Another address of the same pipeline.")] = None,
    store: _Store = None,
    width: _Width = 8,
    attempts: _Attempts = 3,
    timeout: _Timeout = 120.0,
    api_key: _Key = None,
) -> None:
    """Go on with a batch."""
    work = _going(store, api_key, width, attempts, timeout)
    raise SystemExit(_end(work.resumed(batch_id, url)))


@batch.command("retry")
def retry(
    batch_id: Annotated[str, typer.Argument(metavar="ID")],
    out: _Out,
    only: Annotated[str, typer.Option(help="failed; unenhanced: also captions that were not enhanced.")] = "failed",
    url: Annotated[str | None, typer.Option("--url", help="Default: as the batch was asked.")] = None,
    store: _Store = None,
    again: _Again = False,
    overwrite: _Overwrite = False,
    width: _Width = 8,
    attempts: _Attempts = 3,
    timeout: _Timeout = 120.0,
    api_key: _Key = None,
) -> None:
    """Do the failed items of a batch once more, as a batch of their own."""
    if only not in ("failed", "unenhanced"):
        raise _wrong("--only is failed or unenhanced")
    work = _going(store, api_key, width, attempts, timeout)
    chosen: Literal["Failed", "Unenhanced"] = "Failed" if only == "failed" else "Unenhanced"
    raise SystemExit(
        _end(work.retried(batch_id, str(out.absolute()), chosen, url, is_anew=again, may_overwrite=overwrite))
    )


@batch.command("status")
def status(
    batch_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: all.")] = None,
    store: _Store = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one line of JSON a batch.")] = False,
) -> None:
    """Say how far batches are."""
    raise SystemExit(_end(_status(_laptop(store), batch_id, as_json=as_json)))


@batch.command("cancel")
def cancel(batch_id: Annotated[str, typer.Argument(metavar="ID")], store: _Store = None) -> None:
    """End a batch: what is done is written to its files, the rest is listed as `batch_cancelled`."""
    raise SystemExit(_end(_cancel(_laptop(store), batch_id)))


# --- words to values -------------------------------------------------------------------------------------------------


def _input(source: str, suffixes: tuple[str, ...], max_items: int) -> "Input":
    """What INPUT is. Raises BadParameter when it is nothing that batches take."""
    from sightline.jobs.page import Input, Location

    url = _address(source)
    ending = url.rsplit("/", 1)[-1].lower()
    is_file = url.startswith("file://") and Path(url.removeprefix("file://")).is_file()
    if ending.endswith((".jsonl", ".ndjson")):
        is_openai = is_file and _is_openai(Path(url.removeprefix("file://")))
        return Input("manifest", Location(url), format="OpenAIBatch" if is_openai else "JSONL")
    if ending.endswith((".csv", ".tsv")):
        return Input("manifest", Location(url), format="CSV")
    if is_file:
        raise _wrong(f"{source} is one file: give its folder, a .jsonl or .csv list, or use `sightline caption`")
    if url.startswith("file://") and not Path(url.removeprefix("file://")).is_dir():
        raise _wrong(f"{source}: there is no such folder or file")
    place = Input("prefix", Location(url), max_items=max_items)
    if not suffixes:
        return place
    from dataclasses import replace

    return replace(place, suffixes=tuple(end if end.startswith(".") else f".{end}" for end in suffixes))


def _folder(images: "Input") -> "Location":
    """Where sidecars beside the images begin: a list and a prefix such as `photos/2024-` are in a folder, and none."""
    from sightline.jobs.page import Location

    url = images.location.url
    is_folder = images.kind == "prefix" and (url.startswith("file://") or url.endswith("/"))
    bucket = "/".join(url.split("/", 3)[:3])  # with nothing behind it, the bucket is the folder
    return images.location if is_folder or url == bucket else Location(url.rpartition("/")[0] + "/")


def _address(place: str) -> str:
    if place.startswith(("s3://", "gs://", "az://", "file://")):
        return place
    if "://" in place:
        raise _wrong(f"{place.partition('://')[0]}:// is no kind of store that batches know")
    return f"file://{Path(place).absolute()}"


def _is_openai(file: Path) -> bool:
    """Whether the first line of a list is a request as OpenAI's batch API takes it."""
    import orjson

    try:
        with file.open("rb") as lines:
            said = orjson.loads(next((line for line in lines if line.strip()), b"{}"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and {"method", "url", "body"} <= set(cast("dict[str, Any]", said))


def _laptop(store: str | None) -> "Laptop":
    from sightline.jobs.laptop import Laptop
    from sightline.jobs.objects import StoreFault
    from sightline.jobs.page import Location

    try:
        return Laptop(Location(_address(store)) if store else None)
    except StoreFault as error:
        typer.echo(f"sightline: {error}", err=True)
        raise SystemExit(42) from error


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message)


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _end(work: Coroutine[Any, Any, int]) -> int:
    """Run to its exit code, faults included."""
    from sightline.jobs import going

    return asyncio.run(going.code_of(work, _console()))


def _going(store: str | None, api_key: str | None, width: int, attempts: int, timeout: float) -> "Going":
    from sightline.jobs.going import Going

    laptop = _laptop(store)
    return Going(laptop, _console(), api_key=api_key, width=width, attempts=attempts, timeout_seconds=timeout)


# --- commands that ask nobody ----------------------------------------------------------------------------------------


async def _dry_run(laptop: "Laptop", order: "Order") -> int:
    from sightline.jobs.inputs import has_caption, items_of
    from sightline.jobs.laptop import CHUNK_SIZE
    from sightline.jobs.screen import size
    from sightline.jobs.stores import Stores

    items = skipped = total = 0
    skip = await has_caption(laptop.preview(order)) if order.existing == "skip" else None
    async for item in items_of(order.input, Stores(order.input.location, uploads=laptop.objects)):
        if skip is not None and skip(item):
            skipped += 1
        else:
            items, total = items + 1, total + (item.size or 0)
    typer.echo(f"{order.id}: {items:,} items, {size(total)}, in chunks of {CHUNK_SIZE}, to {order.url}")
    if skipped:
        typer.echo(f"{skipped:,} more have a caption and would be skipped")
    typer.echo(f"would write {order.out}")
    return 0


async def _status(laptop: "Laptop", batch_id: str | None, *, as_json: bool) -> int:
    import orjson

    if batch_id is not None:
        found = [await laptop.standing(await laptop.find(batch_id))]
    else:
        found = [standing async for standing in laptop.standings()]
    for standing in found:
        if as_json:
            sys.stdout.buffer.write(orjson.dumps(_told(standing), option=orjson.OPT_APPEND_NEWLINE))
        else:
            typer.echo(_sentence(standing))
    if not found and not as_json:
        typer.echo("There are no batches here.")
    return 0


def _told(standing: "Standing") -> dict[str, Any]:
    batch = standing.batch
    progress = standing.progress.to_json() if standing.progress else None
    return {"id": batch.id, "status": standing.word, "out": batch.order.out, "created": batch.created} | (
        progress or {}
    )


def _sentence(standing: "Standing") -> str:
    batch, progress = standing.batch, standing.progress
    far = "" if progress is None else f"  {progress.done:,} of {progress.total:,}"
    failed = f"  {progress.counts.failed:,} failed" if progress and progress.counts.failed else ""
    return f"{batch.id}  {standing.word}{far}{failed}  {batch.order.out}"


async def _cancel(laptop: "Laptop", batch_id: str) -> int:
    from sightline.jobs.going import Going

    return await Going(laptop, _console()).cancelled(batch_id)
