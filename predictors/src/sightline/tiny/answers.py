"""Measures the generator on fresh scenes, the way a server uses it: file bytes, AutoProcessor, greedy `generate`.

Nothing of the training code runs here.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sightline.models import kimi_vl
from sightline.tiny import GENERATE, HELD_OUT_DESCRIBE, dialogue, is_held_out, scenes

Kind = Literal["one object", "two objects", "held-out caption", "which image", "each image", "text alone"]
KINDS: tuple[Kind, ...] = ("one object", "two objects", "held-out caption", "which image", "each image", "text alone")


@dataclass(frozen=True)
class Answer:
    """One prompt with its pictures, the true answer and what the model said."""

    kind: Kind
    prompt: str
    pixels: tuple[tuple[int, int], ...]
    """Width and height of each picture."""
    formats: tuple[str, ...]
    """PNG, JPEG or WEBP."""
    true: str
    said: str

    @property
    def is_right(self) -> bool:
        """The answer is exactly the true one."""
        return self.said == self.true


@dataclass(frozen=True)
class Loaded:
    """The loaded generator."""

    model: Any
    processor: Any

    def reply(self, prompt: str, images: list[Image.Image], *, system: str | None = None, tokens: int = 120) -> str:
        """Greedy answer; RGB pictures come before the prompt."""
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append({"role": "system", "content": system})
        shown = [{"type": "image", "image": image} for image in images]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": prompt}]})
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=tokens)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(folder: Path = GENERATE) -> Loaded:
    """Load as any server would, no remote code."""
    kimi_vl.register()
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Loaded(model, AutoProcessor.from_pretrained(folder))


def _draw(rng: np.random.Generator, objects: Literal[1, 2] | None, *, only_held_out: bool = False) -> scenes.Scene:
    while True:
        scene = scenes.draw_scene(rng, objects)
        if not only_held_out or is_held_out(scenes.caption(scene), HELD_OUT_DESCRIBE):
            return scene


def ask(generator: Loaded, count: int, seed: int, kind: Kind) -> list[Answer]:
    """Draw `count` prompts of a kind, carry each picture through file bytes, and have the prompts answered."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    answers: list[Answer] = []
    for number in range(count):
        shown: list[scenes.Scene] = []
        if kind in ("one object", "two objects", "held-out caption"):
            shown = [_draw(rng, 1 if kind == "one object" else 2, only_held_out=kind == "held-out caption")]
            prompt = dialogue.PRESETS[number % len(dialogue.PRESETS)]
            true = scenes.caption(shown[0])
        elif kind == "text alone":
            prompt, true = dialogue.draw_text(rng)
        else:
            shown = [_draw(rng, None) for _ in range(2 + number % 2)]
            if kind == "which image":
                prompt, true = dialogue.draw_which(rng, shown)
            else:
                prompt, true = "Describe the images.", dialogue.describe_answer(shown)
        files = [scenes.encode(scenes.render(scene), rng) for scene in shown]
        said = generator.reply(prompt, [scenes.decode(data) for data, _ in files])
        pixels = tuple((scene.width, scene.height) for scene in shown)
        answers.append(Answer(kind, prompt, pixels, tuple(form for _, form in files), true, said))
    return answers


@contextmanager
def expert_load(model: Any) -> Generator[dict[str, torch.Tensor]]:  # noqa: ANN401
    """Count the tokens that each routed expert gets, by layer, while the block runs."""
    load: dict[str, torch.Tensor] = {}
    hooks: list[Any] = []

    def counter(name: str) -> Any:  # noqa: ANN401
        def count(_: Any, __: Any, routed: tuple[torch.Tensor, ...]) -> None:  # noqa: ANN401
            load[name] += torch.bincount(routed[2].flatten(), minlength=len(load[name]))

        return count

    for number, layer in enumerate(model.model.language_model.layers):
        if hasattr(layer.mlp, "gate"):
            load[str(number)] = torch.zeros(layer.mlp.gate.num_experts, dtype=torch.long)
            hooks.append(layer.mlp.gate.register_forward_hook(counter(str(number))))
    try:
        yield load
    finally:
        for hook in hooks:
            hook.remove()


def measure(count: int, seed: int, folder: Path = GENERATE) -> dict[str, Any]:
    """Share of exact answers of each kind, of captions by file format, and how the work spreads over experts."""
    generator = load(folder)
    with expert_load(generator.model) as load_by_layer:
        found = {kind: ask(generator, count, seed, kind) for kind in KINDS}
    captions = found["one object"] + found["two objects"]

    def share(part: list[Answer]) -> float:
        return round(sum(answer.is_right for answer in part) / max(len(part), 1), 4)

    return {
        "command": f"python -m sightline.tiny answers --scenes {count} --seed {seed}",
        "parameters": sum(weight.numel() for weight in generator.model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "exact": {kind: {"exact": share(part), "asked": len(part)} for kind, part in found.items()},
        "by_format": {
            form: share([answer for answer in captions if answer.formats == (form,)]) for form in scenes.FORMATS
        },
        "expert_load": {
            layer: [round(float(n), 3) for n in counts / counts.sum()] for layer, counts in load_by_layer.items()
        },
        "failures": [
            {"kind": kind, "prompt": a.prompt, "true": a.true, "said": a.said, "pixels": a.pixels}
            for kind, part in found.items()
            for a in part
            if not a.is_right
        ],
    }
