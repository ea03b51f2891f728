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
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

from sightline.engines.base import Generated, IsAbandoned, OnToken, Runtime
from sightline.engines.hf import generate_tokens
from sightline.engines.text import Detokenizer
from sightline.errors import InvalidParameter
from sightline.models.loading import check_kind, load_pretrained, model_info
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
        self._model: Any = load_pretrained(BlipForConditionalGeneration, settings)
        text: Any = self._model.config.text_config
        vision: Any = self._model.config.vision_config
        self._begin, self._end, self._pad = int(text.bos_token_id), int(text.sep_token_id), int(text.pad_token_id)
        self._half_context = int(text.max_position_embeddings) // 2
        self.image_side = int(vision.image_size)
        self.image_tokens = (self.image_side // int(vision.patch_size)) ** 2 + 1
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype))

    def preprocess(self, image: Image.Image, prefix: str = "") -> Prompt:
        """Pixels and token ids of one image and the text to continue. Thread-safe; needs no device.

        Raises InvalidParameter (422) when the prefix takes more than half of the model's context: the other half is
        for the caption, so that no caption is cut short by its company in a batch.

        image   RGB of any size; becomes a square, its aspect lost
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
        pixels: torch.Tensor = self._processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return Prompt(pixel_values=pixels, input_ids=torch.tensor([self._begin, *prefix_ids]))

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
        rows = generate_tokens(
            self._model.text_decoder,
            self._collate(batch) | self._seen(batch),
            replace(sampling, max_tokens=min(sampling.max_tokens, self._half_context)),
            is_abandoned,
            on_token,
            eos_token_ids=(self._end,),
            pad_token_id=self._pad,
        )
        return [
            Generated(
                token_ids=ids,
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompt.input_ids) + self.image_tokens,
                image_tokens=self.image_tokens,
            )
            for prompt, (ids, stopped) in zip(batch, rows, strict=True)
        ]

    def postprocess(self, prompt: Prompt, generated: Generated) -> str:
        """The caption: the prefix as the model read it (lower case) and what it said, without control tokens."""
        return self._text([*prompt.input_ids[1:].tolist(), *generated.token_ids]).strip()

    def reader(self) -> Detokenizer:
        """Reads one answer token by token, without its prefix; see `engines.base.TextReader`."""
        return Detokenizer(self._text)

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _seen(self, batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """What the vision tower makes of the images, (B, N, D), for the decoder to attend to."""
        pixels = torch.stack([prompt.pixel_values for prompt in batch]).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            return {"encoder_hidden_states": self._model.vision_model(pixel_values=pixels).last_hidden_state}

    def _collate(self, batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Left-pad the prefixes to (B, T)."""
        length = max(len(prompt.input_ids) for prompt in batch)
        ids = torch.full((len(batch), length), self._pad)
        mask = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, prompt in enumerate(batch):
            ids[row, length - len(prompt.input_ids) :] = prompt.input_ids
            mask[row, length - len(prompt.input_ids) :] = 1
        device = self._model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
