"""KServe V2 to a predictor of ours: images as raw bytes, answers with usage and model in their parameters."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

import orjson

from sightline import v2
from sightline.engines.dialect import (
    BY_STATUS,
    Assembly,
    Outgoing,
    Spoken,
    StepMetadata,
    StepName,
    as_code,
    as_object,
    as_text,
    count,
    refused,
)
from sightline.errors import NotSupported, SightlineError
from sightline.wire import Completion, ImageBytes, ModelInfo, ReasoningLevel, Sampling, Turn, Usage

MAX_MESSAGE_CHARACTERS = 500


class V2:
    """See `Dialect`."""

    is_streaming = False

    def __init__(self, base_url: str, model: str) -> None:
        self._url = f"{base_url.rstrip('/')}/v2/models/{quote(model, safe='')}"

    def describing(self, image: ImageBytes, prompt: str | None, sampling: Sampling, request_id: str) -> Outgoing:
        inputs = [v2.Tensor.of_bytes("image", [image.data])]
        if prompt is not None:
            inputs.append(v2.Tensor.of_texts("prompt", [prompt]))
        return self._infer(v2.InferRequest(tuple(inputs), _parameters(sampling), id=request_id))

    def enhancing(self, caption: str, level: ReasoningLevel, sampling: Sampling, request_id: str) -> Outgoing:
        inputs = (v2.Tensor.of_texts("text", [caption]),)
        parameters = _parameters(sampling) | {"reasoning_level": level}
        return self._infer(v2.InferRequest(inputs, parameters, id=request_id))

    def chatting(self, turns: Sequence[Turn], sampling: Sampling, level: ReasoningLevel | None) -> Outgoing:
        raise NotSupported("V2 has no conversations.")

    def streamed(self, outgoing: Outgoing) -> Outgoing:
        raise NotSupported("V2 over REST does not stream.")

    def assembly(self) -> Assembly:
        raise NotSupported("V2 over REST does not stream.")

    def completion(self, content: bytes, headers: Mapping[str, str], milliseconds: float) -> Completion:
        response = v2.parse_response(content, headers.get(v2.HEADER_LENGTH))
        output = response.output("text")
        if output is None:
            raise ValueError("no output 'text'")
        (text,) = output.texts()
        said = response.parameters
        model, revision = said.get("model"), said.get("model_revision")
        if not isinstance(model, str) or not isinstance(revision, str):
            raise ValueError("no model or revision")
        reason = said.get("finish_reason", "stop")
        if reason not in ("stop", "length"):
            raise ValueError("unknown finish_reason")
        return Completion(
            text=text,
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=count(said.get("prompt_tokens")),
                completion_tokens=count(said.get("completion_tokens")),
                image_tokens=count(said.get("image_tokens")),
                reasoning_tokens=count(said.get("reasoning_tokens")),
            ),
            model=ModelInfo(model, revision, demo=said.get("demo_model") is True),
            milliseconds=float(said.get("milliseconds", 0)),
            downscaled=said.get("downscaled") is True,
        )

    def spoken(self, status: int, content: bytes) -> Spoken:
        """A body with code and words was said by a predictor of ours, about this request."""
        try:
            body: object = orjson.loads(content)
        except orjson.JSONDecodeError:
            return Spoken()
        fields = as_object(body) or {}
        code, sentence = as_code(fields.get("code")), as_text(fields.get("error"))
        if code is None or sentence is None:
            return Spoken()
        return Spoken(code, sentence[:MAX_MESSAGE_CHARACTERS])

    def fault(self, status: int, spoken: Spoken, step: StepName) -> SightlineError | None:
        """Without a code the answer comes from something in between: then a 502 or 504 is an outage."""
        known = BY_STATUS.get(status)
        if known is None or (spoken.code is None and status >= 500):
            return None
        return known(spoken.sentence or refused(step), code=spoken.code)

    def learns(self, status: int, content: bytes) -> bool:
        return False

    def key(self, api_key: str) -> Mapping[str, str]:
        return {"x-api-key": api_key}

    def ready_url(self) -> str:
        return f"{self._url}/ready"

    def is_ready(self, status: int, answer: object) -> bool:
        said = as_object(answer)
        return status == 200 and said is not None and said.get("ready", True) is True

    def metadata_url(self) -> str:
        return self._url

    def metadata(self, answer: Mapping[str, object]) -> StepMetadata:
        said = as_object(answer.get("parameters")) or {}
        return StepMetadata(
            model=as_text(said.get("model")),
            revision=as_text(said.get("model_revision")),
            demo=said.get("demo_model") is True,
            device=as_text(said.get("device")),
            backend=as_text(said.get("backend")),
            dtype=as_text(said.get("dtype")),
            reasoning_level=as_text(said.get("reasoning_level")),
        )

    def _infer(self, request: v2.InferRequest) -> Outgoing:
        body, header_length = v2.render_request(request)
        headers = {"content-type": "application/octet-stream", v2.HEADER_LENGTH: str(header_length)}
        return Outgoing(f"{self._url}/infer", body, headers)


def _parameters(sampling: Sampling) -> dict[str, v2.Scalar]:
    parameters: dict[str, v2.Scalar] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed
    return parameters
