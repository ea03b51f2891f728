"""VisionPipelines and VisionBatches for tests: the smallest that are valid, and changes to them by dotted paths."""

import copy
from typing import Any

GONE = object()
"""As a value in `changed`: the field is left out."""


def pipeline(changes: dict[str, Any] | None = None, name: str = "docs", namespace: str = "default") -> dict[str, Any]:
    """A caption→enhance pipeline of demonstration models; `{"caption.timeout": "5s"}` changes below spec."""
    spec = {
        "caption": {"inferenceService": {}},
        "enhance": {"inferenceService": {}},
        "gateway": {"auth": {"none": True}},
    }
    return _object("VisionPipeline", name, namespace, changed(spec, changes or {}))


def batch(changes: dict[str, Any] | None = None, name: str = "night", namespace: str = "default") -> dict[str, Any]:
    """A batch of a bucket's images; `{"chunkSize": 10}` changes below spec."""
    spec = {
        "pipelineRef": {"name": "docs"},
        "input": {"s3Prefix": {"bucket": "images", "prefix": "inbox/"}},
        "output": {"s3": {"bucket": "captions"}},
    }
    return _object("VisionBatch", name, namespace, changed(spec, changes or {}))


def changed(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with each path set, objects on the way made as needed, or left out where the value is GONE."""
    answer = copy.deepcopy(value)
    for path, new in changes.items():
        *parents, last = path.split(".")
        place = answer
        for parent in parents:
            place = place.setdefault(parent, {})
        if new is GONE:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(new)
    return answer


def _object(kind: str, name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "sightline.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
