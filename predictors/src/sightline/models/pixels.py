"""RGB images to the numbers that vision towers read: the published processors' arithmetic, without their overhead.

    PIL.Image ──resize (torchvision v2, uint8)──▶ levels ──(x - mean) / std──▶ float32 ──patchify──▶ Patches

Equal to the processor of each checkpoint, number by number, whatever the size of the picture
(tests/unit/test_pixels.py). Resizing is torchvision's, which is what the processors call; the rest is the same two
IEEE operations in NumPy, on one thread: several of these run beside an engine that owns the cores.

Dims     H, W pixels of the resized picture · P patches · C channels · p side of a patch in pixels
Source   transformers 5.19: Qwen2VLImageProcessor, Kimi_K25ImageProcessor, BlipImageProcessor (TorchvisionBackend)
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sightline.errors import InvalidParameter
from sightline.images import Size, scaled
from sightline.models.loading import LoadFailed


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as its model's tower takes it, on the CPU.

    values  float32, normalised. Qwen (P, C·2·p·p), Kimi (P, C, p, p), BLIP (C, S, S)
    grid    (1, 3) int64, patches in time, height, width before merging; of BLIP (1, 1, 1)
    """

    values: torch.Tensor
    grid: torch.Tensor


class Pixels(Protocol):
    """How one checkpoint's images are prepared. Knows no weights, holds no state: safe in any thread or process."""

    def wanted(self, size: Size) -> Size:
        """What a picture of this size is resized to. Raises InvalidParameter (422)."""
        ...

    def patches(self, image: Image.Image, size: Size | None = None) -> Patches:
        """The numbers for one RGB image.

        size   the size that the image stands for, when it was decoded smaller than it is; the rules on size are
               applied to it. None: its own
        """
        ...

    def halved(self, image: Image.Image, size: Size | None = None) -> Patches:
        """The same with half of the pixels that the model would see otherwise."""
        ...


@dataclass(frozen=True, slots=True)
class Levels:
    """0..255 → float32. mean and std are in levels, one a channel, as the processors fuse them with the rescaling."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, processor: Any) -> "Levels":  # noqa: ANN401 - a transformers TorchvisionBackend
        """Those of a processor. Raises LoadFailed when it does anything else than resize, rescale and normalise."""
        steps = {name: getattr(processor, name, None) for name in ("do_resize", "do_rescale", "do_normalize")}
        is_usual = all(steps.values()) and not getattr(processor, "do_center_crop", None)
        if not is_usual or int(processor.resample) != Image.Resampling.BICUBIC:
            raise LoadFailed(f"{type(processor).__name__} is set to prepare images in a way that is not known here")
        factor = 1.0 / float(processor.rescale_factor)
        mean, std = ((torch.tensor(values) * factor).numpy() for values in (processor.image_mean, processor.image_std))
        return cls(mean, std)

    def normalised(self, levels: NDArray[np.uint8], channel_axis: int) -> NDArray[np.float32]:
        """(levels - mean) / std, in this order and in float32, in a new array of the same shape."""
        shape = [1] * levels.ndim
        shape[channel_axis] = -1
        values = np.subtract(levels, self.mean.reshape(shape), dtype=np.float32)
        return np.divide(values, self.std.reshape(shape), out=values)


def resized(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """(H, W, C) levels by antialiased bicubic interpolation in fixed point."""
    levels = np.asarray(image)
    if image.size == size:
        return levels
    # Copied because torch takes nothing that is read-only; np.array(image) does the same and takes seven times as long.
    tensor = torch.from_numpy(levels.copy()).permute(2, 0, 1)
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.resize(tensor, [size[1], size[0]], interpolation=bicubic, antialias=True).permute(1, 2, 0).numpy()


@dataclass(frozen=True, slots=True)
class QwenPixels:
    """Qwen2-VL, Qwen2.5-VL, ColQwen2.5: sides in whole merged patches, within a budget; as a film of frames."""

    levels: Levels
    side: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, processor: Any) -> "QwenPixels":  # noqa: ANN401 - a Qwen2VLImageProcessor
        """As the checkpoint's processor is configured. Raises LoadFailed."""
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        shape = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        return cls(Levels.of(processor), *(int(number) for number in (*shape, least, most)))

    def wanted(self, size: Size) -> Size:
        budget = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        try:
            height, width = smart_resize(size[1], size[0], factor=self.side * self.merge, **budget)
        except ValueError as error:  # one side is more than 200 times the other
            raise InvalidParameter(
                "An image of this shape cannot be shown to this model.", code="image_size_unsupported"
            ) from error
        return width, height

    def patches(self, image: Image.Image, size: Size | None = None) -> Patches:
        width, height = self.wanted(size or image.size)
        levels = resized(image, (width, height))
        side, merge = self.side, self.merge
        rows, columns = height // side, width // side
        blocks = levels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        # (rows / merge, columns / merge, merge, merge, C, side, side); the frames are copies of one another.
        ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3, 1, side, side)
        values = self.levels.normalised(ordered, 1).repeat(self.frames, axis=2)
        return Patches(torch.from_numpy(values.reshape(len(values), -1)), torch.tensor([[1, rows, columns]]))

    def halved(self, image: Image.Image, size: Size | None = None) -> Patches:
        width, height = self.wanted(size or image.size)
        budget = width * height // 2
        smaller = replace(self, min_pixels=(self.side * self.merge) ** 2, max_pixels=budget)
        return smaller.patches(scaled(image, budget))


@dataclass(frozen=True, slots=True)
class KimiPixels:
    """Kimi-VL: never enlarged, at most so many patches, black to the right and below up to whole merged patches."""

    levels: Levels
    side: int
    merge: int
    max_patches: int
    max_patches_a_side: int

    @classmethod
    def of(cls, processor: Any) -> "KimiPixels":  # noqa: ANN401 - a Kimi_K25ImageProcessor
        """As the checkpoint's processor is configured. Raises LoadFailed."""
        shape = (processor.patch_size, processor.merge_size, processor.max_patches, processor.size["max_height"])
        return cls(Levels.of(processor), *(int(number) for number in shape))

    def wanted(self, size: Size) -> Size:
        (height, width), _ = self._sizes(size)
        return width, height

    def patches(self, image: Image.Image, size: Size | None = None) -> Patches:
        (height, width), (padded_height, padded_width) = self._sizes(size or image.size)
        levels = resized(image, (width, height))
        side = self.side
        if (height, width) != (padded_height, padded_width):
            levels = np.pad(levels, ((0, padded_height - height), (0, padded_width - width), (0, 0)))
        rows, columns = padded_height // side, padded_width // side
        blocks = levels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        ordered = np.ascontiguousarray(blocks).reshape(-1, 3, side, side)
        return Patches(torch.from_numpy(self.levels.normalised(ordered, 1)), torch.tensor([[1, rows, columns]]))

    def halved(self, image: Image.Image, size: Size | None = None) -> Patches:
        width, height = size or image.size
        return self.patches(scaled(image, min(width * height, self.max_patches * self.side**2) / 2))

    def _sizes(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the picture and of the picture with its padding."""
        return navit_resize(size[1], size[0], self.side, self.merge, self.max_patches, self.max_patches_a_side)


@dataclass(frozen=True, slots=True)
class SquarePixels:
    """BLIP: a square, whatever the aspect."""

    levels: Levels
    width: int
    height: int

    @classmethod
    def of(cls, processor: Any) -> "SquarePixels":  # noqa: ANN401 - a BlipImageProcessor
        """As the checkpoint's processor is configured. Raises LoadFailed."""
        return cls(Levels.of(processor), int(processor.size["width"]), int(processor.size["height"]))

    def wanted(self, size: Size) -> Size:
        return self.width, self.height

    def patches(self, image: Image.Image, size: Size | None = None) -> Patches:
        levels = np.ascontiguousarray(resized(image, (self.width, self.height)).transpose(2, 0, 1))
        return Patches(torch.from_numpy(self.levels.normalised(levels, 0)), torch.ones((1, 3), dtype=torch.int64))

    def halved(self, image: Image.Image, size: Size | None = None) -> Patches:
        """The same as ever: the model's square is of one size."""
        return self.patches(image, size)
