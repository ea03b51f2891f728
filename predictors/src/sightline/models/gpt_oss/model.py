"""gpt-oss: a caption to fuller prose that says nothing the caption does not imply.

Dims     B prompts · T tokens of the longest prompt
Source   https://huggingface.co/openai/gpt-oss-120b and its model card; class of transformers, unchanged.
Licence  Apache-2.0. The demonstration checkpoint is trained by `sightline/tiny`.
Traps    MXFP4 weights are silently dequantised to 233.7 GB of bf16 where the kernels are missing: refused here.
         The reasoning level is the model's own effort, a line in the system turn, not a prompt of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sightline.engines.base import Draft, Generated, IsAbandoned, OnToken, Runtime
from sightline.engines.decoding import (
    Decoder,
    Prefilled,
    Slots,
    additive,
    causal,
    generate,
    last_of,
    layers_of,
    padded,
)
from sightline.engines.text import Detokenizer
from sightline.models.gpt_oss.harmony import Answer, HarmonyTokens, Reader, parse
from sightline.models.loading import (
    LoadFailed,
    as_plain_text,
    check_kind,
    check_length,
    load_pretrained,
    model_info,
    repetition_penalty,
)
from sightline.settings import EnhanceSettings
from sightline.wire import ENHANCE_INSTRUCTIONS, ReasoningLevel, Sampling, Turn, quoted_caption


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One tokenised prompt: `input_ids` (T,) int64, on the CPU."""

    input_ids: torch.Tensor

    @property
    def cost(self) -> int:
        """Tokens."""
        return len(self.input_ids)


class GptOss:
    """A loaded gpt-oss checkpoint."""

    def __init__(self, settings: EnhanceSettings) -> None:
        """Load weights and tokenizer; slow. Raises LoadFailed."""
        check_kind(settings, "gpt_oss")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            settings.model,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            trust_remote_code=False,
        )
        self._model: Any = load_pretrained(AutoModelForCausalLM, settings)
        _refuse_dequantised(settings.model, self._model)
        self._tokens = harmony_tokens(self._tokenizer)
        self.repetition_penalty = repetition_penalty(self._model)
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype))

    def preprocess(self, turns: Sequence[Turn], level: ReasoningLevel) -> Prompt:
        """Token ids of the harmony conversation that goes on with the assistant's next turn. Thread-safe.

        turns   texts only. What they have in system turns replaces the enhancer's own instructions; without any, the
                first user turn is the caption that those speak of

        Raises InvalidParameter (422) when they are more than the model's context.
        """
        ids = self._tokenizer.apply_chat_template(
            _messages(turns),
            reasoning_effort=level,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"][0]
        check_length(self._model, len(ids))
        return Prompt(ids)

    def trial(self, image: Any) -> Prompt:  # noqa: ANN401 - which this model does not see
        """A short prompt, for the checks at start and after memory ran out."""
        return self.preprocess([Turn("user", ("a red square on a white background",))], "low")

    def generate(
        self,
        batch: Sequence[Prompt],
        sampling: Sampling,
        is_abandoned: IsAbandoned,
        on_token: OnToken | None = None,
    ) -> list[Generated]:
        """Answer a batch; see `engines.base.GenerativeModel`."""
        return generate(self, batch, sampling, is_abandoned, on_token)

    def decoder(self) -> Decoder[Prompt]:
        """An empty set of rows; see `engines.base.Decoder`."""
        return Decoder(self)

    # --- what the decoding loop needs, see `engines.decoding.Network` ---

    @property
    def stops(self) -> frozenset[int]:
        return frozenset((self._tokens.return_, self._tokens.call))

    def token_ids(self, prompt: Prompt) -> torch.Tensor:
        return prompt.input_ids

    def most_tokens(self, prompt: Prompt, sampling: Sampling) -> int:
        return sampling.max_tokens

    def result(self, prompt: Prompt, draft: Draft) -> Generated:
        return Generated(tuple(draft.token_ids), draft.finish_reason, len(prompt.input_ids))

    def see(self, prompts: Sequence[Prompt]) -> list[None]:
        return [None] * len(prompts)

    def prefill(self, prompts: Sequence[Prompt], seen: Sequence[None]) -> Prefilled:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids = padded([prompt.input_ids for prompt in prompts]).to(self._model.device)
        cache = DynamicCache()
        hidden = self._model.model(
            input_ids=ids,
            attention_mask=self._masks(lambda window: causal(ids.shape[1], ids.device, window)),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return Prefilled(self._model.lm_head(last_of(hidden, lengths)), layers_of(cache), lengths, lengths)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        hidden = self._model.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=self._masks(lambda window: slots.seen(tokens.device, window)),
            past_key_values=slots,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden[:, -1])

    def _masks(self, seen: Callable[[int | None], torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """By the kind of layer; attention with sinks takes numbers to add."""
        window, dtype = int(self._model.config.sliding_window), self._model.dtype
        return {
            "full_attention": additive(seen(None), dtype),
            "sliding_attention": additive(seen(window), dtype),
        }

    def postprocess(self, generated: Generated) -> tuple[str | None, Answer]:
        """The final channel as text, or None when the model never came to one."""
        answer = parse(generated.token_ids, self._tokens)
        if answer.final is None:
            return None, answer
        return self._decode(answer.final).strip() or None, answer

    def reader(self) -> "FinalReader":
        """Reads the final channel of one answer while it is made."""
        return FinalReader(Reader(self._tokens), Detokenizer(self._decode))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class FinalReader:
    """The final channel as text; of every other token nothing."""

    harmony: Reader
    text: Detokenizer

    def push(self, token_id: int) -> str:
        return self.text.push(token_id) if self.harmony.push(token_id) else ""


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Harmony has one developer message, at the front."""
    instructions = "\n\n".join(turn.text for turn in turns if turn.role == "system")
    messages = [{"role": turn.role, "content": as_plain_text(turn.text)} for turn in turns if turn.role != "system"]
    if not instructions:
        instructions = ENHANCE_INSTRUCTIONS
        caption = next(message for message in messages if message["role"] == "user")
        caption["content"] = quoted_caption(caption["content"])
    return [{"role": "developer", "content": as_plain_text(instructions)}, *messages]


def harmony_tokens(tokenizer: Any) -> HarmonyTokens:  # noqa: ANN401
    """Look up the control tokens. Raises LoadFailed when the tokenizer has not all of them as single tokens."""
    ids: list[int] = []
    for name in ("start", "end", "message", "channel", "return", "call"):
        token = f"<|{name}|>"
        encoded = cast("list[int]", tokenizer.encode(token, add_special_tokens=False))
        if len(encoded) != 1:
            raise LoadFailed(f"the tokenizer has no harmony token {token}")
        ids.append(encoded[0])
    final = tuple(cast("list[int]", tokenizer.encode("final", add_special_tokens=False)))
    return HarmonyTokens(*ids, final=final)


def _refuse_dequantised(name: str, model: Any) -> None:  # noqa: ANN401
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if getattr(config, "quant_method", None) == "mxfp4" and getattr(config, "dequantize", False):
        raise LoadFailed(
            f"{name}: its MXFP4 weights were dequantised to {model.dtype}, four times their size, "
            "because the kernels for them are not there; serve it with an engine that has them",
            reason="weights_dequantised",
        )
