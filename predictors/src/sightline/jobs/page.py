"""What a batch is told at its start: the page that all its workers read, whoever wrote it. Pure.

On a cluster the operator writes it (a ConfigMap, `$BATCH_FILE`; `render/v1/batch.py` of the operator), on a laptop
`sightline batch` does, in a server the async routes and OpenAI's do.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import orjson

OUTPUT_SCHEMA = 1
"""Of a result line; part of the fingerprint, so that no batch holds lines of two shapes."""
FINGERPRINT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Location:
    """A prefix of a store.

    url          `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///folder`, `memory://`
    endpoint     of a store that only speaks S3; None: AWS
    credentials  folder with the files `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` (and `AWS_SESSION_TOKEN`), or with a
                 file `credentials` as boto3 reads it; None: the usual chain
    """

    url: str
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    credentials: Path | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Who does an item.

    url            base URL of the gateway or of one predictor
    kind           gateway: POST /caption · v2: POST /v2/models/<model>/infer of one predictor · openai: the item's own
                   url and body below it
    revision       that the answers must have, None when nobody knows: a target whose header says another is exit 44
    timeout_seconds for one item's one attempt
    """

    url: str
    kind: Literal["gateway", "v2", "openai"] = "gateway"
    model: str = "describe"
    revision: str | None = None
    api_key_file: Path | None = None
    timeout_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Input:
    """Where the items come from: exactly one kind.

    prefix       every object below `location`, with `suffixes`, at most `max_items`
    manifest     the file at `location.url`, JSONL, CSV or OpenAIBatch
    upload       a file that was uploaded to the gateway: `location` is its key; read as OpenAIBatch or JSONL
    retry_of     `only` those items of an earlier batch, whose root (`<prefix>/<uid>/<fingerprint>/`) is `location`

    images       the store of the images that a retry_of names; None: that of `location`
    """

    kind: Literal["prefix", "manifest", "upload", "retry_of"]
    location: Location
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp")
    max_items: int = 1_000_000
    format: Literal["JSONL", "CSV", "OpenAIBatch"] = "JSONL"
    only: Literal["Failed", "Unenhanced"] = "Failed"
    images: Location | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked about every image; None: the pipeline's way."""

    enhance: Literal["Never", "Auto", "Always"] = "Auto"
    prompt: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    reuse: bool = False


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is made in the end.

    merge     join the parts into results.jsonl and errors.jsonl; Auto: up to 100,000 items
    sidecars  a `.txt` beside every image, or below this location with the image's key
    parquet   results.parquet beside the JSONL
    existing  what happens to an image that has a sidecar: skip it (while planning), overwrite or append to the sidecar
    """

    location: Location
    merge: Literal["Auto", "Never", "Always"] = "Auto"
    sidecars: Location | None = None
    parquet: bool = False
    existing: Literal["skip", "overwrite", "append"] = "overwrite"


@dataclass(frozen=True, slots=True)
class Page:
    """A batch as its workers know it.

    name, uid          of the VisionBatch, or of the laptop's or the server's batch; uid is in the keys
    fingerprint        12 hexadecimal digits, in the keys
    max_failed_items   count, or None; `max_failed_percent` likewise: more end the batch early (TooManyFailures)
    """

    name: str
    uid: str
    fingerprint: str
    input: Input
    outputs: Outputs
    target: Target
    options: Options = Options()
    shard_size: int = 1000
    chunk_size: int = 50
    max_in_flight: int = 16
    max_attempts: int = 3
    max_failed_items: int | None = None
    max_failed_percent: int | None = None
    dry_run: bool = False


def fingerprint(revision: str | None, options: Options) -> str:
    """12 hexadecimal digits over what decides the results, for batches that no operator made."""
    decides = {
        "revision": revision,
        "enhance": options.enhance,
        "prompt": options.prompt,
        "generation": dict(options.generation),
        "schema": OUTPUT_SCHEMA,
    }
    return hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS)).hexdigest()[:FINGERPRINT_DIGITS]


def read_page(text: str | bytes) -> Page:
    """The operator's `batch.json`. Raises ValueError, with what is wrong, when it is no such page."""
    try:
        return _page(cast("Mapping[str, Any]", orjson.loads(text)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a batch page: {error!r}") from error


def _page(said: Mapping[str, Any]) -> Page:
    batch, pipeline, credentials = said["batch"], said["pipeline"], said.get("credentials") or {}
    limit = said.get("maxFailedItems") or {}
    return Page(
        name=batch["name"],
        uid=batch["uid"],
        fingerprint=said["fingerprint"],
        input=_input(said["input"], credentials),
        outputs=_outputs(said["output"], credentials),
        target=Target(
            url=pipeline["url"],
            kind="openai" if _is_openai(said["input"]) else "gateway",
            revision=pipeline.get("revision"),
            api_key_file=Path(pipeline["apiKeyFile"]) if pipeline.get("apiKeyFile") else None,
            timeout_seconds=float(pipeline.get("timeoutSeconds", 120)),
        ),
        options=_options(said.get("options") or {}),
        shard_size=int(said["shardSize"]),
        chunk_size=int(said["chunkSize"]),
        max_in_flight=int(said["maxInFlight"]),
        max_attempts=int(said["maxAttempts"]),
        max_failed_items=limit.get("count"),
        max_failed_percent=limit.get("percent"),
        dry_run=bool(said.get("dryRun", False)),
    )


def _is_openai(said: Mapping[str, Any]) -> bool:
    listed = said.get("manifest") or said.get("retryOf") or {}
    return "upload" in said or listed.get("format") == "OpenAIBatch"


def _input(said: Mapping[str, Any], credentials: Mapping[str, str]) -> Input:
    mounted = credentials.get("input")
    if (s3 := said.get("s3Prefix")) is not None:
        return Input(
            "prefix",
            _s3(s3, mounted),
            suffixes=tuple(s3.get("suffixes", (".jpg", ".jpeg", ".png", ".webp"))),
            max_items=int(s3.get("maxItems", 1_000_000)),
        )
    if (manifest := said.get("manifest")) is not None:
        return Input("manifest", _place(manifest["uri"], manifest, mounted), format=manifest.get("format", "JSONL"))
    if (upload := said.get("upload")) is not None:
        return Input("upload", _s3(upload["s3"], mounted), format="OpenAIBatch")
    retry = said["retryOf"]
    images = _s3(retry["images"], credentials.get("images")) if retry.get("images") else None
    return Input("retry_of", _s3(retry["s3"], mounted), only=retry.get("only", "Failed"), images=images)


def _outputs(said: Mapping[str, Any], credentials: Mapping[str, str]) -> Outputs:
    sidecars = said.get("sidecars")
    return Outputs(
        location=_s3(said["s3"], credentials.get("output")),
        merge=said.get("merge", "Auto"),
        sidecars=_s3(sidecars, credentials.get("sidecars")) if sidecars else None,
        parquet=bool(said.get("parquet", False)),
        existing=_EXISTING[said.get("existing", "Overwrite")],
    )


_EXISTING: Mapping[str, Literal["skip", "overwrite", "append"]] = {
    "Skip": "skip",
    "Overwrite": "overwrite",
    "Append": "append",
}


def _options(said: Mapping[str, Any]) -> Options:
    return Options(
        enhance=said.get("enhance", "Auto"),
        prompt=said.get("prompt"),
        generation=said.get("generation") or {},
        reuse=bool(said.get("reuse", False)),
    )


def _s3(said: Mapping[str, Any], credentials: str | None) -> Location:
    return _place(f"s3://{said['bucket']}/{said.get('prefix', '')}", said, credentials)


def _place(url: str, said: Mapping[str, Any], credentials: str | None) -> Location:
    return Location(
        url,
        endpoint=said.get("endpoint"),
        region=said.get("region"),
        path_style=bool(said.get("pathStyle", False)),
        credentials=Path(credentials) if credentials else None,
    )
