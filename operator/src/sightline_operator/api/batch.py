"""VisionBatch: very many images through a pipeline, planned, run in shards and finished."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .types import (
    AnnotationValue,
    Condition,
    DnsLabel,
    DnsName,
    Duration,
    FieldPath,
    Generation,
    LabelValue,
    Object,
    PodTemplateOverrides,
    PositiveDuration,
    Reference,
    Resources,
    Rule,
    S3Location,
    S3Store,
    Time,
    exactly_one,
    immutable,
    keyed_by,
    ruled,
)

MAX_ITEMS = 10_000_000
MAX_SHARDS = 10_000

# --- the spec --------------------------------------------------------------------------------------------------------


class PipelineRef(Reference):
    """A VisionPipeline in the namespace of this object."""

    name: DnsLabel = Field(description="Name of the VisionPipeline.")


class S3Prefix(S3Location):
    """Every object below a prefix of a bucket."""

    suffixes: tuple[FieldPath, ...] = Field(
        default=(".jpg", ".jpeg", ".png", ".webp"),
        max_length=16,
        description="Endings of the keys that are taken, in lower case; upper case counts as well.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    max_items: int = Field(
        default=1_000_000,
        ge=1,
        le=MAX_ITEMS,
        description="More objects than this are InputTooLarge, before anything is spent.",
    )


class Manifest(S3Store):
    """A file that lists the items. Where nothing is said of its store, that is the output's."""

    uri: str = Field(max_length=1024, pattern=r"^s3://[^/\s]+/[^\s]+$", description="The file, as `s3://bucket/key`.")
    format: Literal["JSONL", "CSV", "OpenAIBatch"] = Field(
        default="JSONL",
        description="JSONL: an object a line with `uri` and `custom_id`. CSV: the same as columns. OpenAIBatch: lines "
        "as OpenAI's batch API takes them. Images that it names lie in its store.",
    )


class Upload(Object):
    """A file that was uploaded to the gateway, and lies in the pipeline's storage."""

    file_id: str = Field(max_length=128, pattern=r"^[-_A-Za-z0-9]+$", description="Its id, as the upload answered it.")


class RetryOf(Object):
    """Items of an earlier batch once more, when that has ended."""

    batch_name: DnsLabel = Field(description="Name of the VisionBatch, in the namespace of this object.")
    only: Literal["Failed", "Unenhanced"] = Field(
        default="Failed",
        description="Failed: items without a caption. Unenhanced: those whose enhancement failed, too.",
    )


class Input(Object):
    """Where the items of a batch come from."""

    rules = (
        Rule(
            exactly_one("s3Prefix", "manifest", "upload", "retryOf"),
            "input: exactly one of s3Prefix, manifest, upload and retryOf must be set",
        ),
    )
    s3_prefix: S3Prefix | None = Field(default=None, description="Every object below a prefix of a bucket.")
    manifest: Manifest | None = Field(default=None, description="A file that lists the items.")
    upload: Upload | None = Field(default=None, description="A file that was uploaded to the gateway.")
    retry_of: RetryOf | None = Field(default=None, description="Items of an earlier batch once more.")


class Output(Object):
    """Where a batch writes, and what it does with that in the end."""

    rules = (
        Rule(
            "self.existing == 'Overwrite' || has(self.sidecars)",
            "output.existing needs output.sidecars: it says what happens to files that are there",
            ".existing",
        ),
    )
    s3: S3Location | None = Field(
        default=None,
        description="Bucket and prefix; the plan, the parts and the results lie below it. Unset: `batches/` in the "
        "storage of the pipeline. In the bucket of that storage progress is told by the item, elsewhere by the shard.",
    )
    merge: Literal["Auto", "Never", "Always"] = Field(
        default="Auto",
        description="Whether the parts are joined into one results.jsonl and errors.jsonl. Auto: up to 100,000 items.",
    )
    parquet: bool = Field(default=False, description="true: results.parquet beside the JSONL.")
    sidecars: S3Location | None = Field(
        default=None,
        description="Where a `.txt` with the caption is written for every image, under the image's own key; the bucket "
        "and prefix of the input: beside the images. Unset: nowhere.",
    )
    existing: Literal["Skip", "Overwrite", "Append"] = Field(
        default="Overwrite",
        description="What becomes of an image that has such a file already. Skip: it is left out of the plan. "
        "Overwrite: the file is written anew. Append: the caption is added to it.",
    )
    deletion_policy: Literal["Retain"] = Field(
        default="Retain",
        description="What happens to the outputs when this object is deleted: they stay. Deleting them would take a "
        "finalizer, on which a namespace can hang; a lifecycle rule of the bucket does it as well.",
    )


class BatchOptions(Object):
    """What is asked about every image."""

    enhance: Literal["Never", "Auto", "Always"] = Field(
        default="Auto",
        description="Whether captions are enhanced. Auto: as the pipeline does when a request does not say.",
    )
    prompt: str | None = Field(
        default=None, min_length=1, max_length=8192, description="Words sent with every image; unset: the pipeline's."
    )
    generation: Generation = Field(
        default=Generation(), description="How tokens are chosen; unset: the pipeline's way."
    )
    reuse: bool = Field(
        default=False, description="true: images with the same bytes are asked about once in this batch."
    )


class ItemRetry(Object):
    """Further attempts at an item whose failure may pass."""

    max_attempts: int = Field(default=3, ge=1, le=20, description="Attempts at one item in all.")


class MaxFailedItems(Object):
    """How many items may fail before the batch stops early."""

    rules = (Rule(exactly_one("count", "percent"), "maxFailedItems: exactly one of count and percent must be set"),)
    count: int | None = Field(default=None, ge=0, le=MAX_ITEMS, description="This many items.")
    percent: int | None = Field(default=None, ge=0, le=100, description="Per cent of all items.")


_SIZES = Rule("self.chunkSize <= self.shardSize", "chunkSize must not be larger than shardSize", ".chunkSize")
_MIN_PARALLELISM = Rule(
    "!has(self.minParallelism) || self.minParallelism <= self.parallelism",
    "minParallelism must not be larger than parallelism",
    ".minParallelism",
)
_NEEDS_QUEUE = Rule(
    "!has(self.minParallelism) || has(self.queueName)", "minParallelism needs queueName", ".minParallelism"
)


class BatchWork(Object):
    """What a batch is, but for the pipeline that does it."""

    rules = (_SIZES, _MIN_PARALLELISM, _NEEDS_QUEUE)
    input: Input = Field(description="Which images.")
    output: Output = Field(default=Output(), description="Where results go.")
    options: BatchOptions = Field(default=BatchOptions(), description="What is asked about every image.")
    parallelism: int = Field(
        default=4, ge=1, le=1000, description="Worker pods at once. They need no GPU: the pipeline does."
    )
    max_in_flight_per_worker: int = Field(
        default=16,
        ge=1,
        le=1000,
        description="Requests that one worker has open at most; it finds the useful number below that.",
    )
    shard_size: int = Field(
        default=1000, ge=1, le=100_000, description="Items of one shard, which is one index of the Job."
    )
    chunk_size: int = Field(
        default=50, ge=1, le=10_000, description="Items of one output object, and what a killed worker has to do again."
    )
    item_retry: ItemRetry = Field(
        default=ItemRetry(), description="Further attempts at an item whose failure may pass."
    )
    max_failed_items: MaxFailedItems | None = Field(
        default=None, description="How many items may fail before the batch stops early; unset: all."
    )
    completion_window: PositiveDuration | None = Field(
        default=None,
        description="Time from creation after which the batch expires. What is finished is kept; unset: none.",
    )
    queue_name: DnsName | None = Field(
        default=None, description="LocalQueue of Kueue that admits the work; unset: no queue."
    )
    priority_class_name: DnsName | None = Field(default=None, description="PriorityClass of the worker pods.")
    min_parallelism: int | None = Field(
        default=None, ge=1, le=1000, description="With a queue: the number of workers that is worth starting with."
    )
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="How long after its end this object is deleted; unset: kept. Its outputs stay.",
    )
    on_pipeline_change: Literal["Fail", "Pause"] = Field(
        default="Fail",
        description="What happens when the pipeline changes what it answers while the batch runs, since one batch "
        "never holds results of two revisions. Pause: it waits until the old revision is back.",
    )
    resources: Resources = Field(default=Resources(), description="CPU and memory of one worker.")
    pod_template_overrides: PodTemplateOverrides = None
    dry_run: bool = Field(default=False, description="true: plan and count only; no image is sent to the pipeline.")


class TemplateMetadata(Object):
    """Labels and annotations of the VisionBatches that are made."""

    labels: dict[str, LabelValue] = Field(default={}, max_length=32, description="Labels that it gets.")
    annotations: dict[str, AnnotationValue] = Field(default={}, max_length=32, description="Annotations that it gets.")


class BatchTemplate(Object):
    """What a VisionBatch made from a VisionPipeline says."""

    metadata: TemplateMetadata = Field(default=TemplateMetadata(), description="Labels and annotations that it gets.")
    spec: BatchWork = Field(description="Its spec; pipelineRef is the pipeline that makes it.")


class Batch(BatchWork):
    """What a VisionBatch is to do."""

    rules = (
        _SIZES,
        _MIN_PARALLELISM,
        _NEEDS_QUEUE,
        Rule(
            "has(self.queueName) == has(oldSelf.queueName) && "
            "(!has(self.queueName) || self.queueName == oldSelf.queueName)",
            "queueName is immutable: make a new VisionBatch instead",
            ".queueName",
        ),
    )
    pipeline_ref: PipelineRef = Field(
        description="VisionPipeline that does the work.", json_schema_extra=immutable("pipelineRef")
    )
    input: Input = Field(description="Which images. Immutable.", json_schema_extra=immutable("input"))
    output: Output = Field(
        default=Output(), description="Where results go. Immutable.", json_schema_extra=immutable("output")
    )
    options: BatchOptions = Field(
        default=BatchOptions(),
        description="What is asked about every image. Immutable.",
        json_schema_extra=immutable("options"),
    )
    shard_size: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Items of one shard, which is one index of the Job. Immutable.",
        json_schema_extra=immutable("shardSize"),
    )
    chunk_size: int = Field(
        default=50,
        ge=1,
        le=10_000,
        description="Items of one output object, and what a killed worker has to do again. Immutable.",
        json_schema_extra=immutable("chunkSize"),
    )
    desired_state: Literal["Running", "Paused", "Cancelled"] = Field(
        default="Running",
        description="Paused: workers stop, and go on where they were when it is Running again. Cancelled: for good; "
        "what is finished is kept.",
        json_schema_extra=ruled(
            Rule(
                "oldSelf != 'Cancelled' || self == 'Cancelled'",
                "desiredState cannot leave Cancelled: make a new VisionBatch",
            )
        ),
    )


# --- the status ------------------------------------------------------------------------------------------------------


class Progress(Object):
    """How far it is. Counts are of items."""

    total: int | None = Field(default=None, ge=0, description="Items of the plan.")
    succeeded: int | None = Field(default=None, ge=0, description="Items with a caption.")
    failed: int | None = Field(default=None, ge=0, description="Items without one, for good.")
    unenhanced: int | None = Field(default=None, ge=0, description="Succeeded ones whose enhancement failed.")
    remaining: int | None = Field(default=None, ge=0, description="Items that are still to be done.")
    percent: int | None = Field(default=None, ge=0, le=100, description="Of all items, done for better or worse.")
    bytes: int | None = Field(default=None, ge=0, description="Bytes of the images that were read.")
    done: str | None = Field(
        default=None,
        max_length=64,
        description="Done of all, such as `640/1000`; `~600/1000` where only shards are counted.",
    )


class Shards(Object):
    """The shards, which are the indexes of the Job."""

    total: int | None = Field(default=None, ge=0, le=MAX_SHARDS, description="Shards of the plan.")
    completed: int | None = Field(default=None, ge=0, description="Shards that are done.")
    active: int | None = Field(default=None, ge=0, description="Shards that a worker has now.")
    failed: int | None = Field(default=None, ge=0, description="Shards that were given up.")


class Throughput(Object):
    """How fast it goes."""

    items_per_second: str | None = Field(default=None, max_length=32, description="Items a second, such as `12.4`.")
    window: str | None = Field(default=None, max_length=32, description="Time that this is the mean of, such as `5m`.")


class BatchUsage(Object):
    """Tokens that were spent."""

    prompt_tokens: int | None = Field(default=None, ge=0, description="Tokens that were read, image tokens included.")
    completion_tokens: int | None = Field(default=None, ge=0, description="Tokens that were written.")


class Outputs(Object):
    """Where the results are."""

    manifest: str | None = Field(
        default=None, max_length=2048, description="Object that lists all parts, as s3:// URI."
    )
    results: str | None = Field(
        default=None, max_length=2048, description="All results in one file, where they are merged."
    )
    errors: str | None = Field(
        default=None, max_length=2048, description="All errors in one file, where they are merged."
    )


class Retried(Object):
    """The batch that spec.input.retryOf names, as it was when planning began."""

    output: S3Location = Field(description="Where its plan, parts and results lie.")
    images: S3Location | None = Field(default=None, description="Where the images lie that it named.")
    format: Literal["JSONL", "OpenAIBatch"] = Field(default="JSONL", description="What its items are.")


class FailureCount(Object):
    """Items that failed in the same way."""

    step: str = Field(max_length=32, description="Step that failed: fetch, decode, caption, enhance or write.")
    code: str = Field(max_length=64, description="Code of the failure.")
    count: int = Field(ge=0, description="This many items.")
    sample_custom_id: str | None = Field(default=None, max_length=512, description="One of them.")


class Jobs(Object):
    """The Jobs of this batch."""

    plan: str | None = Field(
        default=None, max_length=253, description="Job that lists the items and cuts them into shards."
    )
    run: str | None = Field(default=None, max_length=253, description="Job that does them.")
    finish: str | None = Field(
        default=None, max_length=253, description="Job that checks that every item is there once."
    )


class BatchStatus(Object):
    """How a VisionBatch is, and why."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this status is about."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(),
        max_length=16,
        description="Planned, Admitted, Progressing, Stalled, and at the end Complete or Failed.",
        json_schema_extra=keyed_by("type"),
    )
    state: str | None = Field(default=None, max_length=32, description="All conditions in one word, for display only.")
    fingerprint: str | None = Field(
        default=None,
        max_length=64,
        description="Hash of everything that decides the results; part of the keys of the outputs.",
    )
    pipeline_revision: str | None = Field(
        default=None, max_length=64, description="Revision of the pipeline that the batch holds to."
    )
    output: S3Location | None = Field(default=None, description="Where it writes: what its keys begin with.")
    retry_of: Retried | None = Field(
        default=None, description="The batch that spec.input.retryOf names, as it was when planning began."
    )
    planned_time: Time = Field(default=None, description="When the plan was there.")
    start_time: Time = Field(default=None, description="When the first worker started.")
    completion_time: Time = Field(default=None, description="When it ended, for better or worse.")
    expires_time: Time = Field(default=None, description="When it expires unless it is finished.")
    progress: Progress | None = Field(default=None, description="How far it is.")
    shards: Shards | None = Field(default=None, description="How the shards are.")
    throughput: Throughput | None = Field(default=None, description="How fast it goes.")
    estimated_completion_time: Time = Field(
        default=None, description="When it will be done at this rate; unset: not known."
    )
    eta: str | None = Field(default=None, max_length=32, description="Time until then, such as `1h12m`.")
    last_progress_time: Time = Field(default=None, description="When an item was last finished.")
    usage: BatchUsage | None = Field(default=None, description="Tokens that were spent.")
    outputs: Outputs | None = Field(default=None, description="Where the results are.")
    failure_summary: tuple[FailureCount, ...] = Field(
        default=(),
        max_length=16,
        description="The most frequent failures. Each single one is in the errors of the outputs.",
        json_schema_extra=keyed_by("step", "code"),
    )
    jobs: Jobs | None = Field(default=None, description="The Jobs of this batch.")
    workload: str | None = Field(default=None, max_length=253, description="Kueue's Workload of the run.")
