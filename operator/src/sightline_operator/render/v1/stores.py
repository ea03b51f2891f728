"""The stores of a batch, by what they are for: output, input, images (of a retry), sidecars. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sightline_operator.api import Batch, Pipeline, S3Location, S3Store
from sightline_operator.api.batch import Manifest as ItemList
from sightline_operator.api.batch import Retried
from sightline_operator.render.errors import RenderError
from sightline_operator.render.names import without_empty

UPLOADS = "uploads/"
BATCHES = "batches/"
"""Below the prefix of the pipeline's storage; the gateway writes to the first (`sightline.jobs.openai.files`)."""

Stores = Mapping[str, S3Location]
_OF_A_STORE = tuple(S3Store.model_fields)


def stores(spec: Batch, pipeline: Pipeline, output: S3Location | None, retried: Retried | None) -> Stores:
    """By name, `output` first; what a batch does not have is not in it.

    output    where it went when planning began, if it has: a pipeline's storage may be another one since
    retried   the batch that spec.input.retryOf names; needed when it names one
    Raises RenderError: something is to be found in a storage that the pipeline does not have.
    """
    output = output or output_of(spec, pipeline)
    found: dict[str, S3Location | None] = {
        "output": output,
        "input": _input(spec, pipeline, output, retried),
        "images": retried.images if retried and spec.input.retry_of else None,
        "sidecars": spec.output.sidecars,
    }
    return {name: s3 for name, s3 in found.items() if s3 is not None}


def output_of(spec: Batch, pipeline: Pipeline) -> S3Location:
    """Where results go. Raises RenderError when neither the batch nor its pipeline says so."""
    return spec.output.s3 or _below_storage(spec, pipeline, BATCHES, "spec.output.s3")


def page_of(spec: Batch, found: Stores, retried: Retried | None) -> dict[str, Any]:
    """`input` and `output` of the page that the workers read (`sightline.jobs.page`)."""
    source = spec.input.model_dump(by_alias=True, exclude_none=True)
    if spec.input.manifest is not None:
        source["manifest"] |= {name: value for name, value in _said(found["input"]).items() if name in _STORE_FIELDS}
    for kind in ("upload", "retryOf"):
        if kind in source:
            source[kind]["s3"] = _said(found["input"])
    if retried is not None and spec.input.retry_of is not None:
        images = {"images": _said(retried.images)} if retried.images else {}
        source["retryOf"] |= {"format": retried.format, **images}
    output = spec.output.model_dump(by_alias=True, exclude_none=True)
    return {"input": source, "output": output | {"s3": _said(found["output"])}}


def service_accounts(found: Iterable[S3Location]) -> list[str]:
    """The names that the cloud gives rights to these stores."""
    return list(dict.fromkeys(s3.service_account_name for s3 in found if s3.service_account_name))


def _input(spec: Batch, pipeline: Pipeline, output: S3Location, retried: Retried | None) -> S3Location:
    source = spec.input
    if source.s3_prefix is not None:
        return source.s3_prefix
    if source.manifest is not None:
        return of_manifest(source.manifest, output)
    if source.upload is not None:
        return _below_storage(spec, pipeline, UPLOADS + source.upload.file_id, "spec.input.upload")
    if retried is None:
        name = source.retry_of.batch_name if source.retry_of else ""
        message = f"VisionBatch {name} is not known, or has no uid and no status.fingerprint yet"
        raise RenderError("spec.input.retryOf.batchName", message)
    return retried.output


def of_manifest(manifest: ItemList, output: S3Location) -> S3Location:
    """The file: its bucket, with its key as prefix. What nothing is said of is as in the output's store."""
    bucket, _, key = manifest.uri.removeprefix("s3://").partition("/")
    says_something = manifest.model_fields_set & set(_OF_A_STORE)
    store = (manifest if says_something else output).model_dump(include=set(_OF_A_STORE), exclude_unset=True)
    return S3Location(bucket=bucket, prefix=key, **store)


def _below_storage(spec: Batch, pipeline: Pipeline, key: str, field: str) -> S3Location:
    if pipeline.storage is None:
        message = f"needs VisionPipeline {spec.pipeline_ref.name} to have a storage"
        raise RenderError(field, message)
    s3 = pipeline.storage.s3
    return S3Location(**s3.model_dump(exclude={"prefix"}, exclude_unset=True), prefix=joined(s3.prefix, key))


def joined(prefix: str, key: str) -> str:
    """A key below a prefix that is a folder, with or without its slashes."""
    folder = prefix.strip("/")
    return f"{folder}/{key}" if folder else key


_STORE_FIELDS = ("endpoint", "region", "pathStyle")


def _said(s3: S3Location) -> dict[str, Any]:
    """As the page has it: what opens it is a folder there, not a Secret."""
    fields = S3Location.model_validate(s3.model_dump()).model_dump(by_alias=True)
    return without_empty({name: fields[name] for name in ("bucket", "prefix", *_STORE_FIELDS)})
