"""Augmentation of training images that is the same wherever and whenever it is computed.

What becomes of an image depends on the seed, the epoch, the view and the image's id alone
(`pipelines.train.draws`), not on the worker, the batch or the order. Every step is either a copy
of bytes or done image by image or element by element, so a batch may be split in any way.

    crop (with a border, or resized) -> flip -> colours (jitter, then grey)

which is the order of SimCLR's and PASCL's views.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.data.augmentation import Augmentation, Jitter, Range
from pipelines.train import colours
from pipelines.train.draws import Draws, Ids, Purpose, uniforms

__all__ = ["Augmentation", "Jitter", "augment", "uniforms"]

Images = NDArray[np.uint8]  # (N, H, W, 3)
ATTEMPTS = 10  # torchvision's, for a crop that lies within the image


def augment(
    pixels: Tensor, ids: Ids, how: Augmentation, *, seed: int, epoch: int, view: int = 0
) -> Tensor:
    """The images of one epoch and view, uint8 (N, H, W, 3).

    Args:
        pixels: images, uint8 (N, H, W, 3) in the memory of the CPU; they stay as they are, and
            the result shares their memory where `how` changes nothing.
        ids: of the images, uint64 (N,), see `pipelines.train.images.ImageTable.ids`.
        how: what is done; with `resized_crop` and a `size`, H and W of the result are that.
        seed: of the training.
        epoch: its number.
        view: a number, where an image is seen several times in an epoch.

    Raises:
        ValueError: for pixels or ids of another type or shape.
    """
    _check(pixels, ids)
    draws = Draws(ids, seed, epoch, view)
    images = _cropped(pixels.numpy(), draws, how)
    if how.flip:
        images = _flipped(images, flips(draws))
    if any(how.jitter.strengths) or how.grey:
        images = _coloured(images, draws, how)
    return torch.from_numpy(images)


def offsets(draws: Draws, pad: int) -> NDArray[np.intp]:
    """Where the window of a padded crop starts in the padded image: row and column, int (N, 2).

    Each is one of 0 ... 2 * pad with the same probability.
    """
    return (draws.uniforms(Purpose.CROP, 2) * (2 * pad + 1)).astype(np.intp)


def flips(draws: Draws) -> NDArray[np.bool_]:
    """Whether an image is mirrored, with probability 1/2, bool (N,)."""
    mirrored: NDArray[np.bool_] = draws.uniforms(Purpose.FLIP, 1)[:, 0] < 0.5
    return mirrored


def boxes(draws: Draws, size: tuple[int, int], *, scale: Range, ratio: Range) -> NDArray[np.intp]:
    """The parts of images that resized crops take: top, left, height, width, int (N, 4).

    Drawn as torchvision's `RandomResizedCrop.get_params` does: ten attempts at a box of a uniform
    area and a log-uniform ratio, and where none lies within the image the largest box in its
    middle that has a permitted ratio.

    Args:
        draws: of N images.
        size: height and width of the images in pixels.
        scale: the least and the largest area, as shares of the image.
        ratio: the least and the largest width over height.
    """
    high, wide = size
    units = draws.uniforms(Purpose.CROP, 2 + 2 * ATTEMPTS)
    areas = high * wide * (scale[0] + units[:, 2::2] * (scale[1] - scale[0]))
    low, top = np.log(ratio)
    ratios = np.exp(low + units[:, 3::2] * (top - low))
    widths = np.rint(np.sqrt(areas * ratios)).astype(np.intp)
    heights = np.rint(np.sqrt(areas / ratios)).astype(np.intp)
    fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= high)
    rows, first = np.arange(len(units)), np.argmax(fits, axis=1)
    sides = np.stack([heights[rows, first], widths[rows, first]], axis=1)
    free = np.array(size) - sides
    found = np.concatenate([(units[:, :2] * (free + 1)).astype(np.intp), sides], axis=1)
    return np.where(fits.any(axis=1)[:, None], found, _middle(size, ratio))


def _middle(size: tuple[int, int], ratio: Range) -> NDArray[np.intp]:
    """The largest box in the middle of an image with a permitted ratio: as `boxes`, (4,)."""
    high, wide = size
    height, width = high, wide
    if wide / high < ratio[0]:
        height = round(wide / ratio[0])
    elif wide / high > ratio[1]:
        width = round(high * ratio[1])
    return np.array([(high - height) // 2, (wide - width) // 2, height, width])


def _check(pixels: Tensor, ids: Ids) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"pixels {kind} {tuple(pixels.shape)}: give uint8 (N, H, W, 3)")
    if ids.dtype != np.uint64 or ids.shape != pixels.shape[:1]:
        raise ValueError(
            f"ids {ids.dtype} {ids.shape}: give uint64 ({len(pixels)},), one for each image"
        )


def _cropped(images: Images, draws: Draws, how: Augmentation) -> Images:
    if how.crop == "pad_crop":
        return _windows(images, offsets(draws, how.pad), how.pad)
    if how.crop == "resized_crop":
        size = images.shape[1], images.shape[2]
        side = size if how.size is None else (how.size, how.size)
        return _resized(images, boxes(draws, size, scale=how.scale, ratio=how.ratio), side)
    return images


def _windows(images: Images, starts: NDArray[np.intp], pad: int) -> Images:
    """The window of each image that starts there in the image with a black border.

    All windows of a padded image are one view of it, in which a row of a window is contiguous:
    picking one an image copies whole rows. That is 70 times as fast as an index for every pixel.
    """
    number, high, wide, channels = images.shape
    padded = np.zeros((number, high + 2 * pad, wide + 2 * pad, channels), np.uint8)
    padded[:, pad : pad + high, pad : pad + wide] = images
    image, row, pixel, byte = padded.strides
    shape = (number, 2 * pad + 1, 2 * pad + 1, high, wide * channels)
    views = as_strided(padded, shape, (image, row, pixel, row, byte), writeable=False)
    windows: Images = views[np.arange(number), starts[:, 0], starts[:, 1]]
    return windows.reshape(images.shape)


def _flipped(images: Images, mirrored: NDArray[np.bool_]) -> Images:
    """The images, of which some are mirrored left to right; a new array."""
    rows = np.flatnonzero(mirrored)
    result = images.copy()
    # torch has a kernel for three bytes a pixel; numpy copies a reversed axis pixel by pixel.
    chosen = torch.from_numpy(result[rows]).permute(0, 3, 1, 2)
    result[rows] = chosen.flip(3).permute(0, 2, 3, 1).numpy()
    return result


def _resized(images: Images, parts: NDArray[np.intp], size: tuple[int, int]) -> Images:
    """Each image's box, resized with a bilinear filter that is as wide as a pixel of the result.

    That filter (antialias) is what torchvision's RandomResizedCrop uses too. One image at a time:
    the boxes have different sizes.
    """
    result = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for slot, (top, left, high, wide) in enumerate(parts.tolist()):
        part = torch.from_numpy(images[slot, top : top + high, left : left + wide])
        planes = part.permute(2, 0, 1)[None]
        resized = interpolate(planes, size, mode="bilinear", antialias=True)
        result[slot] = resized[0].permute(1, 2, 0).numpy()
    return result


def _coloured(images: Images, draws: Draws, how: Augmentation) -> Images:
    """The images with jittered colours, some of them grey."""
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if any(how.jitter.strengths):
        planes = colours.jittered(planes, colours.changes(draws, how.jitter), how.jitter)
    if how.grey:
        rows = np.flatnonzero(draws.uniforms(Purpose.GREY, 1)[:, 0] < how.grey)
        if len(rows):
            planes = planes.copy()
            planes[rows] = colours.grey(planes[rows])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
