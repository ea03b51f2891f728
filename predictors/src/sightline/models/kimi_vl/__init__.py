"""Kimi-VL (moonshotai/Kimi-VL-A3B): images and text to text, on transformers' own classes and without remote code."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sightline.models.kimi_vl.checkpoint import save_published
from sightline.models.kimi_vl.configuration import KimiVLConfig, MoonViTConfig
from sightline.models.kimi_vl.model import KimiVL
from sightline.models.kimi_vl.modeling import KimiVLForConditionalGeneration
from sightline.models.kimi_vl.processing import KimiVLImageProcessor, KimiVLProcessor, TikTokenTokenizer

__all__ = [
    "KimiVL",
    "KimiVLConfig",
    "KimiVLForConditionalGeneration",
    "KimiVLImageProcessor",
    "KimiVLProcessor",
    "MoonViTConfig",
    "TikTokenTokenizer",
    "register",
    "save_published",
]


def register() -> None:
    """Make transformers' Auto classes know Kimi-VL; again and again does no harm."""
    AutoConfig.register("kimi_vl", KimiVLConfig, exist_ok=True)
    AutoConfig.register("moonvit", MoonViTConfig, exist_ok=True)
    AutoModelForImageTextToText.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(KimiVLConfig, tokenizer_class=TikTokenTokenizer, exist_ok=True)
    AutoImageProcessor.register(
        KimiVLConfig, image_processor_classes={"torchvision": KimiVLImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)


register()
