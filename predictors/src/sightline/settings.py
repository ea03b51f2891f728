"""One frozen configuration per process: flag, then environment, then `.env`, then the default written here.

Built in `main`, shown by `--help`, printed once at start with secrets hidden, and handed down. The names of the five
older services (contracts A10, D5, …) are understood as aliases.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, CliImplicitFlag, NoDecode, SettingsConfigDict

from sightline.wire import DEFAULT_PROMPT, ReasoningLevel

MEBIBYTE = 1024 * 1024
TINY = Path(__file__).parent / "tiny"

_USER_INFO = re.compile(r"//[^/@\s]*@")

CommaSeparated = Annotated[tuple[str, ...], NoDecode]
StepProtocol = Literal["v2", "openai"]


def _split(value: object) -> object:
    if isinstance(value, str):
        if value.strip().lower() == "none":  # an empty value counts as not said
            return ()
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
    )


class ImageSettings(_Settings):
    """Where images may come from and how large they may be; the same for every route of every predictor."""

    max_image_bytes: int = Field(20 * MEBIBYTE, gt=0, description="Bytes of one encoded image.")
    max_pixels: int = Field(40_000_000, gt=0, description="Pixels of one decoded image, read from its header first.")
    min_side: int = Field(3, gt=0, description="Pixels of the shorter side.")
    max_aspect: float = Field(200, ge=1, description="Longer side over shorter side.")
    decode_threads: int = Field(2, gt=0, description="Threads that decode images and prepare them for the model.")
    jpeg_detail: float = Field(
        1,
        ge=0,
        description="A JPEG is decoded at 1/2, 1/4 or 1/8 where this many times the pixels that the model reads are "
        "left of each side. 2: closer to the whole picture, and slower; 0: always whole.",
    )

    url_hosts: CommaSeparated = Field(
        (),
        description="Host globs that image URLs may name, comma-separated. none: URLs are refused.",
    )
    url_allow_http: bool = Field(False, description="Allow http:// beside https:// URLs.")
    url_allow_private: bool = Field(
        False, description="Allow addresses that are not global. For tests on loopback only."
    )
    url_max_redirects: int = Field(
        0, ge=0, le=3, description="Redirects to follow; each hop is checked like the first."
    )
    url_connect_seconds: float = Field(3, gt=0)
    url_total_seconds: float = Field(10, gt=0)

    s3_buckets: CommaSeparated = Field(
        ("*",),
        description="Bucket globs that s3:// URIs may name, comma-separated. none: refused.",
    )
    s3_endpoint_url: str | None = Field(
        None,
        validation_alias=AliasChoices("s3_endpoint_url", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        description="Endpoint of an S3-compatible store; default: AWS.",
    )
    s3_path_style: bool = Field(False, description="Path-style addressing; always on when an endpoint URL is given.")
    aws_region: str | None = Field(
        None, validation_alias=AliasChoices("aws_region", "AWS_REGION", "AWS_DEFAULT_REGION")
    )
    s3_connect_seconds: float = Field(3, gt=0)
    s3_total_seconds: float = Field(30, gt=0)

    image_root: Path | None = Field(
        None, description="Folder below which server paths may be read. None: paths are refused."
    )

    _lists = field_validator("url_hosts", "s3_buckets", mode="before")(_split)


class ServerSettings(ImageSettings):
    """What every server has: its address, its keys and its limits."""

    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104 - a container's own
    port: int = Field(8080, ge=1, le=65_535)
    grpc_port: int | None = Field(
        None, ge=1, le=65_535, description="Port of the V2 gRPC service; KServe's is 8081. None: no gRPC."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    auth: Literal["api-key", "off"] = Field(
        "api-key",
        description="`off` must be said by name; without keys the server refuses to start.",
    )
    api_keys: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("api_keys", "API_KEY"),
        description="Accepted keys, comma-separated.",
    )
    api_key_file: Path | None = Field(
        None, description="File with one accepted key a line, read again when it changes."
    )

    max_request_bytes: int = Field(100 * MEBIBYTE, gt=0)
    max_parts: int = Field(32, gt=0, description="Multipart parts of one request.")
    queue_size: int = Field(
        64,
        gt=0,
        description="Requests that may wait; one more is 429. Those with `x-priority: batch` fill at most half.",
    )
    deadline_seconds: float = Field(
        120, gt=0, description="A request may ask for less by X-Request-Timeout-Ms, never for more."
    )
    default_deadline_seconds: float | None = Field(
        None, gt=0, description="Deadline of a request that asks for none; default: deadline_seconds."
    )
    grace_seconds: int = Field(30, gt=0, description="Seconds that running requests get after SIGTERM.")

    _levels = field_validator("log_level", mode="before")(_lowered)

    @property
    def usual_seconds(self) -> float:
        """The deadline of a request that asks for none."""
        return min(self.default_deadline_seconds or self.deadline_seconds, self.deadline_seconds)

    @model_validator(mode="after")
    def _auth_is_decided(self) -> Self:
        if self.auth == "api-key" and not (self.api_keys or self.api_key_file):
            raise ValueError(
                "no API key configured: set API_KEY or API_KEY_FILE, or switch authentication off with AUTH=off"
            )
        return self


class EngineSettings(ServerSettings):
    """What every server that holds a model has."""

    model: str = Field("", description="Hub id or folder.")
    revision: str | None = Field(None, description="Hub revision (commit) of the model.")
    cache_dir: Path | None = Field(
        None,
        validation_alias=AliasChoices("cache_dir", "HUGGINGFACE_CACHE_DIR"),
        description="Where hub downloads are kept.",
    )
    hf_token: SecretStr | None = Field(None, description="Token for models on the hub that want one.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="CUDA when present, else CPU.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the type the checkpoint was saved in."
    )
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0: from the CPU quota.")
    max_batch: int = Field(8, gt=0, description="Requests that may be answered at once.")
    self_checks: Literal["on", "off"] = Field(
        "on", description="Checks of memory, weights and answers at start, docs/self-checks.md; a failed one ends it."
    )
    golden_file: Path | None = Field(
        None, description="What the model makes of a fixed picture; default: sightline_golden.json beside its weights."
    )
    profile_memory: Literal["auto", "on", "off"] = Field(
        "auto", description="Run the largest allowed image at start and log the peak; auto: on GPUs."
    )
    max_out_of_memory: int = Field(
        3, gt=0, description="Items in a row without memory after which the server is not ready, until one succeeds."
    )


class VllmSettings(EngineSettings):
    """What the predictors have that vLLM may answer for."""

    vllm_memory_share: float | None = Field(
        None, gt=0, le=1, description="Of a GPU's memory, what --engine vllm takes; default: vLLM's own."
    )
    vllm_cache_gib: float | None = Field(
        None, gt=0, description="GiB of its key-value cache; default: what the GPU has left, 1 on a CPU."
    )
    vllm_context: int | None = Field(
        None, gt=0, description="Tokens of a prompt and its answer; default: the model's, or what the cache can hold."
    )
    vllm_prefix_cache: bool = Field(
        False, description="Keep what was computed for prompts and images that may come again."
    )
    vllm_compile: bool | None = Field(None, description="Compile the model at start; default: on GPUs only.")
    vllm_batch_invariant: bool = Field(
        False, description="Kernels whose results do not depend on the batch; for GPUs, slower."
    )
    vllm_sleep_seconds: float | None = Field(
        None, gt=0, description="Give the GPU's memory back after so long without a request; None: never."
    )

    @property
    def uses_vllm(self) -> bool:
        """Whether another process holds the weights; which engines there are is each predictor's own."""
        return getattr(self, "engine", "hf") == "vllm"

    @model_validator(mode="after")
    def _vllm_quantises_nothing(self) -> Self:
        if self.uses_vllm and (
            getattr(self, "load_8bit", False) or getattr(self, "quantization", "auto") in ("8bit", "4bit")
        ):
            raise ValueError("engine vllm takes a checkpoint as it is; 8bit and 4bit are for engine hf")
        return self


class JobSettings(ServerSettings):
    """What a server has that keeps work which outlives a request."""

    job_store: str | None = Field(
        None,
        description="Where runs, files and batches are kept: memory://, file:///folder or s3://bucket/prefix; "
        "default: a folder of this user. Replicas that share it answer for each other.",
    )
    job_ttl_seconds: float = Field(1800, gt=0, description="How long a finished run can be asked for.")
    job_timeout_seconds: float = Field(600, gt=0, description="A run that takes longer is TIMED_OUT.")


class VisionSettings(VllmSettings):
    """What the predictors that read images and write text have."""

    model_name: str
    engine: Literal["hf", "vllm", "remote"] = Field(
        "hf",
        description="hf: the model is loaded here. vllm: by vLLM, a process beside this one; needs the extra `vllm`. "
        "remote: it is asked at an OpenAI-compatible URL.",
    )
    remote_url: str | None = Field(None, description="Base URL for --engine remote, with or without its /v1.")
    remote_model: str | None = Field(None, description="Its model name there; default: the name here.")
    remote_api_key: SecretStr | None = Field(None, description="Key that it wants.")
    image_cache_mib: int = Field(
        0,
        ge=0,
        description="MiB of embeddings of images that may come again, kept by the images' content. 0: none are kept, "
        "so that no client can tell by the time of an answer what others have sent.",
    )

    @field_validator("remote_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    @model_validator(mode="after")
    def _remote_has_an_address(self) -> Self:
        if self.engine == "remote" and self.remote_url is None:
            raise ValueError("engine remote needs remote_url")
        return self


class DescribeSettings(VisionSettings, JobSettings):
    """The `describe` predictor: Qwen2-VL or Qwen2.5-VL."""

    model_name: str = Field("describe", description="Name in the KServe routes.")
    model: str = Field(
        str(TINY / "describe"),
        validation_alias=AliasChoices("model", "QWEN_MODEL_NAME", "VLM_MODEL_ID"),
        description="Hub id or folder; the small demonstration model by default.",
    )
    load_8bit: bool = Field(
        False,
        validation_alias=AliasChoices("load_8bit", "VLM_LOAD_8BIT"),
        description="bitsandbytes 8-bit weights; needs the extra `bnb`.",
    )
    max_memory_gpu: str | None = Field(None, validation_alias=AliasChoices("max_memory_gpu", "QWEN_MAX_MEMORY_GPU"))
    max_memory_cpu: str | None = Field(None, validation_alias=AliasChoices("max_memory_cpu", "QWEN_MAX_MEMORY_CPU"))
    prompt: str = Field(DEFAULT_PROMPT, description="Used when a request has none.")
    max_tokens: int = Field(256, gt=0, le=4096, description="New tokens when a request says nothing.")
    max_width: int = Field(
        512,
        ge=28,
        description="Wider images are resized to this width; the height is bounded by twice it.",
    )


class EnhanceSettings(VllmSettings):
    """The `enhance` predictor: gpt-oss."""

    model_name: str = Field("enhance", description="Name in the KServe routes.")
    engine: Literal["hf", "vllm"] = Field(
        "hf",
        description="hf: the model is loaded here. vllm: by vLLM, a process beside this one; needs the extra `vllm`.",
    )
    model: str = Field(
        str(TINY / "enhance"),
        validation_alias=AliasChoices("model", "GPT_OSS_MODEL_ID"),
        description="Hub id or folder; the small demonstration model by default.",
    )
    reasoning_level: ReasoningLevel = Field(
        "low",
        validation_alias=AliasChoices("reasoning_level", "GPT_OSS_REASONING_LEVEL"),
        description="Used when a request names none.",
    )
    max_tokens: int = Field(
        1024,
        gt=0,
        le=4096,
        description="New tokens, reasoning included, when a request says nothing.",
    )


class GenerateSettings(VisionSettings):
    """The `generate` predictor: Kimi-VL."""

    model_name: str = Field("generate", description="Name in the KServe routes.")
    model: str = Field(
        str(TINY / "generate"),
        validation_alias=AliasChoices("model", "KIMI_MODEL_PATH", "MODEL_PATH"),
        description="Hub id or folder; the small demonstration model by default.",
    )
    quantization: Literal["auto", "8bit", "4bit", "none"] = Field(
        "auto",
        description="How the weights are held. auto: 8bit, but none for the demonstration model; "
        "8bit and 4bit need the extra `bnb`.",
    )
    max_memory_gpu: str | None = Field(None, description="Memory each GPU may give to weights, such as 20GiB.")
    max_memory_cpu: str | None = Field(None, description="Memory the CPU may give to weights.")
    max_tokens: int = Field(
        4000,
        gt=0,
        le=4096,
        validation_alias=AliasChoices("max_tokens", "MAX_TOKENS"),
        description="New tokens when a request says nothing.",
    )
    temperature: float = Field(0.7, ge=0, le=2, description="When a request says nothing; 0 is greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="When a request says nothing.")
    max_width: int = Field(2048, ge=28, description="Wider images are resized to this width.")


class EmbedSettings(EngineSettings):
    """The `embed` predictor: ColQwen2.5."""

    model_name: str = Field("embed", description="Name in the KServe routes.")
    model: str = Field(
        str(TINY / "embed"),
        validation_alias=AliasChoices("model", "COLQWEN_MODEL_ID"),
        description="Hub id or folder, merged or a LoRA adapter; the small demonstration model by default.",
    )
    base_model: str | None = Field(
        None, description="Base of a LoRA adapter, when not the one that its configuration names."
    )
    max_batch: int = Field(32, gt=0, description="Pages or queries that may share one forward pass.")
    max_batch_tokens: int = Field(16_384, gt=0, description="Tokens that may share one forward pass.")


class BlipSettings(EngineSettings, JobSettings):
    """The `blip` predictor: BLIP base or large."""

    model_name: str = Field(
        "blip",
        validation_alias=AliasChoices("model_name", "SERVED_MODEL_NAME"),
        description="Name in the KServe routes.",
    )
    model: str = Field(
        str(TINY / "blip"),
        validation_alias=AliasChoices("model", "MODEL_PATH", "MODEL_NAME"),
        description="Hub id or folder; the small demonstration model by default.",
    )
    max_tokens: int = Field(50, gt=0, le=512, description="New tokens when a request says nothing.")
    max_batch: int = Field(16, gt=0, description="Images that may share one forward pass.")
    max_batch_items: int = Field(
        1000, gt=0, description="Images of one batch request; its form may have as many parts and a few more."
    )
    workers: int = Field(1, description="Processes that answer; only 1, as each would hold a model of its own.")
    reload: CliImplicitFlag[bool] = Field(
        False, description="For development: start again when a source file of Sightline changes."
    )

    @field_validator("workers")
    @classmethod
    def _is_one(cls, value: int) -> int:
        if value != 1:
            raise ValueError("must be 1: each process would hold a model of its own; start replicas instead")
        return value


class PipelineSettings(JobSettings):
    """The `pipeline` gateway: caption, then enhance."""

    model_name: str = Field("pipeline", description="Name in the KServe routes.")
    describe_url: str = Field("http://127.0.0.1:8081", description="Base URL of the caption step.")
    describe_model: str = Field("describe", description="Its model name in the routes of its protocol.")
    describe_protocol: StepProtocol = Field(
        "v2",
        description="What the caption step speaks: v2 (a predictor of ours), or openai (vLLM, an LLMInferenceService, "
        "a hosted model: any URL with /v1/chat/completions).",
    )
    describe_max_width: int = Field(
        1024,
        ge=28,
        description="Of images sent to a caption step that speaks openai; they are decoded and stripped of EXIF first.",
    )
    enhance_url: str | None = Field(None, description="Base URL of the enhance step; None: the pipeline only captions.")
    enhance_model: str = Field("enhance", description="Its model name in the routes of its protocol.")
    enhance_protocol: StepProtocol = Field("v2", description="What the enhance step speaks; openai also streams.")
    step_api_key: SecretStr | None = Field(None, description="Key that the two steps want.")
    describe_api_key: SecretStr | None = Field(None, description="Key of the caption step, if it has its own.")
    enhance_api_key: SecretStr | None = Field(None, description="Key of the enhance step, if it has its own.")
    describe_ca_file: Path | None = Field(
        None, description="PEM certificates to trust at the caption step instead of the public ones."
    )
    enhance_ca_file: Path | None = Field(None, description="The same for the enhance step.")
    enhance_by_default: bool = Field(
        True,
        validation_alias=AliasChoices("enhance_by_default", "USE_GPT_OSS"),
        description="What happens when a request does not say use_gpt_oss.",
    )
    reasoning_level: ReasoningLevel = Field(
        "low", validation_alias=AliasChoices("reasoning_level", "GPT_OSS_REASONING_LEVEL")
    )
    strict_by_default: bool = Field(
        False, description="What happens when a request does not say strict: true makes a missing enhancement an error."
    )
    caption_prompt: str | None = Field(None, description="Used when a request has neither prompt nor preset.")
    caption_tokens: int = Field(128, gt=0, le=4096, description="New tokens of a caption.")
    caption_temperature: float = Field(0, ge=0, le=2, description="When a request says nothing; 0 is greedy.")
    caption_top_p: float = Field(1, gt=0, le=1, description="When a request says nothing.")
    caption_seed: int | None = Field(None, ge=0, description="When a request says nothing.")
    enhance_tokens: int = Field(1024, gt=0, le=4096, description="New tokens of an enhancement.")
    enhance_temperature: float = Field(0, ge=0, le=2, description="When a request says nothing; 0 is greedy.")
    enhance_top_p: float = Field(1, gt=0, le=1, description="When a request says nothing.")
    enhance_seed: int | None = Field(None, ge=0, description="When a request says nothing.")
    caption_timeout_seconds: float | None = Field(
        None, gt=0, description="What the caption step gets of the deadline at most; default: all of it."
    )
    enhance_timeout_seconds: float = Field(
        60, gt=0, description="Past this the caption is returned without enhancement."
    )
    enhance_min_seconds: float = Field(
        0, ge=0, description="With less than this left of its deadline, a caption is not enhanced."
    )
    caption_attempts: int = Field(3, ge=1, le=10, description="Calls of the caption step for one image at most.")
    enhance_attempts: int = Field(3, ge=1, le=10, description="Calls of the enhance step for one caption at most.")
    caption_attempt_seconds: float | None = Field(
        None, gt=0, description="What one of them may take until its answer, or its first piece, is there."
    )
    enhance_attempt_seconds: float | None = Field(None, gt=0, description="The same for the enhance step.")
    caption_max_in_flight: int | None = Field(None, gt=0, description="Calls of the caption step open at once.")
    enhance_max_in_flight: int | None = Field(None, gt=0, description="Calls of the enhance step open at once.")
    caption_breaker_failures: int = Field(
        5, ge=1, description="Failures in a row after which the caption step is left alone for a while."
    )
    caption_breaker_error_percent: int | None = Field(
        None, ge=1, le=100, description="Instead: failures among the last calls, in per cent."
    )
    caption_breaker_min_requests: int = Field(20, ge=1, description="How many calls those are.")
    caption_breaker_open_seconds: float = Field(5, gt=0, description="For how long it is left alone.")
    enhance_breaker_failures: int = Field(5, ge=1, description="As for the caption step.")
    enhance_breaker_error_percent: int | None = Field(None, ge=1, le=100, description="As for the caption step.")
    enhance_breaker_min_requests: int = Field(20, ge=1, description="As for the caption step.")
    enhance_breaker_open_seconds: float = Field(5, gt=0, description="As for the caption step.")
    pipeline_revision: str | None = Field(
        None, description="Name of all that decides the answers; told in the header X-Pipeline-Revision."
    )
    max_concurrency: int = Field(32, gt=0, description="Chains that run at once; more wait.")

    batch_backend: Literal["local", "kubernetes"] = Field(
        "local",
        description="Who does the batches of /v1/batches. local: this process and those that share job_store. "
        "kubernetes: a VisionBatch is made of each.",
    )
    batch_pipeline: str | None = Field(
        None, description="Name of the VisionPipeline that VisionBatches are made for; needed with kubernetes."
    )
    service_account_folder: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="Folder with the token, ca.crt and namespace that VisionBatches are made with.",
    )
    batch_width: int = Field(8, gt=0, description="Lines of batches that this process works on at once.")
    max_upload_bytes: int = Field(200_000_000, gt=0, description="Bytes of one file of /v1/files.")
    max_batch_lines: int = Field(50_000, gt=0, description="Requests in one file of /v1/files.")
    file_ttl_seconds: float = Field(
        30 * 86_400, gt=0, description="How long a file of /v1/files, and a batch with its output, can be asked for."
    )

    @model_validator(mode="after")
    def _cluster_has_a_pipeline(self) -> Self:
        if self.batch_backend == "kubernetes" and not self.batch_pipeline:
            raise ValueError("batch_backend kubernetes needs batch_pipeline")
        return self

    @field_validator("describe_url", "enhance_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value


S = TypeVar("S", bound=_Settings)


def load(cls: type[S], argv: Sequence[str] = (), *, prog: str = "sightline") -> S:
    """Build the settings of one process from flags, environment and `.env`.

    Raises SystemExit(2) with one line per fault on bad values, SystemExit(0) after `--help`.
    """
    from pydantic import ValidationError
    from pydantic_settings import CliSettingsSource

    source = CliSettingsSource[S](cls, cli_prog_name=prog, cli_parse_args=list(argv))
    try:
        return cls(_cli_settings_source=source)  # type: ignore[call-arg]
    except ValidationError as error:
        lines = [
            f"{prog}: {'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        sys.stderr.write("\n".join([*lines, ""]))
        raise SystemExit(2) from error


def shown(settings: _Settings) -> dict[str, object]:
    """The settings as they may be printed: secrets hidden, passwords in addresses too."""
    told = settings.model_dump(mode="json")
    return {
        name: _USER_INFO.sub("//**********@", value) if isinstance(value, str) else value
        for name, value in told.items()
    }


def cpu_quota() -> int:
    """CPUs this process may really use: the smaller of its affinity and its cgroup quota, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, v1
        try:
            quota, period = " ".join(Path("/sys/fs/cgroup", file).read_text() for file in files).split()
            if int(quota) > 0:  # v1 says -1 for none; v2's "max" is no number
                cpus = min(cpus, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            continue
    return max(1, cpus)
