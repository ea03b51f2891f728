"""The models as transformers' own documentation calls them, for the servers that ours are measured beside.

No code of ours is in here but the call of `generate`: one image at a time, in the type of the checkpoint.
"""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

PROMPT = "Describe this image in detail"
Said = dict[str, Any]
"""`text` and `tokens`, or `embedding`."""


def load(kind: str, folder: str, tokens: int) -> Callable[[bytes], Said]:
    """A function from a request's bytes to its answer. kind: captioner, blip, pages, queries, none."""
    return {"captioner": captioner, "blip": blip, "pages": pages, "queries": queries, "none": none}[kind](
        folder, tokens
    )


def none(folder: str, tokens: int) -> Callable[[bytes], Said]:
    return lambda data: {"text": str(len(data)), "tokens": 0}


def captioner(folder: str, tokens: int) -> Callable[[bytes], Said]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.inference_mode()
    def answer(data: bytes) -> Said:
        inputs = processor(text=[text], images=[picture(data)], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return {"text": processor.decode(made, skip_special_tokens=True).strip(), "tokens": len(made)}

    return answer


def blip(folder: str, tokens: int) -> Callable[[bytes], Said]:
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = BlipForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()

    @torch.inference_mode()
    def answer(data: bytes) -> Said:
        pixels = processor.image_processor(images=[picture(data)], return_tensors="pt")["pixel_values"]
        made = model.generate(pixel_values=pixels, max_new_tokens=tokens)[0]
        return {"text": processor.tokenizer.decode(made, skip_special_tokens=True).strip(), "tokens": len(made)}

    return answer


def _colqwen(folder: str) -> tuple[Any, Any]:
    from colpali_engine.models import ColQwen2_5, ColQwen2_5_Processor

    return ColQwen2_5.from_pretrained(folder, dtype="auto").eval(), ColQwen2_5_Processor.from_pretrained(folder)


def pages(folder: str, tokens: int) -> Callable[[bytes], Said]:
    model, processor = _colqwen(folder)

    @torch.inference_mode()
    def answer(data: bytes) -> Said:
        vectors = model(**processor.process_images([picture(data)]))[0]
        return {"embedding": vectors.float().tolist(), "tokens": len(vectors)}

    return answer


def queries(folder: str, tokens: int) -> Callable[[bytes], Said]:
    model, processor = _colqwen(folder)

    @torch.inference_mode()
    def answer(data: bytes) -> Said:
        vectors = model(**processor.process_queries(texts=[data.decode()]))[0]
        return {"embedding": vectors.float().tolist(), "tokens": len(vectors)}

    return answer


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
