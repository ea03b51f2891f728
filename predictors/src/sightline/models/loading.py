"""From a hub id or folder to a loaded transformers model that is what its configuration says, or an error."""

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sightline.errors import InvalidParameter
from sightline.settings import EngineSettings, VllmSettings, cpu_quota
from sightline.wire import ModelInfo

log = logging.getLogger("sightline.models")


class LoadFailed(RuntimeError):
    """The checkpoint cannot be served; the process exits, so that nobody gets answers of a half-loaded model.

    reason  stable, one word: docs/self-checks.md
    """

    def __init__(self, message: str, *, reason: str = "checkpoint_unusable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Quantization:
    """bitsandbytes 8-bit weights, and how much memory each device may take (`10GiB`), None for no bound."""

    is_8bit: bool = False
    max_memory_gpu: str | None = None
    max_memory_cpu: str | None = None


def check_kind(settings: EngineSettings, *model_types: str) -> None:
    """Raise LoadFailed, before anything large is read, when the checkpoint is of another kind."""
    config = transformers.AutoConfig.from_pretrained(
        settings.model, revision=settings.revision, cache_dir=settings.cache_dir, trust_remote_code=False
    )
    if config.model_type not in model_types:
        raise LoadFailed(f"{settings.model}: not a {' or '.join(model_types)} checkpoint")


def load_pretrained(
    auto_class: Any,  # noqa: ANN401 - an AutoModelFor… class
    settings: EngineSettings,
    quantization: Quantization = Quantization(),
) -> Any:  # noqa: ANN401 - a PreTrainedModel
    """Load a model in evaluation mode onto the GPU when there is one and it is wanted, else the CPU.

    Raises LoadFailed when weights are missing, left over or of another shape: transformers would otherwise serve
    freshly initialised ones with a warning.
    """
    torch.set_num_threads(settings.threads or cpu_quota())
    if is_elsewhere(settings):
        return without_weights(auto_class, settings)
    use_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "revision": settings.revision,
        "cache_dir": settings.cache_dir,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported instead of raised: `_check_weights` refuses them like the others
    }
    if use_cuda:
        memory: dict[int | str, str] = {}
        if quantization.max_memory_gpu:
            memory |= dict.fromkeys(range(torch.cuda.device_count()), quantization.max_memory_gpu)
        if quantization.max_memory_cpu:
            memory["cpu"] = quantization.max_memory_cpu
        options |= {"device_map": "auto", "max_memory": memory or None}
    if quantization.is_8bit:
        options |= {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True
            ),
            "device_map": "auto" if use_cuda else "cpu",
        }
    model, info = auto_class.from_pretrained(settings.model, **options)
    _check_weights(settings.model, info)
    return model.eval()


def is_elsewhere(settings: EngineSettings) -> bool:
    """Whether another process holds the weights, so that this one makes prompts and reads answers only."""
    return isinstance(settings, VllmSettings) and settings.uses_vllm


def without_weights(auto_class: Any, settings: EngineSettings) -> Any:  # noqa: ANN401 - a PreTrainedModel
    """A model whose tensors have shapes and no memory, in the type that its weights would have."""
    where: dict[str, Any] = {"revision": settings.revision, "cache_dir": settings.cache_dir}
    config = transformers.AutoConfig.from_pretrained(settings.model, trust_remote_code=False, **where)
    dtype = config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype or torch.float32)
    with contextlib.suppress(OSError):  # a checkpoint need not have one
        model.generation_config = transformers.GenerationConfig.from_pretrained(settings.model, **where)
    return model.eval()


def repetition_penalty(model: Any) -> float:  # noqa: ANN401
    """What the checkpoint's generation configuration says; 1 for none.

    It is kept (Qwen2.5-VL ships 1.05), because the model was tuned with it; what else is there of sampling is the
    request's to say.
    """
    return float(model.generation_config.repetition_penalty or 1)


_REASONS = {
    "missing_keys": "weights_missing",
    "mismatched_keys": "weights_mismatched",
    "unexpected_keys": "weights_unexpected",
    "error_msgs": "weights_unreadable",
}


def _check_weights(name: str, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if keys := info.get(kind):
            sample = ", ".join(sorted(str(key) for key in keys)[:5])
            raise LoadFailed(f"{name}: {len(keys)} {kind.replace('_', ' ')}: {sample}", reason=_REASONS[kind])


def model_info(model: Any, settings: EngineSettings) -> ModelInfo:  # noqa: ANN401
    """The model's own name and revision.

    A checkpoint of ours says in its configuration that it is a demonstration model and how it is called. The revision
    is the hub's commit, or, for a folder, the start of the SHA-256 of its weights.
    """
    config = model.config
    folder = Path(settings.model)
    name = getattr(config, "sightline_model_name", None) or (folder.name if folder.is_dir() else settings.model)
    revision = getattr(config, "_commit_hash", None) or settings.revision
    if folder.is_dir():
        revision = _digest(folder)
    return ModelInfo(
        name=str(name),
        revision=str(revision or "main"),
        demo=bool(getattr(config, "sightline_demo_model", False)),
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def check_length(model: Any, tokens: int) -> None:  # noqa: ANN401
    """Refuse a prompt that is longer than the model's context, before it costs quadratic memory.

    8,192 characters may be 32,000 tokens. Raises InvalidParameter (422).
    """
    limit = int(model.config.get_text_config().max_position_embeddings)
    if tokens >= limit:
        raise InvalidParameter(f"The prompt has {tokens} tokens; this model reads {limit}.", code="prompt_too_long")


def as_plain_text(text: str) -> str:
    """User text that cannot be read as control tokens: `<|` is broken up, so that no special token matches.

    Without this a prompt holding `<|image_pad|>` would claim image features, and `<|end|>` would end its turn.
    """
    return text.replace("<|", "< |")
