"""Layers that compute what those of transformers do, and faster."""

import torch
import torch.nn.functional as F


class PatchMatrix(torch.nn.Module):
    """A patch embedding as one matrix product.

    Its kernel is as large as its stride, so that a convolution does nothing else, but takes 2.4 times as long on a CPU,
    and in bfloat16 with some versions of cuDNN 10 to 50,000 times (transformers#45750, sglang-omni#132).
    """

    def __init__(self, convolution: torch.nn.Conv2d | torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(P, channels, [frames,] side, side) -> (P, width)."""
        return F.linear(patches.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)
