"""Reading images between their pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def precision(images: Tensor) -> torch.dtype:
    """The type to compute in: float64 for float64, float32 for all others."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def resample(images: Tensor, grid: Tensor, interpolation: str = "bilinear") -> Tensor:
    """The images (B, C, H, W) read at the places ``grid`` (B, H', W', 2), black outside the frame.

    The places are (x, y) in units in which the frame is [−1, 1]² with pixels as squares (``align_corners=False`` of
    torch's ``grid_sample``), on the images' device and of their :func:`precision`. uint8 images are rounded.
    """
    dtype = precision(images)
    read = F.grid_sample(images.to(dtype), grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return read.round().to(images.dtype) if images.dtype == torch.uint8 else read.to(images.dtype)
