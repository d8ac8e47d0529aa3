"""Rectangles in the frame of an image, one for each image of a batch."""

import torch
from torch import Tensor


def inside(images: Tensor, tall: Tensor | int, wide: Tensor | int, top: Tensor, left: Tensor) -> Tensor:
    """Which pixels lie in the rectangle of ``tall`` rows from ``top`` and ``wide`` columns from ``left``.

    Args:
        images: (B, C, H, W).
        tall, wide, top, left: (B,), or one number for all; the rectangle may reach beyond the frame.

    Returns:
        bool (B, 1, H, W), on the images' device.
    """
    rows, columns = (
        _between(side, start.to(images.device), length.to(images.device) if isinstance(length, Tensor) else length)
        for side, start, length in zip(images.shape[2:], (top, left), (tall, wide), strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _between(side: int, start: Tensor, length: Tensor | int) -> Tensor:
    """(B, side): which of 0 … side − 1 are in [start, start + length)."""
    place = torch.arange(side, device=start.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])
