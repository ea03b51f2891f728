"""Kimi-VL's images to patches and its published tiktoken file to a tokenizer, without remote code."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import ProcessorMixin, TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor

from sightline.models.loading import LoadFailed

RESERVED_TOKENS = 256
"""Ids behind the tiktoken ranks that are control tokens, most of them without a use."""

PUBLISHED_IDS = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "[EOT]": 163593,
    "<|im_system|>": 163594,
    "<|im_middle|>": 163601,
    "<|media_start|>": 163602,
    "<|media_content|>": 163603,
    "<|media_end|>": 163604,
    "<|media_pad|>": 163605,
}
"""The control tokens that a conversation needs, and their ids in the published vocabulary."""

_LETTER_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(  # before merging: runs of Han, words, up to three digits, signs, line ends, spaces
    (
        r"[\p{Han}]+",
        f"{_LETTER_START}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_LETTER_START}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class KimiVLImageProcessor(Kimi_K25ImageProcessor):
    """Images of any size to patches: shrunk to at most `in_token_limit` patches, padded at the right and bottom.

    The same steps as Kimi-K2.5's; the published preprocessor_config.json names some of them otherwise.
    """

    max_patches = 4096

    def __init__(
        self,
        in_token_limit: int | None = None,
        merge_kernel_size: tuple[int, int] | list[int] | None = None,
        pad_input: bool = True,
        **options: Any,  # noqa: ANN401
    ) -> None:
        if not pad_input:
            raise ValueError("Kimi-VL without pad_input would cut images; no published checkpoint asks for it")
        if in_token_limit is not None:
            options["max_patches"] = in_token_limit
        if merge_kernel_size is not None:
            options["merge_size"] = merge_kernel_size[0]
        super().__init__(**options)


class _Converter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Token bytes and their rank; each line of the file is base64, a space, the rank."""
        pairs = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


class TikTokenTokenizer(TokenizersBackend):
    """The tokenizer of a `tiktoken.model` file, or of a `tokenizer.json` where there is one.

    The name is the one that the published tokenizer_config.json asks for, so that AutoTokenizer finds this class.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "tiktoken.model",
        "tokenizer_file": "tokenizer.json",
    }

    @classmethod
    def _convert_from_tiktoken(cls, vocab_file: str, local_kwargs: dict[str, Any]) -> dict[str, Any]:
        named = {int(token): _content(value) for token, value in local_kwargs.get("added_tokens_decoder", {}).items()}
        ranks = len(_Converter.load_tiktoken_bpe(vocab_file))
        controls = [named.get(at, f"<|reserved_token_{at}|>") for at in range(ranks, ranks + RESERVED_TOKENS)]
        converter = _Converter(vocab_file, pattern=SPLIT, extra_special_tokens=controls)
        return local_kwargs | {"tokenizer_object": converter.converted()}


class KimiVLProcessor(ProcessorMixin):
    """Image processor and tokenizer; each `<|media_pad|>` of a text becomes as many as its image has tokens."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:  # noqa: ANN401
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<|media_pad|>"  # noqa: S105 - a token of text
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:  # noqa: ANN401
        """What stands for one image in the text."""
        merged = self.image_processor.merge_size**2
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // merged)


def control_ids(tokenizer: Any, image_token_id: int) -> dict[str, int]:  # noqa: ANN401
    """The ids of the control tokens, checked both ways.

    Raises LoadFailed when one is not a single token, comes back as another, or is not where the model expects it:
    transformers may pick a tokenizer class that reads the files and gets this wrong without a word.
    """
    ids: dict[str, int] = {}
    for token, published in PUBLISHED_IDS.items():
        encoded = list(tokenizer.encode(token, add_special_tokens=False))
        if len(encoded) != 1 or tokenizer.decode(encoded) != token:
            raise LoadFailed(f"the tokenizer reads {token} as {encoded}")
        if image_token_id == PUBLISHED_IDS["<|media_pad|>"] and encoded[0] != published:
            raise LoadFailed(f"the tokenizer has {token} at {encoded[0]}, not at {published}")
        ids[token] = int(encoded[0])
    if ids["<|media_pad|>"] != image_token_id:
        raise LoadFailed(f"images are {ids['<|media_pad|>']} to the tokenizer and {image_token_id} to the model")
    return ids


def _content(token: Any) -> str:  # noqa: ANN401 - an AddedToken or its JSON
    return token["content"] if isinstance(token, dict) else str(token)
