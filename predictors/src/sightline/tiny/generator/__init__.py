"""The generator: a Kimi-VL of 2.0 million weights that reads coloured shapes, one or several pictures to a prompt.

The checkpoint is an ordinary Kimi-VL: MoonViT, the 2x2 projector, a DeepSeek-V3 text model with routed experts, in the
published file layout. Training runs the same weights through a forward of its own (`forward.py`), which packs pictures
of every size and conversations of every length into two long rows (`tests/unit/tiny/test_generator.py` holds it to the
forward of `models/kimi_vl`). What it is asked and what it answers is in `../dialogue.py`.

Why patches of 12 and about 96 of them: Kimi-VL's processor keeps the aspect and pads, so that no left-of / above
decision is bent; a small shape is then 17 to 30 pixels across, and a picture costs the text model 25 to 40 tokens.
"""

from sightline.tiny.generator.training import LEGS, train

__all__ = ["LEGS", "train"]
