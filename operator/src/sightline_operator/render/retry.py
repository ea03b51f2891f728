"""A batch whose items another one does once more: where they lie, from the earlier batch's own object. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sightline_operator.api import Batch, S3Location
from sightline_operator.api.batch import Retried
from sightline_operator.render.v1.stores import joined, of_manifest


def retried(cr: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `status.retryOf` of a batch that retries this one says; None while this one has no plan."""
    status, uid = cr.get("status") or {}, cr["metadata"].get("uid")
    spec, mark = Batch.model_validate(cr["spec"]), status.get("fingerprint")
    output = S3Location.model_validate(status["output"]) if "output" in status else spec.output.s3
    if not mark or not uid or output is None:
        return None
    before = Retried.model_validate(status["retryOf"]) if "retryOf" in status else None
    root = output.model_copy(update={"prefix": joined(output.prefix, f"{uid}/{mark}/")})
    answer = Retried(output=root, images=_images(spec, output, before), format=_format(spec, before))
    return answer.model_dump(by_alias=True, exclude_none=True)


def _images(spec: Batch, output: S3Location, before: Retried | None) -> S3Location | None:
    """Where the images lie. Those of an upload are in its lines, or fetched by the gateway."""
    if spec.input.s3_prefix is not None:
        return S3Location(**spec.input.s3_prefix.model_dump(include=set(S3Location.model_fields)))
    if spec.input.manifest is not None:
        return of_manifest(spec.input.manifest, output)
    return before.images if before else None


def _format(spec: Batch, before: Retried | None) -> Literal["JSONL", "OpenAIBatch"]:
    if spec.input.upload is not None or (spec.input.manifest and spec.input.manifest.format == "OpenAIBatch"):
        return "OpenAIBatch"
    return before.format if before else "JSONL"
