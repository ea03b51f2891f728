"""BLIP: one image, and a text to continue if there is one, to a caption.

Dims     B prompts · T tokens of the longest prefix, begin token included · S side of the square in pixels
         N patches and the class token · D width of the vision tower
Source   https://huggingface.co/Salesforce/blip-image-captioning-base (or -large), arXiv 2201.12086; class of
         transformers, unchanged.
Licence  BSD-3-Clause. The demonstration checkpoint is trained by `sightline/tiny`.
Traps    The class's own `generate` drops the last token of every row, which in a batch of prefixes of several lengths
         is padding in one row and text in another: the two halves are called here one by one instead.
         The published tokenizer does not know the begin token's id, which is past its vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration, Cache, DynamicCache, EncoderDecoderCache

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
from sightline.errors import InvalidParameter
from sightline.models.loading import check_kind, load_pretrained, model_info, repetition_penalty
from sightline.models.pixels import Patches, SquarePixels
from sightline.settings import BlipSettings
from sightline.wire import Sampling


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One preprocessed prompt, on the CPU.

    pixel_values  (3, S, S) float32, normalised; the aspect is not kept
    input_ids     (T,) int64: the begin token and the prefix
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor

    @property
    def cost(self) -> int:
        """Patches, of 16 x 16 pixels."""
        return self.pixel_values.shape[-1] ** 2 // 256


class Blip:
    """A loaded BLIP captioning checkpoint."""

    def __init__(self, settings: BlipSettings) -> None:
        """Load weights and processor; slow. Raises LoadFailed."""
        check_kind(settings, "blip")
        self._processor: Any = AutoProcessor.from_pretrained(
            settings.model,
            revision=settings.revision,
            cache_dir=settings.cache_dir,
            trust_remote_code=False,
        )
        self._tokenizer: Any = self._processor.tokenizer
        self.pixels = SquarePixels.of(self._processor.image_processor)
        self._model: Any = load_pretrained(BlipForConditionalGeneration, settings)
        text: Any = self._model.config.text_config
        vision: Any = self._model.config.vision_config
        self._begin, self._end = int(text.bos_token_id), int(text.sep_token_id)
        self.repetition_penalty = repetition_penalty(self._model.text_decoder)
        self._half_context = int(text.max_position_embeddings) // 2
        self.image_side = int(vision.image_size)
        self.image_tokens = (self.image_side // int(vision.patch_size)) ** 2 + 1
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype))

    def preprocess(self, image: Image.Image | Patches, prefix: str = "") -> Prompt:
        """Pixels and token ids of one image and the text to continue. Thread-safe; needs no device.

        Raises InvalidParameter (422) when the prefix takes more than half of the model's context: the other half is
        for the caption, so that no caption is cut short by its company in a batch.

        image   RGB of any size, becomes a square, its aspect lost; or already Patches of `pixels`
        prefix  continued by the caption; control tokens in it are read as plain text
        """
        # BERT splits at every bracket, so the space changes nothing but that no control token matches.
        plain = prefix.replace("[", "[ ")
        prefix_ids: list[int] = self._tokenizer(plain, add_special_tokens=False)["input_ids"]
        if len(prefix_ids) >= self._half_context:
            raise InvalidParameter(
                f"The text has {len(prefix_ids)} tokens; this model continues up to {self._half_context - 1}.",
                code="prompt_too_long",
            )
        patches = image if isinstance(image, Patches) else self.pixels.patches(image)
        return Prompt(pixel_values=patches.values, input_ids=torch.tensor([self._begin, *prefix_ids]))

    def trial(self, image: Image.Image) -> Prompt:
        """A short prompt about an image, for the checks at start and after memory ran out."""
        return self.preprocess(image)

    def generate(
        self,
        batch: Sequence[Prompt],
        sampling: Sampling,
        is_abandoned: IsAbandoned,
        on_token: OnToken | None = None,
    ) -> list[Generated]:
        """Caption a batch; see `engines.base.GenerativeModel`."""
        return generate(self, batch, sampling, is_abandoned, on_token)

    def decoder(self) -> Decoder[Prompt]:
        """An empty set of rows; see `engines.base.Decoder`."""
        return Decoder(self)

    # --- what the decoding loop needs, see `engines.decoding.Network` ---

    @property
    def stops(self) -> frozenset[int]:
        return frozenset((self._end,))

    def token_ids(self, prompt: Prompt) -> torch.Tensor:
        return prompt.input_ids

    def most_tokens(self, prompt: Prompt, sampling: Sampling) -> int:
        return min(sampling.max_tokens, self._half_context)

    def result(self, prompt: Prompt, draft: Draft) -> Generated:
        return Generated(
            token_ids=tuple(draft.token_ids),
            finish_reason=draft.finish_reason,
            prompt_tokens=len(prompt.input_ids) + self.image_tokens,
            image_tokens=self.image_tokens,
        )

    def see(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """What the vision tower makes of the images, (N, D) each, for the decoder to attend to."""
        pixels = torch.stack([prompt.pixel_values for prompt in prompts]).to(self._model.device, self._model.dtype)
        return list(self._model.vision_model(pixel_values=pixels).last_hidden_state)

    def prefill(self, prompts: Sequence[Prompt], seen: Sequence[torch.Tensor]) -> Prefilled:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids = padded([prompt.input_ids for prompt in prompts]).to(self._model.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self._read(ids, causal(ids.shape[1], ids.device), torch.stack(list(seen)), cache)
        others = [tensor for layer in layers_of(cache.cross_attention_cache) for tensor in layer]
        logits = self._words(last_of(hidden, lengths))
        return Prefilled(logits, layers_of(cache.self_attention_cache), lengths, lengths, others)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        others = slots.others
        seen = _Seen(list(zip(others[::2], others[1::2], strict=True)))
        hidden = self._read(
            tokens[:, None],
            slots.seen(tokens.device),
            others[0],  # that there is an image is all that is asked of it: its keys are there
            EncoderDecoderCache(slots, seen),
            positions[:, None],
        )
        return self._words(hidden[:, -1])

    def _read(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        image: torch.Tensor,
        cache: EncoderDecoderCache,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if mask is None:  # else transformers would ask the cache for its sizes
            mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
        return self._model.text_decoder.bert(
            input_ids=ids,
            position_ids=positions,
            attention_mask=additive(mask, self._model.dtype),
            encoder_hidden_states=image,
            past_key_values=cache,
            use_cache=True,
            is_decoder=True,
        ).last_hidden_state

    def _words(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, D) → logits (B, V)."""
        return self._model.text_decoder.cls(hidden)

    def postprocess(self, prompt: Prompt, generated: Generated) -> str:
        """The caption: the prefix as the model read it (lower case) and what it said, without control tokens."""
        return self._text([*prompt.input_ids[1:].tolist(), *generated.token_ids]).strip()

    def reader(self) -> Detokenizer:
        """Reads one answer token by token, without its prefix; see `engines.base.TextReader`."""
        return Detokenizer(self._text)

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class _Seen(Cache):
    """Keys and values of images, as the decoder left them when it read the prompts."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(layers=[_SeenLayer(*layer) for layer in layers])  # type: ignore[arg-type]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.layers[layer_idx].keys.shape[-2])  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True, eq=False)
class _SeenLayer:
    keys: torch.Tensor
    values: torch.Tensor
