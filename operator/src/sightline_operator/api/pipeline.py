"""VisionPipeline: a caption step, an enhance step or none, the gateway before them, and batches that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from .batch import BatchTemplate
from .types import (
    AnnotationValue,
    Argument,
    Condition,
    DnsLabel,
    DnsName,
    Duration,
    FieldPath,
    Generation,
    Image,
    LabelValue,
    Object,
    PodTemplateOverrides,
    PositiveDuration,
    Reference,
    Resources,
    Rule,
    S3Bucket,
    SecretKeyRef,
    Time,
    at_most_one,
    exactly_one,
    keyed_by,
    ruled,
)

NAME_LENGTH = 40
"""Of a VisionPipeline: `<name>-caption-predictor` must stay a DNS label, and KServe joins it with the namespace."""

BATCH_NAME_LENGTH = 52
"""Of a VisionBatch: `<name>-run-<fingerprint>` and the index of a pod must stay within a DNS label."""

# --- a step ----------------------------------------------------------------------------------------------------------


class Model(Object):
    """Which weights are loaded. Neither name nor uri: the small demonstration model that the image carries."""

    rules = (
        Rule(at_most_one("name", "uri"), "model: at most one of name and uri may be set"),
        Rule(
            "!has(self.revision) || has(self.name)", "model.revision needs model.name: a uri says its own", ".revision"
        ),
        Rule("!has(self.tokenSecretRef) || has(self.name)", "model.tokenSecretRef needs model.name", ".tokenSecretRef"),
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        pattern=r"^[^\s]+$",
        description="Hub id such as `Qwen/Qwen2.5-VL-7B-Instruct`, or a folder in the image or in a mounted volume.",
    )
    uri: str | None = Field(
        default=None,
        max_length=1024,
        pattern=r"^[a-z0-9+]+://[^\s]+$",
        description="Where KServe's storage initializer takes the weights from, such as `s3://bucket/path`, "
        "`pvc://claim/path` or `oci://image`.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[^\s]+$",
        description="Commit, tag or branch of a model on the hub.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Token for a model on the hub that wants one."
    )


class Runtime(Object):
    """What runs the model. Neither name nor image: the operator's own image of this step's predictor."""

    rules = (Rule(at_most_one("name", "image"), "runtime: at most one of name and image may be set"),)
    image: Image | None = Field(
        default=None, description="Image to run instead of the operator's, with the same command line."
    )
    name: DnsName | None = Field(
        default=None,
        description="ServingRuntime or ClusterServingRuntime of KServe to run instead of a predictor of Sightline.",
    )
    model_format: str = Field(
        default="huggingface",
        max_length=64,
        pattern=r"^[-A-Za-z0-9._]+$",
        description="Model format that the runtime is asked for, with `name`.",
    )
    protocol: Literal["V2", "OpenAI"] = Field(
        default="V2",
        description="What the runtime speaks: V2 as Sightline's predictors do, or OpenAI (vLLM, huggingfaceserver).",
    )
    path: str = Field(
        default="",
        max_length=256,
        pattern=r"^(/[-A-Za-z0-9._~]+)*$",
        description="What stands before /v1 in its OpenAI routes, such as `/openai` of KServe's huggingfaceserver.",
    )
    served_model: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        pattern=r"^[^\s]+$",
        description="Name of the model in the routes of the runtime; unset: that of Sightline's predictor, or with "
        "`name` that of the InferenceService.",
    )


class GPU(Object):
    """How many GPUs each replica has."""

    resource_name: str = Field(
        default="nvidia.com/gpu",
        max_length=128,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        description="Extended resource that the nodes offer, such as `nvidia.com/gpu` or `nvidia.com/mig-3g.40gb`.",
    )
    count: int = Field(default=0, ge=0, le=64, description="GPUs of one replica; 0: CPU only.")


class Replicas(Object):
    """How many pods hold the model."""

    rules = (Rule("self.min <= self.max", "replicas.min must not be larger than replicas.max", ".min"),)
    min: int = Field(
        default=1, ge=0, le=1000, description="At least so many; 0 (scale to zero) works in Knative mode only."
    )
    max: int = Field(default=1, ge=1, le=1000, description="At most so many; more than min: scaled by `scaling`.")


class Scaling(Object):
    """What decides the number of replicas between min and max."""

    metric: Literal["Concurrency", "RPS", "CPU", "Memory"] = Field(
        default="CPU",
        description="What is measured. Concurrency and RPS (requests per second) need Knative mode; CPU and Memory are "
        "percentages of the request, and say little of a GPU.",
    )
    target: int = Field(
        default=80, ge=1, le=1_000_000, description="Value per replica that the number of replicas aims at."
    )


class Toleration(Object):
    """A taint of nodes that these pods stand."""

    key: str | None = Field(default=None, max_length=316, description="Key of the taint; unset: every key.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists: any value.")
    value: str | None = Field(default=None, max_length=63, description="Value of the taint, with Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; unset: every effect."
    )
    toleration_seconds: int | None = Field(default=None, ge=0, description="With NoExecute: how long a pod may stay.")


class InferenceService(Object):
    """A predictor of Sightline that the operator owns, as an InferenceService of KServe."""

    rules = (
        Rule(
            "!has(self.scaling) || self.replicas.max > self.replicas.min",
            "inferenceService.scaling needs replicas.max larger than replicas.min",
            ".scaling",
        ),
        Rule(
            "!has(self.resources.limits) || !(self.gpu.resourceName in self.resources.limits)",
            "inferenceService.resources.limits must not name the resource of gpu: set gpu.count",
            ".resources",
        ),
        Rule(
            "!has(self.resources.requests) || !(self.gpu.resourceName in self.resources.requests)",
            "inferenceService.resources.requests must not name the resource of gpu: set gpu.count",
            ".resources",
        ),
    )
    model: Model = Field(default=Model(), description="Which weights are loaded; empty: the small demonstration model.")
    runtime: Runtime = Field(
        default=Runtime(), description="What runs them; empty: the operator's own image of this predictor."
    )
    args: tuple[Argument, ...] = Field(
        default=(),
        max_length=64,
        description="Flags added to the command line, such as `--max-batch=16`.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    resources: Resources = Field(default=Resources(), description="CPU and memory of one replica.")
    gpu: GPU = Field(default=GPU(), description="GPUs of one replica; none unless said.")
    replicas: Replicas = Field(default=Replicas(), description="How many pods hold the model.")
    scaling: Scaling | None = Field(
        default=None, description="How the number of replicas follows the load; unset: KServe's way."
    )
    rollout: Literal["ResourceAware", "Availability"] | None = Field(
        default=None,
        description="How a new version replaces the old one. ResourceAware: a pod goes before its successor comes, so "
        "no successor waits for the GPU that it holds. Availability: the successor is ready first, which needs a spare "
        "GPU. Unset: ResourceAware with GPUs, Availability without.",
    )
    load_timeout: PositiveDuration = Field(
        default="30m", description="How long the weights may take to load before the pod is started again."
    )
    node_selector: dict[str, LabelValue] = Field(
        default={}, max_length=32, description="Labels that the nodes must have."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(),
        max_length=32,
        description="Taints of nodes that the pods stand.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    pod_template_overrides: PodTemplateOverrides = None

    @property
    def is_resource_aware(self) -> bool:
        """Whether a pod goes before its successor comes."""
        return self.gpu.count > 0 if self.rollout is None else self.rollout == "ResourceAware"


class CaptionService(InferenceService):
    """The describe predictor (Qwen2-VL, Qwen2.5-VL)."""

    quantization: Literal["none", "8bit"] = Field(
        default="none", description="How the weights are held: as saved, or in 8 bits (bitsandbytes; needs a GPU)."
    )


class EnhanceService(InferenceService):
    """The enhance predictor (gpt-oss, whose published weights are in 4 bits already)."""


class InferenceServiceRef(Reference):
    """An InferenceService in this namespace that somebody else owns."""

    name: DnsLabel = Field(description="Name of the InferenceService, in the namespace of this object.")
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        pattern=r"^[^\s]+$",
        description="Name of the model in its routes; unset: the name of the InferenceService.",
    )
    protocol: Literal["V2", "OpenAI"] = Field(
        default="V2",
        description="What it speaks: V2 as Sightline's predictors do, or OpenAI (vLLM, huggingfaceserver).",
    )
    path: str = Field(
        default="",
        max_length=256,
        pattern=r"^(/[-A-Za-z0-9._~]+)*$",
        description="What stands before /v1 in its OpenAI routes, such as `/openai` of KServe's huggingfaceserver.",
    )


class Endpoint(Object):
    """A server that speaks OpenAI's chat completions, wherever it is."""

    url: str = Field(
        min_length=1,
        max_length=1024,
        description="Base URL, with or without its /v1.",
        json_schema_extra=ruled(
            Rule(
                "isURL(self) && url(self).getScheme() in ['http', 'https'] && url(self).getHostname() != ''",
                "endpoint.url must be an http:// or https:// URL",
            ),
            Rule(
                "!self.contains('@')",
                "endpoint.url must not hold a user name or password: use endpoint.authSecretRef",
            ),
        ),
    )
    model: str = Field(
        min_length=1, max_length=256, pattern=r"^[^\s]+$", description="Name of the model there, such as `gpt-oss-20b`."
    )
    auth_secret_ref: SecretKeyRef | None = Field(default=None, description="API key, sent as a bearer token.")
    ca_secret_ref: SecretKeyRef | None = Field(
        default=None, description="PEM certificates of the authority to trust instead of the public ones."
    )


class Retry(Object):
    """Further attempts at a call that cannot have started or was turned away: no connection, 502 of a proxy, 503."""

    max_attempts: int = Field(default=2, ge=1, le=10, description="Calls in all; 1: no retry.")
    per_try_timeout: PositiveDuration | None = Field(
        default=None, description="What one attempt gets at most; unset: what is left of the step's timeout."
    )


class CircuitBreaker(Object):
    """When the gateway stops calling a step that fails, so that requests fail or degrade at once."""

    rules = (
        Rule(
            exactly_one("errorPercent", "consecutiveErrors"),
            "circuitBreaker: exactly one of errorPercent and consecutiveErrors must be set",
        ),
        Rule(
            "!has(self.minRequests) || has(self.errorPercent)",
            "circuitBreaker.minRequests needs circuitBreaker.errorPercent",
            ".minRequests",
        ),
    )
    error_percent: int | None = Field(
        default=None, ge=1, le=100, description="Open when so many of the last calls failed."
    )
    min_requests: int | None = Field(
        default=None, ge=1, le=10_000, description="Calls before errorPercent counts; unset: 20."
    )
    consecutive_errors: int | None = Field(
        default=None, ge=1, le=1000, description="Open after so many failures in a row."
    )
    open_for: PositiveDuration = Field(default="10s", description="How long no call is made before one is tried again.")


_SOURCES = ("inferenceService", "inferenceServiceRef", "endpoint")
_STEP_RULES = (
    Rule(
        exactly_one(*_SOURCES),
        "exactly one of inferenceService, inferenceServiceRef and endpoint must be set: where this step's model is",
    ),
    Rule(
        "!has(self.retry.perTryTimeout) || duration(self.retry.perTryTimeout) <= duration(self.timeout)",
        "retry.perTryTimeout must not be longer than timeout",
        ".retry.perTryTimeout",
    ),
)


class Step(Object):
    """What both steps have."""

    rules = _STEP_RULES
    inference_service_ref: InferenceServiceRef | None = Field(
        default=None,
        description="An InferenceService in this namespace that exists already. The operator never changes it.",
    )
    endpoint: Endpoint | None = Field(default=None, description="Any server that speaks OpenAI's chat completions.")
    retry: Retry = Field(default=Retry(), description="Further attempts at a call that failed.")
    circuit_breaker: CircuitBreaker | None = Field(
        default=None,
        description="When the gateway stops calling a step that fails; unset: after five failures in a row, for 5s.",
    )
    max_in_flight: int = Field(
        default=32, ge=1, le=10_000, description="Calls of this step that one gateway pod has open at once."
    )


class CaptionStep(Step):
    """Looks at the image and says what is there."""

    inference_service: CaptionService | None = Field(
        default=None, description="Sightline's describe predictor, made and kept by the operator."
    )
    prompt: str | None = Field(
        default=None,
        min_length=1,
        max_length=8192,
        description="Words sent with the image when a request has none of its own.",
    )
    generation: Generation = Field(default=Generation(), description="How tokens are chosen.")
    timeout: PositiveDuration = Field(default="60s", description="What the step gets of a request's deadline at most.")


class EnhanceGeneration(Generation):
    """How tokens are chosen, and how long the model thinks first."""

    reasoning_effort: Literal["low", "medium", "high"] | None = Field(
        default=None, description="How long the model thinks before it writes, when a request does not say; unset: low."
    )


class EnhanceStep(Step):
    """Turns the caption into fuller prose."""

    inference_service: EnhanceService | None = Field(
        default=None, description="Sightline's enhance predictor, made and kept by the operator."
    )
    generation: EnhanceGeneration = Field(default=EnhanceGeneration(), description="How tokens are chosen.")
    timeout: PositiveDuration = Field(default="60s", description="What the step gets of a request's deadline at most.")


class EnhancePolicy(Object):
    """When a caption is enhanced, and what happens when that fails."""

    default: Literal["OnRequest", "Always", "Never"] | None = Field(
        default=None,
        description="Always: unless a request says no. OnRequest: when a request says so. Never: not even then. "
        "Unset: Always with an enhance step, Never without one.",
    )
    on_failure: Literal["Degrade", "Fail"] = Field(
        default="Degrade",
        description="Degrade: 200 with the bare caption and the reason. Fail: an error that holds the caption.",
    )
    min_remaining: Duration = Field(
        default="2s", description="Time that a request must have left for its enhancement to be started at all."
    )


# --- the gateway -----------------------------------------------------------------------------------------------------


class GatewayService(Object):
    """The Service before the gateway's pods."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP", description="Who can reach it: the cluster, its nodes' addresses, or a load balancer's."
    )
    port: int = Field(default=80, ge=1, le=65_535, description="Port of the Service; that of the pods is always 8080.")
    annotations: dict[str, AnnotationValue] = Field(
        default={}, max_length=32, description="Annotations, such as those that a cloud's load balancer reads."
    )


class ParentRef(Object):
    """A Gateway that the route hangs on."""

    name: DnsName = Field(description="Name of the Gateway.")
    namespace: DnsLabel | None = Field(default=None, description="Its namespace; unset: that of this object.")
    section_name: DnsName | None = Field(default=None, description="One listener of it; unset: all that fit.")


class HTTPRoute(Object):
    """A route of the Gateway API to the gateway."""

    parent_refs: tuple[ParentRef, ...] = Field(
        min_length=1,
        max_length=8,
        description="Gateways that the route hangs on.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    hostnames: tuple[DnsName, ...] = Field(
        default=(),
        max_length=16,
        description="Host names that it answers to; none: any.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class Autoscaling(Object):
    """A HorizontalPodAutoscaler on the gateway, which then owns `gateway.replicas`."""

    rules = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "autoscaling.minReplicas must not be larger than autoscaling.maxReplicas",
            ".minReplicas",
        ),
    )
    min_replicas: int = Field(default=1, ge=1, le=1000, description="At least so many pods.")
    max_replicas: int = Field(ge=1, le=1000, description="At most so many pods.")
    cpu_percent: int = Field(
        default=70, ge=1, le=100, description="CPU use that it aims at, as a percentage of the request."
    )


class Auth(Object):
    """Who may call the gateway. That anybody may has to be said."""

    rules = (
        Rule(
            "[has(self.apiKeysSecretRef), has(self.none) && self.none].exists_one(x, x)",
            "auth: name a Secret of accepted keys by apiKeysSecretRef, or say none: true (and not both)",
        ),
    )
    api_keys_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Accepted keys, one a line. A change of the Secret is taken over without a restart."
    )
    none: bool | None = Field(default=None, description="true: anybody who reaches the gateway may call it.")


class Limits(Object):
    """What the gateway refuses before it costs anything."""

    max_image_bytes: int = Field(default=20_971_520, ge=1, le=1_073_741_824, description="Bytes of one encoded image.")
    max_pixels: int = Field(default=40_000_000, ge=1, le=1_000_000_000, description="Pixels of one decoded image.")
    max_body_bytes: int = Field(default=104_857_600, ge=1, le=2_147_483_647, description="Bytes of one request.")
    queue_size: int = Field(
        default=64, ge=1, le=100_000, description="Requests that may wait in one pod; one more is 429."
    )


class Deadline(Object):
    """How long a request may take in all, time in queues included."""

    rules = (
        Rule(
            "!has(self.default) || duration(self.default) <= duration(self.max)",
            "deadline.default must not be longer than deadline.max",
            ".default",
        ),
    )
    default: PositiveDuration | None = Field(default=None, description="Of a request that does not say; unset: max.")
    max: PositiveDuration = Field(default="120s", description="A request may ask for less, never for more.")


class ServiceMonitor(Object):
    """A ServiceMonitor for Prometheus, made when the cluster has that kind."""

    interval: PositiveDuration = Field(default="30s", description="How often the gateway's metrics are read.")
    labels: dict[str, LabelValue] = Field(
        default={},
        max_length=32,
        description="Labels that the Prometheus of the cluster selects by, such as `release: prometheus`.",
    )


class Gateway(Object):
    """What clients call: it fetches images, runs the steps and answers. It holds no model and needs no GPU."""

    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Pods; `kubectl scale` sets it. With autoscaling the autoscaler decides instead.",
    )
    image: Image | None = Field(default=None, description="Image to run; unset: the operator's own.")
    resources: Resources = Field(default=Resources(), description="CPU and memory of one pod.")
    service: GatewayService = Field(default=GatewayService(), description="The Service before the pods.")
    http_route: HTTPRoute | None = Field(default=None, description="A route of the Gateway API; none unless said.")
    autoscaling: Autoscaling | None = Field(default=None, description="A HorizontalPodAutoscaler; none unless said.")
    service_monitor: ServiceMonitor | None = Field(default=None, description="A ServiceMonitor; none unless said.")
    auth: Auth = Field(description="Who may call it. That anybody may has to be said: `auth: {none: true}`.")
    limits: Limits = Field(default=Limits(), description="What is refused before it costs anything.")
    deadline: Deadline = Field(default=Deadline(), description="How long a request may take.")
    batches: Literal["InProcess", "VisionBatches"] = Field(
        default="InProcess",
        description="Who does the batches of its route /v1/batches. InProcess: the gateway's own pods. VisionBatches: "
        "a VisionBatch is made of each; that needs storage, and manifests/rbac/gateway-batches.yaml for the gateway's "
        "service account.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What the gateway logs."
    )
    pod_template_overrides: PodTemplateOverrides = None


class StorageBucket(S3Bucket):
    """The bucket of a pipeline, and where in it the gateway keeps what is its own."""

    prefix: str = Field(
        default="sightline/",
        max_length=512,
        pattern=r"^[^\s]*$",
        description="What the key of everything begins with that the gateway writes: uploads, runs, results of "
        "batches. Images are read from the whole bucket.",
    )


class Storage(Object):
    """The object store that images named by s3:// come from, and that uploads and batches are kept in."""

    s3: StorageBucket = Field(description="Bucket of a store that speaks S3; s3:// images of any other are refused.")


# --- batches of a pipeline -------------------------------------------------------------------------------------------

_NICKNAMES = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_CRON_FIELDS = (
    ("minute", "0-59", "[0-5]?[0-9]"),
    ("hour", "0-23", "[01]?[0-9]|2[0-3]"),
    ("day of month", "1-31", "0?[1-9]|[12][0-9]|3[01]"),
    ("month", "1-12 or jan-dec", "0?[1-9]|1[0-2]|(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"),
    ("day of week", "0-7 or sun-sat", "0?[0-7]|(?i:sun|mon|tue|wed|thu|fri|sat)"),
)


def _cron_rules() -> Iterator[Rule]:
    """One rule for the number of fields, and one for each field: a pattern of all would be refused in its own words."""
    yield Rule(
        f"self in {list(_NICKNAMES)} || self.split(' ').size() == 5",
        "batches[].schedule must have five fields such as `0 3 * * *`, or be one of " + ", ".join(_NICKNAMES),
    )
    for index, (name, values, number) in enumerate(_CRON_FIELDS):
        span = f"([*?]|({number})(-({number}))?)(/0*[1-9][0-9]?)?"
        yield Rule(
            f"self.split(' ').size() != 5 || self.split(' ')[{index}].matches('^{span}(,{span})*$')",
            f"batches[].schedule: the {name} must be of {values}, as *, lists (1,2), ranges (1-5) or steps (*/2)",
        )


class PipelineBatch(Object):
    """A batch that the operator makes: once, or again and again on a schedule."""

    rules = (
        Rule("!has(self.timeZone) || has(self.schedule)", "batches[].timeZone needs batches[].schedule", ".timeZone"),
        Rule(
            "!has(self.startingDeadline) || has(self.schedule)",
            "batches[].startingDeadline needs batches[].schedule",
            ".startingDeadline",
        ),
    )
    name: DnsLabel = Field(
        max_length=28,
        description="Name within the pipeline. The VisionBatch is called `<pipeline>-<name>`, and on a schedule "
        "`<pipeline>-<name>-<minutes since 1970>`.",
    )
    schedule: str | None = Field(
        default=None,
        max_length=128,
        pattern=r"^[-0-9A-Za-z*/,? @]+$",
        json_schema_extra=ruled(*_cron_rules()),
        description="Five fields of cron such as `0 3 * * *`, or `@daily`. Unset: made once, as soon as the pipeline "
        "is there.",
    )
    time_zone: str | None = Field(
        default=None,
        max_length=64,
        pattern=r"^[A-Za-z0-9_+/-]+$",
        description="IANA time zone of the schedule; unset: UTC.",
        json_schema_extra=ruled(
            Rule(
                "self.lowerAscii() != 'local' && timestamp('2026-01-01T00:00:00Z').getHours(self) >= 0",
                "batches[].timeZone must be the name of a time zone, such as Europe/Vienna",
            )
        ),
    )
    suspend: bool = Field(default=False, description="true: no new VisionBatch is made. Those that run go on.")
    concurrency_policy: Literal["Allow", "Forbid"] = Field(
        default="Forbid", description="Forbid: a run is skipped while the one before it still goes on."
    )
    starting_deadline: PositiveDuration | None = Field(
        default=None,
        description="A run that could not start for so long is skipped; unset: the last missed one is made up for.",
    )
    successful_history_limit: int = Field(default=3, ge=0, le=100, description="Completed VisionBatches that are kept.")
    failed_history_limit: int = Field(
        default=1, ge=0, le=100, description="Failed and cancelled VisionBatches that are kept."
    )
    template: BatchTemplate = Field(description="What the VisionBatch says.")


# --- the spec --------------------------------------------------------------------------------------------------------


def _gpu_rule(step: str) -> Rule:
    """A GPU may change where the old pod goes first, or none runs: otherwise the new one can wait for ever."""
    new, old = f"self.{step}.inferenceService", f"oldSelf.{step}.inferenceService"
    return Rule(
        f"!has(self.{step}) || !has(oldSelf.{step}) || !has({new}) || !has({old}) || {new}.gpu == {old}.gpu || "
        f"self.suspend || !has({new}.rollout) || {new}.rollout == 'ResourceAware'",
        f"{step}.inferenceService.gpu may change only with rollout ResourceAware, or while suspend is true",
        f".{step}",
    )


class Pipeline(Object):
    """What a VisionPipeline is to be."""

    rules = (
        Rule(
            "has(self.enhance) || !has(self.enhancePolicy.default) || self.enhancePolicy.default == 'Never'",
            "enhancePolicy.default must be Never, or unset, without an enhance step",
            ".enhancePolicy.default",
        ),
        Rule(
            "duration(self.caption.timeout) + (has(self.enhance) ? duration(self.enhance.timeout) : duration('0s')) "
            "<= duration(self.gateway.deadline.max)",
            "caption.timeout and enhance.timeout together must not be longer than gateway.deadline.max",
            ".gateway.deadline.max",
        ),
        Rule(
            "!has(self.enhance) || duration(self.enhancePolicy.minRemaining) < duration(self.enhance.timeout)",
            "enhancePolicy.minRemaining must be shorter than enhance.timeout",
            ".enhancePolicy.minRemaining",
        ),
        Rule(
            "self.gateway.batches != 'VisionBatches' || has(self.storage)",
            "gateway.batches VisionBatches needs storage: uploads and results are kept there",
            ".gateway.batches",
        ),
        _gpu_rule("caption"),
        _gpu_rule("enhance"),
    )
    caption: CaptionStep = Field(description="The step that looks at the image.")
    enhance: EnhanceStep | None = Field(
        default=None, description="The step that turns the caption into fuller prose; none: the pipeline only captions."
    )
    enhance_policy: EnhancePolicy = Field(
        default=EnhancePolicy(), description="When a caption is enhanced, and what if not."
    )
    gateway: Gateway = Field(description="What clients call.")
    storage: Storage | None = Field(
        default=None,
        description="Object store that s3:// images come from, and that uploads, runs and batches are kept in; none: "
        "such images are refused, and what is kept is one pod's and goes with it.",
    )
    batches: tuple[PipelineBatch, ...] = Field(
        default=(),
        max_length=16,
        description="Batches that the operator makes, once or on a schedule.",
        json_schema_extra=keyed_by("name"),
    )
    suspend: bool = Field(
        default=False,
        description="true: no pods run; InferenceServices are stopped and the gateway has none. Nothing is lost.",
    )
    network_policy: Literal["Managed", "Unmanaged"] = Field(
        default="Managed",
        description="Managed: only the gateway reaches the owned predictors. Unmanaged: no NetworkPolicy is made.",
    )
    deletion_policy: Literal["Delete", "OrphanModels"] = Field(
        default="Delete",
        description="What goes with this object: everything, or everything but the InferenceServices, which go on "
        "serving.",
    )
    update_policy: Literal["OnSpecChange", "WithOperator"] = Field(
        default="OnSpecChange",
        description="When a newer operator may render this pipeline in its newer way: at the next change of the spec, "
        "so that an upgrade of the operator restarts nothing, or at once.",
    )

    @property
    def enhances(self) -> Literal["OnRequest", "Always", "Never"]:
        """When a caption is enhanced."""
        return self.enhance_policy.default or ("Always" if self.enhance else "Never")

    @property
    def steps(self) -> dict[str, CaptionStep | EnhanceStep]:
        """By name: caption, and enhance when there is one that can be called."""
        has_enhance = self.enhance is not None and self.enhances != "Never"
        return {"caption": self.caption} | ({"enhance": self.enhance} if has_enhance and self.enhance else {})


# --- the status ------------------------------------------------------------------------------------------------------


class StepStatus(Object):
    """How a step is."""

    name: Literal["caption", "enhance"] = Field(description="Which step it is.")
    source: Literal["InferenceService", "InferenceServiceRef", "Endpoint"] | None = Field(
        default=None, description="Where its model is."
    )
    inference_service: str | None = Field(
        default=None, max_length=253, description="Its InferenceService, if it has one."
    )
    url: str | None = Field(default=None, max_length=1024, description="Where the gateway calls it.")
    model: str | None = Field(
        default=None, max_length=1024, description="Model that it runs, or asks for at an endpoint."
    )
    model_revision: str | None = Field(
        default=None, max_length=256, description="Revision of the model, where it is known."
    )
    ready: bool | None = Field(default=None, description="Whether it answers now.")
    ready_replicas: int | None = Field(default=None, ge=0, description="Pods that answer.")
    revision_ready: bool | None = Field(default=None, description="Whether what answers is what the spec says now.")


class GatewayStatus(Object):
    """How the gateway is."""

    replicas: int | None = Field(default=None, ge=0, description="Pods that are there, ready or not.")
    ready_replicas: int | None = Field(default=None, ge=0, description="Pods that answer.")
    ready: str | None = Field(default=None, max_length=32, description="Ready pods of wanted ones, such as `1/2`.")
    selector: str | None = Field(default=None, max_length=1024, description="Selector of the pods, for autoscalers.")
    image: str | None = Field(default=None, max_length=512, description="Image that they run.")


class PipelineBatches(Object):
    """The batches that this pipeline serves."""

    active: int | None = Field(default=None, ge=0, description="VisionBatches that are not finished.")


class BatchSchedule(Object):
    """What a scheduled batch did last."""

    name: str = Field(max_length=63, description="Name in spec.batches.")
    last_schedule_time: Time = Field(default=None, description="When it was last due and made.")
    next_schedule_time: Time = Field(default=None, description="When it is due next.")
    last_batch: str | None = Field(default=None, max_length=253, description="VisionBatch that was made last.")


class Drift(Object):
    """The last repair of something that somebody changed or deleted."""

    time: Time = Field(default=None, description="When it was repaired.")
    object: str | None = Field(default=None, max_length=512, description="Kind and name.")
    fields: tuple[FieldPath, ...] = Field(
        default=(),
        max_length=8,
        description="Fields that were set back.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class PipelineStatus(Object):
    """How a VisionPipeline is, and why."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this status is about."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(),
        max_length=16,
        description="Accepted, CaptionReady, EnhanceReady, GatewayReady, Degraded, and Ready, which sums them up.",
        json_schema_extra=keyed_by("type"),
    )
    url: str | None = Field(
        default=None, max_length=1024, description="Where clients in the cluster call the pipeline."
    )
    revision: str | None = Field(
        default=None,
        max_length=64,
        description="Hash of everything that decides what the pipeline answers; batches hold to it.",
    )
    render_version: int | None = Field(
        default=None, ge=0, description="Version of the rules by which the children were rendered."
    )
    images: dict[str, Image] = Field(
        default={},
        max_length=16,
        description="Images that they were rendered with, by predictor; kept like the version.",
    )
    steps: tuple[StepStatus, ...] = Field(
        default=(), max_length=2, description="How each step is.", json_schema_extra=keyed_by("name")
    )
    gateway: GatewayStatus | None = Field(default=None, description="How the gateway is.")
    batches: PipelineBatches | None = Field(default=None, description="The batches that this pipeline serves.")
    schedules: tuple[BatchSchedule, ...] = Field(
        default=(),
        max_length=16,
        description="What the batches of the spec did last.",
        json_schema_extra=keyed_by("name"),
    )
    last_drift: Drift | None = Field(
        default=None, description="The last repair of something that somebody changed or deleted."
    )
