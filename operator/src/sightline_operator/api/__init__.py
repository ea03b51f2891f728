"""The API: VisionPipeline and VisionBatch from one typed source."""

from .batch import Batch, BatchStatus, BatchTemplate, BatchWork
from .definitions import crds, write_crds
from .pipeline import BATCH_NAME_LENGTH, NAME_LENGTH, Pipeline, PipelineStatus
from .reference import json_schemas, reference, write_reference
from .schema import structural
from .types import (
    Condition,
    Generation,
    Object,
    Resources,
    S3Bucket,
    S3Location,
    S3Store,
    SecretKeyRef,
    SecretRef,
    seconds,
)

__all__ = [
    "BATCH_NAME_LENGTH",
    "NAME_LENGTH",
    "Batch",
    "BatchStatus",
    "BatchTemplate",
    "BatchWork",
    "Condition",
    "Generation",
    "Object",
    "Pipeline",
    "PipelineStatus",
    "Resources",
    "S3Bucket",
    "S3Location",
    "S3Store",
    "SecretKeyRef",
    "SecretRef",
    "crds",
    "json_schemas",
    "reference",
    "seconds",
    "structural",
    "write_crds",
    "write_reference",
]
