"""Images on the host: decode to RGB, bring to a square, bicubic resize in uint8 (Pillow), as LLaVA and CLIP's processor do.

Batches carry uint8; normalisation happens on the device (`ops.images.normalize`).

| Pillow mode                     | what happens                                                                          |
|---------------------------------|---------------------------------------------------------------------------------------|
| RGB, RGBX, YCbCr, LAB, HSV      | converted to RGB                                                                      |
| L, 1                            | grey in all three channels                                                            |
| P, PA                           | the palette's colours, transparency dropped                                           |
| RGBA, LA                        | alpha dropped, the colours under it shown, as in LLaVA (others composite on white)    |
| CMYK                            | converted by Pillow's formula, no colour profile                                      |
| I;16, I;16B, I;16L, I, F        | refused: conversion to 8 bits saturates nearly every pixel                            |
| others, several frames          | others refused by name; of an animation the first frame                               |

A truncated file, a picture above Pillow's decompression-bomb limit and an unknown file format are refused. Height or width of
1 or 3 pixels is nothing special (transformers 4.37 takes such arrays for channels-first).
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dynllava_jax.config import VisionConfig
from dynllava_jax.data.samples import DataError

FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM')
CONVERTIBLE = ('RGB', 'RGBX', 'YCbCr', 'LAB', 'HSV', 'L', '1', 'P', 'PA', 'RGBA', 'LA', 'CMYK')


def decode(content: bytes, name: str, rotate: bool = False) -> Image.Image:
  """An encoded picture as RGB.

  Args:
    content: the file's bytes.
    name: what error messages call it.
    rotate: whether to turn it as its EXIF orientation says; LLaVA does not.

  Raises:
    DataError: truncated, no picture, or a mode that does not fit into 8 bits.
  """
  try:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.mode not in CONVERTIBLE:
      message = f'{name}: {image.format} of mode {image.mode}, expected 8 bits per channel; convert the file'
      raise DataError(message, 'undecodable_image')
    image.info.pop('transparency', None)  # Pillow would warn, and the colours are the same
    image.load()
    if rotate:
      image = ImageOps.exif_transpose(image)
    return image if image.mode == 'RGB' else image.convert('RGB')
  except DataError:
    raise
  except UnidentifiedImageError:
    raise DataError(f'{name}: no picture in one of the formats {", ".join(FORMATS)}', 'undecodable_image') from None
  except Exception as e:  # a broken file can make Pillow's readers raise anything
    raise DataError(f'{name}: cannot be decoded ({e}); {len(content)} bytes', 'undecodable_image') from None


def preprocess(image: np.ndarray | Image.Image, cfg: VisionConfig, aspect: str = 'pad') -> np.ndarray:
  """RGB, uint8[H, W, 3] or Pillow image, to uint8[R, R, 3].

  Args:
    image: the picture.
    cfg: gives R and the mean colour.
    aspect: 'pad' puts it in the middle of a square of the mean colour (LLaVA-1.5); 'square' scales the shorter side to
      R and cuts the middle out (CLIP).
  """
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  size, (width, height) = cfg.image_size, image.size
  if aspect == 'pad' and width != height:
    side = max(width, height)
    square = Image.new('RGB', (side, side), tuple(int(255 * m) for m in cfg.image_mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    image, width, height = square, side, side
  short = min(width, height)
  width, height = size * width // short, size * height // short
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  if (width, height) != (size, size):
    image = image.crop((left, top, left + size, top + size))
  return np.asarray(image)
