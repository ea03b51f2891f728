"""Measures both checkpoints on fresh scenes, the way a server uses them, and writes REPORT.md and report.json.

Nothing of the training code runs here: file bytes, AutoProcessor, AutoModel, greedy `generate`.
"""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from sightline.tiny import (
    DESCRIBE,
    ENHANCE,
    HELD_OUT_DESCRIBE,
    HELD_OUT_ENHANCE,
    HERE,
    describer,
    enhancer,
    is_held_out,
    prose,
    scenes,
)

RECORD = "sightline_training.json"
"""What the training wrote beside the weights: steps, minutes, seed."""


@dataclass(frozen=True)
class Reading:
    """One picture and what the describer said of it."""

    scene: scenes.Scene
    kind: str
    """PNG, JPEG or WEBP."""
    prompt: str
    said: str

    @property
    def is_right(self) -> bool:
        """The caption is exactly the true one."""
        return self.said == scenes.caption(self.scene)


@dataclass(frozen=True)
class Describer:
    """The loaded describer."""

    model: Any
    processor: Any

    def describe(self, image: Image.Image, prompt: str, *, system: str | None = None) -> str:
        """Greedy caption of an RGB picture."""
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        messages.append({"role": "user", "content": content})
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=48)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class Enhancer:
    """The loaded enhancer."""

    model: Any
    tokenizer: Any

    def reply(self, captions: list[str], level: str) -> list[str]:
        """Whole greedy replies, special tokens kept."""
        rows = [enhancer.generation_ids(self.tokenizer, caption, level) for caption in captions]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=320)
        texts = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=False)
        return [text.split("<|return|>")[0] + ("<|return|>" if "<|return|>" in text else "") for text in texts]


def load_describer(folder: Path = DESCRIBE) -> Describer:
    """Load as any server would, no remote code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Describer(model, AutoProcessor.from_pretrained(folder))


def load_enhancer(folder: Path = ENHANCE) -> Enhancer:
    """Load as any server would, no remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Enhancer(model, AutoTokenizer.from_pretrained(folder))


def read_scenes(
    describe: Describer, count: int, seed: int, objects: Literal[1, 2], *, only_held_out: bool = False
) -> list[Reading]:
    """Draw `count` scenes, carry each through file bytes, and have it captioned under one of the three prompts."""
    rng = np.random.default_rng([seed, objects, int(only_held_out)])
    readings: list[Reading] = []
    while len(readings) < count:
        scene = scenes.draw_scene(rng, objects)
        if only_held_out and not is_held_out(scenes.caption(scene), HELD_OUT_DESCRIBE):
            continue
        image_bytes, kind = scenes.encode(scenes.render(scene), rng)
        prompt = describer.PROMPTS[len(readings) % len(describer.PROMPTS)]
        said = describe.describe(scenes.decode(image_bytes), prompt)
        readings.append(Reading(scene, kind, prompt, said))
    return readings


def share(readings: list[Reading]) -> float:
    """Share of exact captions."""
    return sum(reading.is_right for reading in readings) / max(len(readings), 1)


def slots(readings: list[Reading]) -> dict[str, float]:
    """Share of right answers for each part of a caption; an unreadable caption is wrong in every part."""
    right: dict[str, list[bool]] = defaultdict(list)
    for reading in readings:
        true = scenes.parse_caption(scenes.caption(reading.scene))
        said = scenes.parse_caption(reading.said)
        if true is None:
            raise ValueError("a scene has a caption outside its own grammar")
        same = said is not None and len(said.objects) == len(true.objects)
        right["count"].append(same)
        for slot, name in enumerate(("size", "colour", "shape")):
            ok = (
                same
                and said is not None
                and all(a[slot] == b[slot] for a, b in zip(said.objects, true.objects, strict=True))
            )
            right[name].append(ok)
        right["background"].append(said is not None and said.background == true.background)
        if true.relation:
            right["relation"].append(said is not None and said.relation == true.relation)
    return {name: round(sum(found) / len(found), 4) for name, found in right.items()}


def size_band(scene: scenes.Scene) -> str:
    """Name of the band the longer side of the picture lies in, pixels."""
    longer = max(scene.width, scene.height)
    for limit in (256, 512, 1024):
        if longer <= limit:
            return f"up to {limit}"
    return "over 1024"


def enhancer_share(enhance: Enhancer, captions: list[str], level: str) -> tuple[float, float, list[str]]:
    """Share of captions enhanced without a fault, mean length of the analysis in tokens, and some failures."""
    right, thought, failures = 0, 0, list[str]()
    for start in range(0, len(captions), 20):
        part = captions[start : start + 20]
        for caption, reply in zip(part, enhance.reply(part, level), strict=True):
            final = enhancer.final_channel(reply)
            wrong = prose.faults(caption, level, final)
            if not reply.endswith("<|return|>"):
                wrong.append("form: no <|return|>")
            right += not wrong
            if wrong:
                failures.append(f"{caption} -> {final}: {wrong[0]}")
            thinking = reply.partition("<|channel|>analysis<|message|>")[2].partition("<|end|>")[0]
            thought += len(enhance.tokenizer(thinking).input_ids)
    return right / len(captions), thought / len(captions), failures[:5]


def hardware() -> str:
    """This machine in one phrase."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, no GPU"


def _training(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def _weights(model: torch.nn.Module) -> dict[str, int]:
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def measure(count: int, seed: int) -> dict[str, Any]:
    """All figures, as written to report.json."""
    describe = load_describer()
    one, two = (read_scenes(describe, count, seed, n) for n in (1, 2))
    unseen = read_scenes(describe, max(count // 2, 1), seed, 2, only_held_out=True)
    both = one + two
    by_format: dict[str, list[Reading]] = defaultdict(list)
    by_band: dict[str, list[Reading]] = defaultdict(list)
    by_prompt: dict[str, list[Reading]] = defaultdict(list)
    for reading in both:
        by_format[reading.kind].append(reading)
        by_band[size_band(reading.scene)].append(reading)
        by_prompt[reading.prompt].append(reading)

    enhance = load_enhancer()
    rng = np.random.default_rng([seed, 9])
    held_one, held_two = enhancer.held_out()
    asked = [str(c) for c in rng.permutation(held_two)[:count]] + held_one
    levels: dict[str, Any] = {}
    for level in prose.LEVELS:
        right, thought, failures = enhancer_share(enhance, asked, level)
        levels[level] = {"faultless": round(right, 4), "analysis_tokens": round(thought, 1), "failures": failures}

    def table(groups: dict[str, list[Reading]]) -> dict[str, Any]:
        return {name: {"exact": round(share(part), 4), "scenes": len(part)} for name, part in sorted(groups.items())}

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "command": f"python -m sightline.tiny report --scenes {count} --seed {seed}",
        "describe": {
            **_weights(describe.model),
            "bytes": enhancer.describe_files(DESCRIBE)["model.safetensors"],
            "training": _training(DESCRIBE),
            "scenes": count,
            "exact_one_object": round(share(one), 4),
            "exact_two_objects": round(share(two), 4),
            "exact_held_out_captions": {"exact": round(share(unseen), 4), "scenes": len(unseen)},
            "slots": slots(both + unseen),
            "by_format": table(by_format),
            "by_longer_side": table(by_band),
            "by_prompt": table(by_prompt),
            "failures": [
                {"true": scenes.caption(r.scene), "said": r.said, "pixels": [r.scene.width, r.scene.height]}
                for r in both + unseen
                if not r.is_right
            ],
        },
        "enhance": {
            **_weights(enhance.model),
            "bytes": enhancer.describe_files(ENHANCE)["model.safetensors"],
            "training": _training(ENHANCE),
            "captions": len(asked),
            "held_out_share": HELD_OUT_ENHANCE,
            "levels": levels,
        },
    }


def page(figures: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""
    d, e = figures["describe"], figures["enhance"]

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    def made(part: dict[str, Any]) -> str:
        legs = part["training"].get("legs", [])
        if not legs:
            return "not recorded"
        minutes = sum(leg["minutes"] for leg in legs)
        how = "; then ".join(f"`{leg['command']}` ({leg['minutes']} min, {leg['steps']} steps)" for leg in legs)
        return f"{minutes:.1f} min in all: {how}; on {part['training']['hardware']}"

    lines = [
        "# What the demonstration checkpoints can do",
        "",
        f"Written by `{figures['command']}` on {figures['date']}; {figures['hardware']}.",
        "Never-seen scenes through file bytes, AutoProcessor / AutoTokenizer and greedy `generate`.",
        "",
        "## Describer",
        "",
        f"- {d['parameters']:,} parameters, {d['bytes']:,} bytes (float32)",
        f"- training: {made(d)}",
        "",
        "| scenes | count | exact caption |",
        "|---|---|---|",
        f"| one object | {d['scenes']} | {percent(d['exact_one_object'])} |",
        f"| two objects | {d['scenes']} | {percent(d['exact_two_objects'])} |",
        f"| two objects, caption held out of training | {d['exact_held_out_captions']['scenes']} | "
        f"{percent(d['exact_held_out_captions']['exact'])} |",
        *(
            f"| {title} {name if len(name) < 40 else name[:37] + '…'} | {row['scenes']} | {percent(row['exact'])} |"
            for title, key in (("format", "by_format"), ("longer side", "by_longer_side"), ("prompt:", "by_prompt"))
            for name, row in d[key].items()
        ),
        "",
        "Right by part of the caption: " + ", ".join(f"{k} {percent(v)}" for k, v in d["slots"].items()) + ".",
        "",
        *(f"- {f['pixels'][0]}x{f['pixels'][1]}: *{f['true']}* read as *{f['said']}*" for f in d["failures"]),
        "",
        "## Enhancer",
        "",
        f"- {e['parameters']:,} parameters, {e['bytes']:,} bytes (float32)",
        f"- training: {made(e)}",
        f"- {e['captions']} captions held out of training as a whole ({percent(e['held_out_share'])} slice by hash)",
        "",
        "| level | without any fault | analysis, tokens |",
        "|---|---|---|",
        *(f"| {name} | {percent(row['faultless'])} | {row['analysis_tokens']} |" for name, row in e["levels"].items()),
        "",
        *(f"- {line}" for row in e["levels"].values() for line in row["failures"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(count: int, seed: int, folder: Path = HERE) -> dict[str, Any]:
    """Measure and write both files."""
    figures = measure(count, seed)
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "REPORT.md").write_text(page(figures))
    return figures
