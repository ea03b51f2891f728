"""Qwen2-VL and Qwen2.5-VL: images and text to text.

Dims     B prompts · T tokens of the longest prompt · P patches before merging, all images packed · D patch width
Source   https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, arXiv 2502.13923; class of transformers, unchanged.
Licence  Apache-2.0 (7B). The demonstration checkpoint is trained by `sightline/tiny`.
Traps    `mm_token_type_ids` must reach the model: without it positions silently fall back to one dimension.
         A prompt without image tokens means that the model would answer blind: refused here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from sightline import golden
from sightline.engines.base import Draft, Generated, IsAbandoned, OnToken, Runtime
from sightline.engines.decoding import Decoder, Prefilled, Slots, causal, generate, last_of, layers_of, padded
from sightline.engines.images import ImageCache, content_hash
from sightline.engines.text import Detokenizer
from sightline.errors import InternalError
from sightline.models.layers import PatchMatrix
from sightline.models.loading import (
    Quantization,
    as_plain_text,
    check_kind,
    check_length,
    load_pretrained,
    model_info,
    repetition_penalty,
)
from sightline.models.pixels import Patches, QwenPixels
from sightline.settings import DescribeSettings
from sightline.wire import Sampling

Message = tuple[Literal["system", "user", "assistant"], Sequence[str | Image.Image | Patches]]
"""Who speaks, and the texts and images in the order in which they stand."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One preprocessed prompt, on the CPU.

    input_ids       (T,) int64
    token_types     (T,) int64, 1 where a token stands for an image patch
    pixel_values    (P, D) float32, normalised patches
    image_grid_thw  (images, 3) int64, patches in time, height, width
    positions       (3, T) int64, in time, height, width
    next_position   of the first new token, in all three
    image_key       of its images' content, where embeddings are kept
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    image_tokens: int
    positions: torch.Tensor
    next_position: int
    image_key: bytes | None = None

    @property
    def cost(self) -> int:
        """Tokens and patches."""
        return len(self.input_ids) + len(self.pixel_values)


class QwenVL:
    """A loaded Qwen-VL checkpoint."""

    def __init__(self, settings: DescribeSettings) -> None:
        """Load weights and processor; slow. Raises LoadFailed."""
        check_kind(settings, "qwen2_vl", "qwen2_5_vl")
        self._processor: Any = AutoProcessor.from_pretrained(
            settings.model,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            trust_remote_code=False,
        )
        self._tokenizer: Any = self._processor.tokenizer
        self._model: Any = load_pretrained(
            AutoModelForImageTextToText,
            settings,
            Quantization(settings.load_8bit, settings.max_memory_gpu, settings.max_memory_cpu),
        )
        self.pixels = QwenPixels.of(self._processor.image_processor)
        self._image_token = str(self._processor.image_token)
        self._image_token_id = int(self._model.config.image_token_id)
        self._eos = _eos_token_ids(self._model, self._tokenizer)
        patches: Any = self._model.model.visual.patch_embed
        patches.proj = PatchMatrix(patches.proj)
        self._text_model: Any = self._model.model.language_model
        self._images = ImageCache(settings.model_name, settings.image_cache_mib << 20)
        self.repetition_penalty = repetition_penalty(self._model)
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype))

    def preprocess(self, image: Image.Image, prompt: str) -> Prompt:
        """One image and its prompt. See `preprocess_chat`."""
        return self.preprocess_chat([("user", [image, prompt])])

    def preprocess_chat(self, messages: Sequence[Message], *, at_half: bool = False) -> Prompt:
        """Patches and token ids of a conversation that the assistant is to go on with. Thread-safe; needs no device.

        messages  who speaks, and the texts and images in the order in which they stand; at least one image, RGB of any
                  size or already Patches of `pixels`
        at_half   half the pixels of each image that the model would see otherwise; Patches are taken as they are

        Raises InvalidParameter (422) when they are more than the model's context.
        """
        conversation = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in messages]
        text = str(self._processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        prepare = self.pixels.halved if at_half else self.pixels.patches
        parts = [part for _, said in messages for part in said if not isinstance(part, str)]
        images = [part if isinstance(part, Patches) else prepare(part) for part in parts]
        counts = [int(image.grid.prod()) // self.pixels.merge**2 for image in images]
        input_ids = torch.tensor(self._tokenizer(self._with_places(text, counts))["input_ids"])
        is_image = input_ids == self._image_token_id
        if not counts or 0 in counts or int(is_image.sum()) != sum(counts):
            raise InternalError("The model would not have seen the image.", code="image_not_seen")
        check_length(self._model, len(input_ids))
        token_types, grids = is_image.to(torch.int64), torch.cat([image.grid for image in images])
        pixels = torch.cat([image.values for image in images])
        positions, offset = self._model.model.get_rope_index(input_ids[None], token_types[None], image_grid_thw=grids)
        return Prompt(
            input_ids=input_ids,
            token_types=token_types,
            pixel_values=pixels,
            image_grid_thw=grids,
            image_tokens=sum(counts),
            positions=positions[:, 0],
            next_position=len(input_ids) + int(offset),
            image_key=content_hash(pixels, grids) if self._images.is_on else None,
        )

    def _with_places(self, text: str, counts: Sequence[int]) -> str:
        """The text with as many image tokens in each image's place as the image has; as the processor writes it."""
        before, *behind = text.split(self._image_token)
        if len(behind) != len(counts):
            raise InternalError("The model would not have seen the image.", code="image_not_seen")
        pairs = zip(counts, behind, strict=True)
        return before + "".join(self._image_token * count + rest for count, rest in pairs)

    def trial(self, image: Image.Image) -> Prompt:
        """A short prompt about an image, for the checks at start and after memory ran out."""
        return self.preprocess(image, golden.PROMPT)

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
        return frozenset(self._eos)

    def token_ids(self, prompt: Prompt) -> torch.Tensor:
        return prompt.input_ids

    def most_tokens(self, prompt: Prompt, sampling: Sampling) -> int:
        return sampling.max_tokens

    def result(self, prompt: Prompt, draft: Draft) -> Generated:
        return Generated(
            token_ids=tuple(draft.token_ids),
            finish_reason=draft.finish_reason,
            prompt_tokens=len(prompt.input_ids),
            image_tokens=prompt.image_tokens,
        )

    def see(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """For each prompt what stands in the places of its image tokens, (image tokens, D)."""
        keys = [prompt.image_key for prompt in prompts]
        return self._images.seen(keys, lambda places: self._see([prompts[at] for at in places]))

    def _see(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        pixels = torch.cat([prompt.pixel_values for prompt in prompts]).to(self._model.device)
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts]).to(self._model.device)
        images = torch.cat(self._model.model.get_image_features(pixels, grids, return_dict=True).pooler_output)
        return list(images.split([prompt.image_tokens for prompt in prompts]))

    def prefill(self, prompts: Sequence[Prompt], seen: Sequence[torch.Tensor]) -> Prefilled:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids = padded([prompt.input_ids for prompt in prompts]).to(self._model.device)
        places = padded([prompt.input_ids == self._image_token_id for prompt in prompts]).to(ids.device)
        embedded = self._text_model.embed_tokens(ids)
        embedded[places] = torch.cat(list(seen)).to(embedded.device, embedded.dtype)
        positions = padded([prompt.positions.T for prompt in prompts]).permute(2, 0, 1).to(ids.device)
        cache = DynamicCache()
        hidden = self._text_model(
            inputs_embeds=embedded,
            position_ids=positions,
            # None is causal, and padding comes last.
            attention_mask=self._masks(lambda window: window and causal(ids.shape[1], ids.device, window)),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self._model.lm_head(last_of(hidden, lengths))
        return Prefilled(logits, layers_of(cache), lengths, [prompt.next_position for prompt in prompts])

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        hidden = self._text_model(
            inputs_embeds=self._text_model.embed_tokens(tokens[:, None]),
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask=self._masks(lambda window: slots.seen(tokens.device, window)),
            past_key_values=slots,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden[:, -1])

    def _masks(self, seen: Callable[[int | None], Any]) -> dict[str, Any]:
        """By the kind of layer; few checkpoints have layers with a window."""
        masks = {"full_attention": seen(None)}
        if self._text_model.has_sliding_layers:
            masks["sliding_attention"] = seen(int(self._text_model.config.sliding_window))
        return masks

    def postprocess(self, generated: Generated) -> str:
        """The text of an answer, control tokens removed, stripped (contract A8)."""
        return self._decode(generated.token_ids).strip()

    def reader(self) -> Detokenizer:
        """Reads one answer while it is made."""
        return Detokenizer(self._decode)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _content(part: str | Image.Image | Patches) -> dict[str, str]:
    return {"type": "text", "text": as_plain_text(part)} if isinstance(part, str) else {"type": "image"}


def _eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:  # noqa: ANN401
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
