"""From a 12-megapixel JPEG to the model's input, ours beside plain PIL and the processor: milliseconds of one thread.

    python tests/bench/reading.py      → JSON, medians over photographs, each read by both in turn

Both end at the same patches: 1152 x 864 px or as near as the processor comes. `decode` is the picture alone.
"""

import io
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from sightline import images  # noqa: E402
from sightline.models.qwen_vl import QwenVL  # noqa: E402
from sightline.settings import DescribeSettings  # noqa: E402
from tests.bench.checkpoints import TINY  # noqa: E402
from tests.bench.inputs import photographs  # noqa: E402

WIDTH, HEIGHT = 1152, 864
COUNT = 8


def large_model(folder: Path) -> QwenVL:
    """The small captioner with a processor that sees a megapixel."""
    shutil.copytree(TINY / "describe", folder, dirs_exist_ok=True)
    for name in ("preprocessor_config.json", "processor_config.json"):
        told = json.loads((folder / name).read_text())
        for part in (told, told.get("image_processor", {})):
            if "size" in part:
                part["size"] = {"shortest_edge": 20_736, "longest_edge": WIDTH * HEIGHT}
        (folder / name).write_text(json.dumps(told))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 16_384
    (folder / "config.json").write_text(json.dumps(config))
    return QwenVL(DescribeSettings(model=str(folder), auth="off", _cli_parse_args=False))


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    torch.set_num_threads(1)
    pictures = list(itertools.islice(photographs(1), COUNT))
    limits = images.Limits.from_settings(DescribeSettings(auth="off", _cli_parse_args=False))

    def ours(data: bytes) -> Image.Image:
        return images.decode(data, limits, max_width=WIDTH, max_height=2 * WIDTH)

    def plain(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    with tempfile.TemporaryDirectory() as place:
        model = large_model(Path(place))
        processor = model._processor

        def by_processor(image: Image.Image) -> object:
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}]}], tokenize=False, add_generation_prompt=True
            )
            return processor(text=[text], images=[image], return_tensors="pt")

        ways: dict[str, Callable[[bytes], object]] = {
            "plain_decode": lambda data: plain(data).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC),
            "ours_decode": ours,
            "plain_input": lambda data: by_processor(plain(data).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)),
            "processor_input": lambda data: by_processor(plain(data)),
            "ours_input": lambda data: model.preprocess(ours(data), "x"),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number, data in enumerate([pictures[0], *pictures]):
            for name, way in ways.items():
                took = timed(lambda way=way, data=data: way(data))
                if number:  # the first is for warming
                    times[name].append(took)
    print(json.dumps({name: statistics.median(values) for name, values in times.items()}))


if __name__ == "__main__":
    main()
