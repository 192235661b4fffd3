"""Images from files, with Pillow: one size, one number of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pomona.errors import PomonaError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_GRAY = frozenset({"1", "L", "LA", "I", "I;16", "F"})


def read_images(
    paths: Sequence[Path],
    size: int,
    channels: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Pixels (n, channels, size, size) as uint8, resized without regard to the aspect.

    Args:
        paths: image files.
        size: height and width to resize to.
        channels: 1 (gray) or 3 (RGB); by default 1 if the first 50 images are all gray.
        progress: told how far the reading is, every thousand images.

    Raises:
        PomonaError: naming the first file that is missing or not an image.
    """
    if channels is None:
        channels = 1 if paths and all(_is_gray(path) for path in paths[:50]) else 3
    out = np.empty((len(paths), channels, size, size), np.uint8)
    for row, path in enumerate(paths):
        out[row] = _read(path, size, channels)
        if progress is not None and (row + 1) % 1000 == 0:
            progress(f"{row + 1:,} of {len(paths):,} images read")
    return out


def _is_gray(path: Path) -> bool:
    with _open(path) as image:
        return image.mode in _GRAY


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise PomonaError(f"image {str(path)!r} is not there") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise PomonaError(f"image {str(path)!r} cannot be read; mend or remove it") from error


def _read(path: Path, size: int, channels: int) -> np.ndarray:
    with _open(path) as image:
        try:
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((size, size)))
        except (OSError, SyntaxError, ValueError) as error:
            raise PomonaError(f"image {str(path)!r} cannot be read; mend or remove it") from error
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
