"""Measures the generator on fresh scenes, the way a server uses it: file bytes, AutoProcessor, greedy `generate`.

Nothing of the training code runs here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
class Asked:
    """A prompt, the RGB pictures before it, a system turn or none."""

    prompt: str
    images: tuple[Image.Image, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Loaded:
    """The loaded generator."""

    model: Any
    processor: Any

    def replies(self, asked: Sequence[Asked], *, tokens: int = 120) -> list[str]:
        """Greedy answers of one batch, padded on the left; RGB pictures come before the prompt."""
        conversations: list[list[dict[str, Any]]] = []
        for one in asked:
            shown = [{"type": "image", "image": image} for image in one.images]
            user = {"role": "user", "content": [*shown, {"type": "text", "text": one.prompt}]}
            conversations.append([*([{"role": "system", "content": one.system}] if one.system else []), user])
        self.processor.tokenizer.padding_side = "left"
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=tokens)
        return self.processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def reply(self, prompt: str, images: Sequence[Image.Image] = (), *, system: str = "") -> str:
        """Greedy answer to one prompt."""
        return self.replies([Asked(prompt, tuple(images), system)])[0]


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
    while len(answers) < count:
        asked: list[Asked] = []
        drawn: list[Answer] = []
        for number in range(len(answers), min(len(answers) + BATCH, count)):
            shown, prompt, true = _question(rng, kind, number)
            files = [scenes.encode(scenes.render(scene), rng) for scene in shown]
            asked.append(Asked(prompt, tuple(scenes.decode(data) for data, _ in files)))
            pixels = tuple((scene.width, scene.height) for scene in shown)
            drawn.append(Answer(kind, prompt, pixels, tuple(form for _, form in files), true, ""))
        answers += [replace(one, said=said) for one, said in zip(drawn, generator.replies(asked), strict=True)]
    return answers


BATCH = 20


def _question(rng: np.random.Generator, kind: Kind, number: int) -> tuple[list[scenes.Scene], str, str]:
    """Scenes, prompt and true answer."""
    if kind == "text alone":
        return [], *dialogue.draw_text(rng)
    if kind == "which image":
        shown = [_draw(rng, None) for _ in range(2 + number % 2)]
        return shown, *dialogue.draw_which(rng, shown)
    if kind == "each image":
        shown = [_draw(rng, None) for _ in range(2 + number % 2)]
        return shown, "Describe the images.", dialogue.describe_answer(shown)
    scene = _draw(rng, 1 if kind == "one object" else 2, only_held_out=kind == "held-out caption")
    return [scene], dialogue.PRESETS[number % len(dialogue.PRESETS)], scenes.caption(scene)


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
    found = {kind: ask(generator, count, seed, kind) for kind in KINDS}
    rng = np.random.default_rng([seed, len(KINDS)])
    with expert_load(generator.model) as load_by_layer:  # one by one: padding would be counted too
        for number in range(24):
            shown, prompt, _ = _question(rng, KINDS[number % len(KINDS)], number)
            generator.reply(prompt, [scenes.render(scene) for scene in shown])
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
