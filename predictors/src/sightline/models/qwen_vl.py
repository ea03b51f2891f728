"""Qwen2-VL and Qwen2.5-VL: images and text to text.

Dims     B prompts · T tokens of the longest prompt · P patches before merging, all images packed · D patch width
Source   https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, arXiv 2502.13923; class of transformers, unchanged.
Licence  Apache-2.0 (7B). The demonstration checkpoint is trained by `sightline/tiny`.
Traps    `mm_token_type_ids` must reach the model: without it positions silently fall back to one dimension.
         A prompt without image tokens means that the model would answer blind: refused here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sightline import golden
from sightline.engines.base import Generated, IsAbandoned, OnToken, Runtime
from sightline.engines.hf import generate_tokens
from sightline.engines.text import Detokenizer
from sightline.errors import InternalError
from sightline.images import scaled
from sightline.models.loading import (
    Quantization,
    as_plain_text,
    check_kind,
    check_length,
    load_pretrained,
    model_info,
)
from sightline.settings import DescribeSettings
from sightline.wire import Sampling

Message = tuple[Literal["system", "user", "assistant"], Sequence[str | Image.Image]]
"""Who speaks, and the texts and images in the order in which they stand."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One preprocessed prompt, on the CPU.

    input_ids       (T,) int64
    token_types     (T,) int64, 1 where a token stands for an image patch
    pixel_values    (P, D) float32, normalised patches
    image_grid_thw  (images, 3) int64, patches in time, height, width
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    image_tokens: int


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
        self._image_token_id = int(self._model.config.image_token_id)
        self._eos = _eos_token_ids(self._model, self._tokenizer)
        self._pad = int(self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._eos[0])
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype))

    def preprocess(self, image: Image.Image, prompt: str) -> Prompt:
        """One image and its prompt. See `preprocess_chat`."""
        return self.preprocess_chat([("user", [image, prompt])])

    def preprocess_chat(self, messages: Sequence[Message], *, at_half: bool = False) -> Prompt:
        """Patches and token ids of a conversation that the assistant is to go on with. Thread-safe; needs no device.

        messages  who speaks, and the texts and RGB images in the order in which they stand; at least one image. The
                  processor resizes them to multiples of its patch size within its pixel budget
        at_half   half the pixels of each image that the model would see otherwise

        Raises InvalidParameter (422) when they are more than the model's context.
        """
        conversation = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in messages]
        text = self._processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        images = [part for _, parts in messages for part in parts if not isinstance(part, str)]
        options: dict[str, Any] = {}
        if at_half:
            budgets = [self._seen_pixels(image) // 2 for image in images]
            images = [scaled(image, budget) for image, budget in zip(images, budgets, strict=True)]
            size = {"shortest_edge": self._patch_side**2, "longest_edge": max(budgets)}
            options["images_kwargs"] = {"size": size}
        inputs = self._processor(text=[text], images=images, return_tensors="pt", **options)
        input_ids = inputs["input_ids"][0]
        image_tokens = int((input_ids == self._image_token_id).sum())
        if image_tokens == 0 or len(inputs["image_grid_thw"]) != len(images):
            raise InternalError("The model would not have seen the image.", code="image_not_seen")
        check_length(self._model, len(input_ids))
        return Prompt(
            input_ids=input_ids,
            token_types=inputs["mm_token_type_ids"][0],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            image_tokens=image_tokens,
        )

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
        inputs = self._collate(batch)
        rows = generate_tokens(
            self._model,
            inputs,
            sampling,
            is_abandoned,
            on_token,
            eos_token_ids=self._eos,
            pad_token_id=self._pad,
        )
        return [
            Generated(
                token_ids=ids,
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompt.input_ids),
                image_tokens=prompt.image_tokens,
            )
            for prompt, (ids, stopped) in zip(batch, rows, strict=True)
        ]

    def postprocess(self, generated: Generated) -> str:
        """The text of an answer, control tokens removed, stripped (contract A8)."""
        return self._decode(generated.token_ids).strip()

    def reader(self) -> Detokenizer:
        """Reads one answer while it is made."""
        return Detokenizer(self._decode)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    @property
    def _patch_side(self) -> int:
        """Pixels of a side of what becomes one token."""
        processor = self._processor.image_processor
        return int(processor.patch_size) * int(processor.merge_size)

    def _seen_pixels(self, image: Image.Image) -> int:
        size = self._processor.image_processor.size
        height, width = smart_resize(
            image.height,
            image.width,
            factor=self._patch_side,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return height * width

    def _collate(self, batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Left-pad a batch to (B, T); patches of all images one after the other."""
        length = max(len(prompt.input_ids) for prompt in batch)
        padded = [_left_padded(prompt, length, self._pad) for prompt in batch]
        mask = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, prompt in enumerate(batch):
            mask[row, length - len(prompt.input_ids) :] = 1
        inputs = {
            "input_ids": torch.stack([prompt.input_ids for prompt in padded]),
            "mm_token_type_ids": torch.stack([prompt.token_types for prompt in padded]),
            "attention_mask": mask,
            "pixel_values": torch.cat([prompt.pixel_values for prompt in batch]),
            "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in batch]),
        }
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}


def _content(part: str | Image.Image) -> dict[str, str]:
    return {"type": "text", "text": as_plain_text(part)} if isinstance(part, str) else {"type": "image"}


def _left_padded(prompt: Prompt, length: int, pad: int) -> Prompt:
    missing = length - len(prompt.input_ids)
    return replace(
        prompt,
        input_ids=torch.nn.functional.pad(prompt.input_ids, (missing, 0), value=pad),
        token_types=torch.nn.functional.pad(prompt.token_types, (missing, 0), value=0),
    )


def _eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:  # noqa: ANN401
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
