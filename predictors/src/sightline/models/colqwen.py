"""ColQwen2.5: page images and queries to multi-vector embeddings.

Dims     B items of a forward · T tokens of an item · P patches before merging, all pages of a forward packed ·
         D embedding width (128)
Source   https://huggingface.co/vidore/colqwen2.5-v0.2 (a LoRA adapter over vidore/colqwen2.5-base), arXiv 2407.01449;
         classes, prompts and pooling of colpali_engine 0.3.18.
Licence  MIT (adapter), Qwen Research (base, from Qwen2.5-VL-3B). The demonstration checkpoint is trained by
         `sightline/tiny`.
Differs  We run the backbone ourselves: one forward takes pages and queries together, padded on the right (attention is
         causal, so padding changes nothing and is cut off), patches packed, only the last hidden state kept.
Traps    colpali_engine's adapter loading has re-initialised weights without a word (colpali#413): every key of base and
         adapter is accounted for here. `mm_token_type_ids` must reach the model, else positions fall back to one
         dimension: tried at start. A zero row under the projection is 0/0: normalised with an epsilon, and refused.
         `get_n_patches` takes (width, height), whatever its docstring says.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from colpali_engine.compression.token_pooling import HierarchicalTokenPooler
from colpali_engine.models import ColQwen2_5, ColQwen2_5_Processor
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLModel
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from sightline.engines.base import IsAbandoned, Runtime
from sightline.engines.packing import packs
from sightline.errors import DeadlineExceeded, InternalError, InvalidParameter, SightlineError
from sightline.models.layers import PatchMatrix
from sightline.models.loading import LoadFailed, as_plain_text, check_kind, check_length, load_pretrained, model_info
from sightline.models.pixels import Patches, QwenPixels
from sightline.settings import EmbedSettings

EPSILON = 1e-12

GOLDEN_QUERY = "a large red circle on a white background"
"""With the picture of `golden_page` the fixed input of the start-up checks and of the checksum in /info."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One preprocessed page or query, on the CPU, un-padded.

    input_ids     (T,) int64
    token_types   (T,) int64, 1 where a token stands for an image patch
    pixel_values  (P, patch width) float32, normalised patches; None for a query
    grid          (1, 3) int64, patches in time, height, width before merging; None for a query
    patches       (n_patches_x, n_patches_y) after merging; None for a query
    span          first image token and their number; None for a query
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    patches: tuple[int, int] | None = None
    span: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


Vectors = NDArray[np.float32]
"""(T, D) float32, unit rows, one for each token of the un-padded sequence."""


class ColQwen:
    """A loaded ColQwen2.5 checkpoint, merged or base and adapter."""

    def __init__(self, settings: EmbedSettings) -> None:
        """Load weights and processor, and try them; slow. Raises LoadFailed."""
        self._max_batch = settings.max_batch
        self._max_batch_tokens = settings.max_batch_tokens
        adapter = _Adapter.find(settings)
        base = settings if adapter is None else replace_model(settings, settings.base_model or adapter.base)
        check_kind(base, "qwen2_5_vl", "colqwen2_5")
        model: Any = load_pretrained(_ColQwen, base)
        self.info = model_info(model, base)
        if adapter is not None:
            model = adapter.merged_into(model)
            self.info = replace(self.info, name=adapter.name, revision=adapter.revision)
        self.flash_attention = _use_flash_attention(model)
        model.visual.patch_embed.proj = PatchMatrix(model.visual.patch_embed.proj)
        self._model = model
        self._processor: Any = ColQwen2_5_Processor.from_pretrained(
            settings.model, revision=settings.revision, cache_dir=settings.cache_dir, trust_remote_code=False
        )
        self.pixels = QwenPixels.of(self._processor.image_processor)
        self._page = _PagePrompt.of(self._processor)
        self.runtime = Runtime("hf", str(model.device), str(model.dtype))
        self.dim = int(model.custom_text_proj.out_features)
        self.spatial_merge_size = int(model.spatial_merge_size)
        self.image_token_id = int(model.config.image_token_id)
        self.augmentation = self._trailing_augmentation()
        self.golden = self._checked()

    # --- preprocess ---

    def preprocess_page(self, image: Image.Image | Patches, *, is_halved: bool = False) -> Item:
        """Patches and token ids of one page. Thread-safe; needs no device.

        image       RGB of any size, or already Patches of `pixels`
        is_halved   show the model half of the pixels that it would see; Patches are taken as they are

        Raises InvalidParameter (422) when they are more than the model's context.
        """
        prepare = self.pixels.halved if is_halved else self.pixels.patches
        patches = image if isinstance(image, Patches) else prepare(image)
        _, rows, columns = (int(number) for number in patches.grid[0])
        across, down = columns // self.spatial_merge_size, rows // self.spatial_merge_size
        ids, start = self._page.ids(across * down)
        check_length(self._model, len(ids))
        return Item(
            input_ids=ids,
            token_types=(ids == self.image_token_id).to(torch.int64),
            pixel_values=patches.values,
            grid=patches.grid,
            patches=(across, down),
            span=(start, across * down),
        )

    def preprocess_query(self, text: str) -> Item:
        """Token ids of one query, augmentation tokens included. Thread-safe; needs no device.

        Raises InvalidParameter (422) when they are more than the model's context.
        """
        inputs = self._processor.process_queries(texts=[as_plain_text(text)])
        ids = inputs["input_ids"][0]
        check_length(self._model, len(ids))
        return Item(input_ids=ids, token_types=torch.zeros_like(ids))

    def patches(self, width: int, height: int) -> tuple[int, int]:
        """(n_patches_x, n_patches_y) of a page of this size in pixels, as the processor will cut it.

        Raises InvalidParameter (422) for a size that it refuses.
        """
        try:
            across, down = self._processor.get_n_patches((width, height), self.spatial_merge_size)
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise InvalidParameter("A page of this size cannot be embedded.", code="image_size_unsupported") from error
        return int(across), int(down)

    def token_texts(self, item: Item) -> list[str]:
        """Each token of a query as text; the augmentation tokens read `<|endoftext|>`."""
        tokenizer = self._processor.tokenizer
        return [str(tokenizer.decode([int(token)])) for token in item.input_ids]

    def _trailing_augmentation(self) -> int:
        """How many tokens the processor adds behind a query."""
        token = self._processor.tokenizer.convert_tokens_to_ids(self._processor.query_augmentation_token)
        is_own = (self.preprocess_query("a").input_ids != token).nonzero()[:, 0]
        return self.preprocess_query("a").tokens - int(is_own[-1]) - 1

    def trial(self, image: Image.Image) -> Item:
        """A page, for the checks at start and after memory ran out."""
        return self.preprocess_page(image)

    # --- forward ---

    def encode(self, batch: Sequence[Item], is_abandoned: IsAbandoned = lambda index: False) -> list[Any]:
        """Vectors of each item, in order; each depends on its item alone, whatever shares the forward.

        is_abandoned   asked before each forward; such items get DeadlineExceeded instead of vectors
        returns        Vectors (T, D), or that error
        Raises InternalError (500) when a number is not finite.
        """
        results: list[Vectors | SightlineError] = [DeadlineExceeded("Nobody waits for this item any more.")] * len(
            batch
        )
        lengths = [item.tokens for item in batch]
        for pack in packs(lengths, self._max_batch, self._max_batch_tokens):
            wanted = [index for index in pack if not is_abandoned(index)]
            if wanted:
                vectors = self._forward([batch[index] for index in wanted])
                for index, rows in zip(wanted, vectors, strict=True):
                    results[index] = rows
        return results

    def _forward(self, items: Sequence[Item]) -> list[Vectors]:
        """One forward: right-padded to (B, T), padding cut off again."""
        length = max(item.tokens for item in items)
        shape = (len(items), length)
        inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in _SEQUENCES}
        for row, item in enumerate(items):
            inputs["input_ids"][row, : item.tokens] = item.input_ids
            inputs["mm_token_type_ids"][row, : item.tokens] = item.token_types
            inputs["attention_mask"][row, : item.tokens] = 1
        pixels = [item.pixel_values for item in items if item.pixel_values is not None]
        grids = [item.grid for item in items if item.grid is not None]
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        on_device: dict[str, Any] = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        with torch.inference_mode():
            # ColQwen2_5.forward would keep the hidden states of all layers and take pages or queries, not both.
            backbone: Any = Qwen2_5_VLModel.forward(self._model, **on_device, use_cache=False)
            hidden = backbone.last_hidden_state
            projected = self._model.custom_text_proj(hidden).float()
            vectors = projected / projected.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
        array = vectors.cpu().numpy()
        found = [np.ascontiguousarray(array[row, : item.tokens]) for row, item in enumerate(items)]
        if not all(np.isfinite(rows).all() for rows in found):
            raise InternalError("The model returned numbers that are not finite.", code="output_not_finite")
        return found

    def pool(self, vectors: Vectors, factor: int) -> Vectors:
        """Fewer vectors of a page; see `pool`."""
        return pool(vectors, factor)

    # --- the checks that a replica passes before it is ready ---

    def _checked(self) -> "Golden":
        """Embed the fixed page and query; raise LoadFailed where the model would answer nonsense."""
        page, query = self.preprocess_page(golden_page()), self.preprocess_query(GOLDEN_QUERY)
        blind = replace(page, token_types=torch.zeros_like(page.token_types))
        try:
            seen, said, flat = (self._forward([item])[0] for item in (page, query, blind))
        except InternalError as error:
            raise LoadFailed("the model returns numbers that are not finite") from error
        for vectors in (seen, said):
            if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > 1e-2:
                raise LoadFailed("the model returns vectors of no length: some of its weights are zero")
        if np.abs(seen - flat).max() < 1e-4:
            raise LoadFailed(
                "the model ignores mm_token_type_ids: image positions would be wrong", reason="positions_dropped"
            )
        return Golden.of(said, seen)


_SEQUENCES = ("input_ids", "mm_token_type_ids", "attention_mask")


@dataclass(frozen=True, slots=True)
class _PagePrompt:
    """The token ids of a page's fixed prompt around its image tokens; the tokenizer reads it once."""

    before: tuple[int, ...]
    image_token_id: int
    behind: tuple[int, ...]

    @classmethod
    def of(cls, processor: Any) -> "_PagePrompt":  # noqa: ANN401 - a ColQwen2_5_Processor
        """Raises LoadFailed when the prompt has not one place for an image."""
        ids: list[int] = list(processor.tokenizer(processor.visual_prompt_prefix)["input_ids"])
        token = int(processor.image_token_id)
        if ids.count(token) != 1:
            raise LoadFailed("the tokenizer does not know the image token of a page's prompt")
        at = ids.index(token)
        return cls(tuple(ids[:at]), token, tuple(ids[at + 1 :]))

    def ids(self, image_tokens: int) -> tuple[torch.Tensor, int]:
        """Token ids (T,), and where the image tokens begin."""
        ids = [*self.before, *[self.image_token_id] * image_tokens, *self.behind]
        return torch.tensor(ids), len(self.before)


class _ColQwen(ColQwen2_5):
    """The published base was saved from a class with a language-model head, tied and unused here."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - as transformers declares it


@dataclass(frozen=True, slots=True)
class Golden:
    """What the fixed query and page became: a checksum for equal set-ups, and numbers to compare across others.

    sha256         of all vectors, rounded to three decimals
    first_numbers  of the query's first vector, eight
    """

    sha256: str
    first_numbers: tuple[float, ...]

    @classmethod
    def of(cls, query: Vectors, page: Vectors) -> "Golden":
        rounded = np.round(np.concatenate([query, page]), 3) + 0.0  # no negative zeros
        digest = hashlib.sha256(rounded.astype("<f4").tobytes()).hexdigest()
        return cls(digest, tuple(round(float(number), 4) for number in query[0, :8]))


def golden_page() -> Image.Image:
    """A fixed picture: two flat colours and a gradient, 160 x 96 pixels, so that place and order matter."""
    pixels = np.zeros((96, 160, 3), dtype=np.uint8)
    pixels[:, :80] = (250, 250, 250)
    pixels[20:60, 20:60] = (220, 40, 40)
    pixels[:, 80:, 1] = np.linspace(0, 255, 80).astype(np.uint8)
    return Image.fromarray(pixels)


def pool(vectors: Vectors, factor: int) -> Vectors:
    """Hierarchical token pooling: about T / factor vectors, each the unit mean of similar ones.

    factor 1 changes nothing. Order and image span are lost. Source: colpali_engine's HierarchicalTokenPooler.
    """
    if factor == 1 or len(vectors) < 2:
        return vectors
    pooled: Any = HierarchicalTokenPooler().pool_embeddings([torch.from_numpy(vectors)], pool_factor=factor)
    return pooled[0].numpy()


# --- adapters ---

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A LoRA adapter on disk. `config` and `weights` are its two files, `base` the model it changes."""

    name: str
    revision: str
    base: str
    config: Path
    weights: Path

    @classmethod
    def find(cls, settings: EmbedSettings) -> "_Adapter | None":
        """The adapter that `settings.model` names, None when it names whole weights. Raises LoadFailed."""
        where: dict[str, Any] = {"revision": settings.revision, "cache_dir": settings.cache_dir}
        found = find_adapter_config_file(settings.model, **where)
        if found is None:
            return None
        config = json.loads(Path(found).read_text())
        if config.get("peft_type") != "LORA" or not isinstance(config.get("base_model_name_or_path"), str):
            raise LoadFailed(f"{settings.model}: only LoRA adapters that name their base can be loaded")
        try:
            weights = cached_file(settings.model, ADAPTER_WEIGHTS, **where)
        except OSError as error:
            raise LoadFailed(f"{settings.model}: an adapter without {ADAPTER_WEIGHTS}") from error
        folder = Path(settings.model)
        if folder.is_dir():
            revision = hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest()[:12]
        else:
            revision = extract_commit_hash(found, None) or settings.revision or "main"
        name = folder.name if folder.is_dir() else settings.model
        return cls(name, revision, config["base_model_name_or_path"], Path(found), Path(str(weights)))

    def merged_into(self, model: Any) -> Any:  # noqa: ANN401 - a ColQwen2_5
        """The base with the adapter added to its weights.

        Raises LoadFailed when one tensor finds no place, or one place no tensor.
        """
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config = LoraConfig.from_pretrained(str(self.config.parent))
        config.inference_mode = True
        config.base_model_name_or_path = None  # else peft warns when both are mounted in other places
        wrapped = get_peft_model(model, cast("LoraConfig", config))
        wanted = set(get_peft_model_state_dict(wrapped))
        given = {_adapter_key(key): tensor for key, tensor in load_file(self.weights).items()}
        if astray := sorted(wanted ^ set(given)):
            raise LoadFailed(f"{self.name}: {len(astray)} adapter weights do not match the base: {astray[:5]}")
        set_peft_model_state_dict(wrapped, given)
        return cast("Any", wrapped).merge_and_unload(safe_merge=True).eval()


_PREFIX = "base_model.model."


def _adapter_key(key: str) -> str:
    """The name of an adapter weight in today's layout: v0.2 was trained when the language model was `model.layers`."""
    return _PREFIX + re.sub(r"^model\.(?=layers\.)", "language_model.", key.removeprefix(_PREFIX))


def replace_model(settings: EmbedSettings, model: str) -> EmbedSettings:
    """The same settings for another model, at its default revision."""
    return settings.model_copy(update={"model": model, "revision": None})


def _use_flash_attention(model: Any) -> bool:  # noqa: ANN401 - a ColQwen2_5
    """Switch to flash-attention 2 where it can run (contract C8)."""
    if model.device.type != "cuda" or model.dtype == torch.float32 or not is_flash_attn_2_available():
        return False
    model.set_attn_implementation("flash_attention_2")
    return True
