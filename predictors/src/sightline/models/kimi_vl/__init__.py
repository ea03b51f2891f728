"""Kimi-VL (moonshotai/Kimi-VL-A3B): images and text to text, on transformers' own classes and without remote code."""

from transformers import AutoConfig, AutoModelForImageTextToText

from sightline.models.kimi_vl.checkpoint import save_published
from sightline.models.kimi_vl.configuration import KimiVLConfig, MoonViTConfig
from sightline.models.kimi_vl.modeling import KimiVLForConditionalGeneration

__all__ = ["KimiVLConfig", "KimiVLForConditionalGeneration", "MoonViTConfig", "register", "save_published"]


def register() -> None:
    """Make transformers' Auto classes know Kimi-VL; again and again does no harm."""
    AutoConfig.register("kimi_vl", KimiVLConfig, exist_ok=True)
    AutoConfig.register("moonvit", MoonViTConfig, exist_ok=True)
    AutoModelForImageTextToText.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)


register()
