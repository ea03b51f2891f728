"""What the OpenAPI document says of the gateway's `POST /caption` and `GET /health`."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from sightline.services.base import Json
from sightline.wire import MAX_TOKENS_CEILING, PRESETS, ReasoningLevel


class CaptionOptions(BaseModel):
    """What every body may say beside its image."""

    detailed: bool = Field(True, description="false: one short sentence.")
    use_gpt_oss: bool | None = Field(None, description="true: enhance; false: do not; absent: as the pipeline is set.")
    reasoning_level: ReasoningLevel | None = Field(
        None, description="Effort of the enhancer; absent: as the pipeline is set."
    )
    strict: bool = Field(False, description="true: a wanted enhancement that fails is 503, not a bare caption.")
    explain: bool = Field(False, description="true: tell the steps, and which terms the enhancement added.")
    prompt: str | None = Field(None, max_length=8192, description="Replaces the prompts of `preset` and `detailed`.")
    preset: str | None = Field(
        None,
        description="Prompt of the caption step by name, instead of `detailed`.",
        json_schema_extra={"enum": [*PRESETS, None]},
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_CEILING, description="New tokens of either step.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 (default) is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, description="With a temperature: the same seed gives the same text.")
    stream: bool = Field(False, description="true, or `Accept: text/event-stream`: answer in events, as it goes.")


class CaptionBody(CaptionOptions):
    """One image by its place or its content, and options. Unknown fields are ignored."""

    s3_uri: str | None = Field(None, pattern="^s3://", description="`s3://bucket/key`; repeated in the answer.")
    image: str | None = Field(None, description="Base64, a data URI, an allowed URL or s3://.")
    image_url: str | None = Field(None, description="An allowed URL, a data URI or s3://.")
    image_path: str | None = Field(None, description="A path below the server's image root, where it has one.")


class EnhancementError(BaseModel):
    """Why a wanted enhancement is missing."""

    code: Literal[
        "enhancer_not_configured",
        "enhancer_unavailable",
        "enhancer_timeout",
        "enhancer_failed",
        "no_final_answer",
    ]
    message: str


class StepAnswer(BaseModel):
    """One step that answered."""

    name: Literal["caption", "enhance"]
    model: str
    revision: str
    milliseconds: float
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int | None = Field(description="null: the model does not tell.")
    reasoning_tokens: int


class CaptionAnswer(BaseModel):
    """`caption`, `enhanced` and what the request named its image by; every other field only where it applies."""

    caption: str
    enhanced: bool
    original_caption: str | None = Field(None, description="The caption behind an enhanced one.")
    s3_uri: str | None = Field(None, description="As in the request.")
    image_path: str | None = Field(None, description="As in the request.")
    filename: str | None = Field(None, description="Of an upload.")
    processing_time: float | None = Field(None, description="Seconds, of an upload.")
    enhancement_error: EnhancementError | None = Field(None, description="Enhancement was wanted and failed.")
    truncated: bool | None = Field(None, description="true: a text was cut.")
    downscaled: bool | None = Field(None, description="true: seen at half the pixels, for lack of memory.")
    added_terms: list[str] | None = Field(None, description="With `explain`.")
    steps: list[StepAnswer] | None = Field(None, description="With `explain`.")
    demo_model: bool | None = Field(None, description="true: answered by a demonstration model.")
    model: str | None = Field(None, description="Own name of the caption model, beside `demo_model`.")


class HealthAnswer(BaseModel):
    """Contract D4."""

    ok: bool = Field(description="The caption step is ready now.")
    backend: str | None = Field(description="Engine of the caption step; null while it does not answer.")
    device: str | None = Field(description="Device of the caption step; null while it does not answer.")
    gpt_oss_enabled: bool = Field(description="There is an enhance step, and it is used unless a request says no.")
    gpt_oss_model: str | None = Field(description="Own name of the enhancing model; null while none answers.")
    gpt_oss_reasoning_level: ReasoningLevel = Field(description="Used when a request names none.")


class FaultAnswer(BaseModel):
    """An error of a native route."""

    detail: str
    code: str


EVENTS: Json = {
    "text/event-stream": {
        "schema": {"type": "string", "description": "Events caption, enhancement.delta, done and error; data is JSON."}
    }
}

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultAnswer} for status in (400, 404, 413, 422, 429, 502, 503, 504)
}


def _form_schema() -> dict[str, Any]:
    schema = CaptionOptions.model_json_schema()
    schema["properties"] = {"image": {"type": "string", "format": "binary"}} | schema["properties"]
    return schema | {"title": "CaptionForm", "required": ["image"]}


CAPTION_CONTENT: dict[str, Any] = {
    "application/json": {"schema": CaptionBody.model_json_schema()},
    "multipart/form-data": {"schema": _form_schema()},
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}
