"""Kimi-VL: images and text to text, in 16, 8 or 4 bits, experts on the CPU where the GPU is too small.

Dims     B prompts · T tokens of the longest prompt · P patches of all images, before merging, one after the other
Source   https://huggingface.co/moonshotai/Kimi-VL-A3B-Instruct, arXiv 2504.07491; the port is in this package.
Licence  MIT. The demonstration checkpoint is trained by `sightline/tiny`.
Traps    the published chat template adds a system turn where a conversation has none: turns are written here instead.
         Text is tokenised apart from control tokens, so that a prompt holding `[EOS]` or `<|media_pad|>` holds text.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from sightline.engines.base import Draft, Generated, IsAbandoned, OnToken, Runtime
from sightline.engines.decoding import Decoder, Prefilled, Slots, generate, last_of, layers_of, padded
from sightline.engines.images import ImageCache, content_hash
from sightline.engines.text import Detokenizer
from sightline.errors import InternalError
from sightline.images import scaled
from sightline.models.kimi_vl.processing import control_ids
from sightline.models.kimi_vl.quantize import Room, Scheme, bytes_per_dtype
from sightline.models.loading import (
    LoadFailed,
    check_kind,
    check_length,
    is_elsewhere,
    model_info,
    repetition_penalty,
    without_weights,
)
from sightline.settings import GenerateSettings, cpu_quota
from sightline.wire import Sampling

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, Sequence[str | Image.Image]]
"""Who speaks, and the texts and images in the order in which they stand."""

GPU_SHARE = 0.85
"""Of a GPU's free memory, what weights may take when nothing is said: the rest is for activations and the cache."""

_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(K|M|G|T)?(i)?B?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One preprocessed conversation, on the CPU.

    input_ids       (T,) int64
    pixel_values    (P, 3, side, side) float32, normalised patches; None without images
    image_grid_thw  (images, 3) int64, one frame, then patches in height and width
    image_key       of its images' content, where embeddings are kept
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_tokens: int
    image_key: bytes | None = None

    @property
    def cost(self) -> int:
        """Tokens and patches."""
        return len(self.input_ids) + (0 if self.pixel_values is None else len(self.pixel_values))


class KimiVL:
    """A loaded Kimi-VL checkpoint."""

    def __init__(self, settings: GenerateSettings) -> None:
        """Load weights and processor; slow. Raises LoadFailed."""
        torch.set_num_threads(settings.threads or cpu_quota())
        check_kind(settings, "kimi_vl")
        where: dict[str, Any] = {
            "revision": settings.revision,
            "cache_dir": settings.cache_dir,
            "trust_remote_code": False,
        }
        processor: Any = AutoProcessor.from_pretrained(settings.model, **where)
        self._tokenizer: Any = processor.tokenizer
        self._image_processor: Any = processor.image_processor
        self.quantization = _scheme(settings, where)
        self._model: Any = (
            without_weights(AutoModelForImageTextToText, settings)
            if is_elsewhere(settings)
            else AutoModelForImageTextToText.from_pretrained(
                settings.model,
                dtype=settings.dtype,
                quantization=self.quantization,
                rooms=_rooms(settings),
                **where,
            )
        )
        self._ids = control_ids(self._tokenizer, self._model.config.image_token_id)
        # A copy of its own: transformers sets this switch anew at every call of the tokenizer.
        self._text: Any = copy.deepcopy(self._tokenizer.backend_tokenizer)
        self._text.encode_special_tokens = True  # control tokens in a text are text
        self._eos = _eos_token_ids(self._model, self._ids)
        self._text_model: Any = self._model.model.language_model
        self._image_token_id = int(self._model.config.image_token_id)
        self._images = ImageCache(settings.model_name, settings.image_cache_mib << 20)
        self.repetition_penalty = repetition_penalty(self._model)
        self.info = model_info(self._model, settings)
        self.runtime = Runtime("hf", str(self._model.device), str(self._model.dtype), bytes_per_dtype(self._model))

    def preprocess(self, images: Sequence[Image.Image], text: str, system: str | None = None) -> Prompt:
        """One question about any number of images, which come before the text. See `preprocess_chat`."""
        turns: list[Message] = [("system", [system])] if system else []
        return self.preprocess_chat([*turns, ("user", [*images, text])])

    def preprocess_chat(self, messages: Sequence[Message], *, at_half: bool = False) -> Prompt:
        """Patches and token ids of a conversation that the assistant is to go on with. Thread-safe; needs no device.

        Raises InvalidParameter (422, prompt_too_long) when they are more than the model's context.

        messages   RGB images of any size; larger ones are shrunk to the processor's limit of patches
        at_half    half the pixels of each image that the model would see otherwise
        """
        images = [part for _, parts in messages for part in parts if not isinstance(part, str)]
        if at_half:
            images = [scaled(image, self._seen_pixels(image) / 2) for image in images]
        pixels, grids = self._patches(images)
        counts = [int(grid.prod()) // self._image_processor.merge_size**2 for grid in grids]
        if len(counts) != len(images) or 0 in counts:
            raise InternalError("The model would not have seen an image.", code="image_not_seen")
        waiting = iter(counts)
        ids: list[int] = []
        for role, parts in messages:
            ids += self._speaker(role)
            for part in parts:
                ids += self._encode(part) if isinstance(part, str) else self._image(next(waiting))
            ids.append(self._ids["<|im_end|>"])
        ids += self._speaker("assistant")
        check_length(self._model, len(ids))
        key = content_hash(pixels, grids) if pixels is not None and self._images.is_on else None
        return Prompt(torch.tensor(ids), pixels, grids if images else None, sum(counts), key)

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

    def see(self, prompts: Sequence[Prompt]) -> list[torch.Tensor | None]:
        """For each prompt with images what stands in the places of its image tokens, (image tokens, D)."""
        sighted = [prompt for prompt in prompts if prompt.pixel_values is not None]
        keys = [prompt.image_key for prompt in sighted]
        parts = iter(self._images.seen(keys, lambda places: self._see([sighted[at] for at in places])))
        return [None if prompt.pixel_values is None else next(parts) for prompt in prompts]

    def _see(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts if prompt.image_grid_thw is not None])
        found = self._model.model.get_image_features(
            torch.cat(pixels).to(self._model.device), grids.to(self._model.device), return_dict=True
        )
        return list(torch.cat(found.pooler_output).split([prompt.image_tokens for prompt in prompts]))

    def prefill(self, prompts: Sequence[Prompt], seen: Sequence[torch.Tensor | None]) -> Prefilled:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids = padded([prompt.input_ids for prompt in prompts]).to(self._model.device)
        places = padded([prompt.input_ids == self._image_token_id for prompt in prompts]).to(ids.device)
        embedded = self._text_model.embed_tokens(ids.masked_fill(places, 0))
        if images := [image for image in seen if image is not None]:
            embedded[places] = torch.cat(images).to(embedded.device, embedded.dtype)
        cache = DynamicCache()
        hidden = self._text_model(  # causal, and padding comes last
            inputs_embeds=embedded, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return Prefilled(self._model.lm_head(last_of(hidden, lengths)), layers_of(cache), lengths, lengths)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        mask = slots.seen(tokens.device)
        if mask is None:  # else transformers would ask the cache for its sizes
            mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=tokens.device)
        hidden = self._text_model(
            inputs_embeds=self._text_model.embed_tokens(tokens[:, None]),
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=slots,
            use_cache=True,
        ).last_hidden_state
        return self._model.lm_head(hidden[:, -1])

    def postprocess(self, generated: Generated) -> str:
        """The text of an answer, control tokens removed, stripped."""
        return self._decode(generated.token_ids).strip()

    def reader(self) -> Detokenizer:
        """Reads one answer while it is made."""
        return Detokenizer(self._decode)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _seen_pixels(self, image: Image.Image) -> int:
        processor = self._image_processor
        return min(image.width * image.height, int(processor.max_patches) * int(processor.patch_size) ** 2)

    def _patches(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not images:
            return None, torch.empty((0, 3), dtype=torch.int64)
        patches = self._image_processor(list(images), return_tensors="pt")
        return patches["pixel_values"], patches["image_grid_thw"]

    def _speaker(self, role: Role) -> list[int]:
        return [self._ids[f"<|im_{role}|>"], *self._encode(role), self._ids["<|im_middle|>"]]

    def _image(self, tokens: int) -> list[int]:
        start = [self._ids["<|media_start|>"], *self._encode("image"), self._ids["<|media_content|>"]]
        return [*start, *[self._ids["<|media_pad|>"]] * tokens, self._ids["<|media_end|>"]]

    def _encode(self, text: str) -> list[int]:
        return cast("list[int]", self._text.encode(text, add_special_tokens=False).ids)


def _scheme(settings: GenerateSettings, where: dict[str, Any]) -> Scheme:
    """`auto`: 8 bits, but none for a checkpoint of ours, which is small."""
    if settings.quantization != "auto":
        return settings.quantization
    if is_elsewhere(settings):
        return "none"
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model, **where)
    return "none" if getattr(config, "sightline_demo_model", False) else "8bit"


def _rooms(settings: GenerateSettings) -> list[Room]:
    """The GPUs, when there are any and they are wanted, then the CPU."""
    cpu = Room(torch.device("cpu"), _bytes(settings.max_memory_cpu))
    use_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return [cpu]
    limit = _bytes(settings.max_memory_gpu)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not gpus:
        raise LoadFailed("device is cuda and there is no GPU")
    free = [limit if limit is not None else int(GPU_SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus]
    return [*(Room(gpu, size) for gpu, size in zip(gpus, free, strict=True)), cpu]


def _bytes(text: str | None) -> int | None:
    """`20GiB`, `500 MB` or `1000` in bytes. Raises LoadFailed."""
    if text is None:
        return None
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise LoadFailed(f"{text!r} is not an amount of memory, such as 20GiB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _eos_token_ids(model: Any, ids: dict[str, int]) -> tuple[int, ...]:  # noqa: ANN401
    """What ends an answer: the checkpoint's own, and whatever else ends a turn or a document."""
    own = model.generation_config.eos_token_id
    named = [ids[token] for token in ("<|im_end|>", "[EOS]", "[EOT]")]
    return tuple(dict.fromkeys([*(own if isinstance(own, list) else [own] if own is not None else []), *named]))
