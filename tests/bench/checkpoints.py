"""Random-weight checkpoints of real size for the benchmark, written from a configuration: no figure of theirs is of use
but the time that they take.

    python tests/bench/checkpoints.py qwen|blip|colqwen FOLDER

The small checkpoints' tokenizers are theirs too. No end token is ever the likeliest (its row of the tied head is zero),
so that every answer has the length that was asked for, as a benchmark wants it.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

TINY = Path(__file__).resolve().parents[2] / "predictors/src/sightline/tiny"
SIDE = 336
"""Pixels of a side that every image is brought to: 24 x 24 patches of 14, 144 tokens."""
FILES = ("*token*.json", "*.jinja", "*processor*.json", "vocab.txt")


def write(kind: str, folder: Path) -> None:
    """Write the checkpoint; the same one every time."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    {"qwen": _qwen, "blip": _blip, "colqwen": _colqwen}[kind](folder)


def _qwen_config(small: Path) -> dict[str, Any]:
    """Qwen2.5-0.5B's text model but for its vocabulary, and a vision tower of 12 layers: 0.43 billion parameters."""
    config = json.loads((small / "config.json").read_text())
    for name in ("sightline_demo_model", "sightline_model_name", "transformers_version"):
        config.pop(name, None)
    text, vision = config["text_config"], config["vision_config"]
    text |= {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    text |= {"num_key_value_heads": 2, "layer_types": ["full_attention"] * 24}
    text["rope_parameters"] |= {"mrope_section": [8, 12, 12]}
    vision |= {"depth": 12, "hidden_size": 640, "intermediate_size": 1728, "num_heads": 10, "out_hidden_size": 896}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [2, 5, 8, 11]}
    return config


def _copy(small: Path, folder: Path) -> None:
    for pattern in FILES:
        for file in small.glob(pattern):
            shutil.copy(file, folder)


def _processor(folder: Path) -> None:
    """The published patch size, and as many pixels for every image."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if file.exists():
            file.write_text(json.dumps(_resized(json.loads(file.read_text()))))


def _resized(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    changed = {key: _resized(value) for key, value in node.items()}
    if "patch_size" in changed and "merge_size" in changed:
        changed |= {"patch_size": 14, "merge_size": 2}
        changed["size"] = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
        changed |= {key: SIDE * SIDE for key in ("min_pixels", "max_pixels") if key in changed}
    return changed


def _qwen(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    small = TINY / "describe"
    _copy(small, folder)
    _processor(folder)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen_config(small))).to(torch.bfloat16)
    generation = json.loads((small / "generation_config.json").read_text())
    with torch.no_grad():
        model.get_input_embeddings().weight[[*generation["eos_token_id"], generation["pad_token_id"]]] = 0
    model.generation_config.update(**generation)
    model.save_pretrained(folder)


def _colqwen(folder: Path) -> None:
    from colpali_engine.models import ColQwen2_5
    from transformers import Qwen2_5_VLConfig

    small = TINY / "embed"
    _copy(small, folder)
    _processor(folder)
    config = Qwen2_5_VLConfig(**_qwen_config(small))
    ColQwen2_5(config).to(torch.bfloat16).save_pretrained(folder)


def _blip(folder: Path) -> None:
    """Salesforce/blip-image-captioning-base's shapes, in float32 as published."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    small = TINY / "blip"
    _copy(small, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 384, "width": 384}}))
    told = json.loads((small / "config.json").read_text())["text_config"]
    text = {key: told[key] for key in ("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id")}
    text |= {"vocab_size": 30_524, "hidden_size": 768, "encoder_hidden_size": 768, "intermediate_size": 3072}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "is_decoder": True}
    vision = {"image_size": 384, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    head = model.text_decoder.cls.predictions.decoder
    with torch.no_grad():
        head.bias[text["sep_token_id"]] = -1e4
    model.save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
