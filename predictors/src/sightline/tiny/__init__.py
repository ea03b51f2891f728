"""Small, honestly trained demonstration checkpoints and the scripts that made them; importing this costs nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

HERE = Path(__file__).parent
DESCRIBE = HERE / "describe"
"""Folder of the tiny Qwen2.5-VL checkpoint."""
ENHANCE = HERE / "enhance"
"""Folder of the tiny gpt-oss checkpoint."""
EMBED = HERE / "embed"
"""Folder of the tiny ColQwen2.5 checkpoint."""
BLIP = HERE / "blip"
"""Folder of the tiny BLIP checkpoint."""
GENERATE = HERE / "generate"
"""Folder of the tiny Kimi-VL checkpoint."""

HELD_OUT_DESCRIBE = 0.02
HELD_OUT_ENHANCE = 0.08
HELD_OUT_EMBED = 0.05


def is_held_out(caption: str, share: float) -> bool:
    """True when a caption belongs to the slice (by SHA-256) that no training ever sees.

    share   0-1; a caption held out at a small share is held out at every larger one
    """
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big") < share * 2**32
