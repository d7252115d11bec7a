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
| others                          | refused by name                                                                       |

An animation, or a document of several pages, is refused: a question about it is not one about its first frame.
Every format that Pillow reads by itself is read, by content and not by name; EPS is refused, because reading it runs another
program. A truncated file, an unknown format, a picture above Pillow's decompression-bomb limit (179 million pixels), a side longer
than `MAX_SIDE` and a file larger than `MAX_BYTES` are refused, so that a picture takes at most 1.5 GB while it is read. Height or
width of 1 or 3 pixels is nothing special (transformers 4.37 takes such arrays for channels-first).

LLaVA pads to a square before it resizes, and a strip's square is far larger than the strip. Above `CANVAS` pixels the result is
computed from the strip alone (`resample`), equal bit by bit; below, Pillow is faster.
"""

import io
import warnings
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from dynllava_jax.config import VisionConfig
from dynllava_jax.data.resample import resize_lines, windows
from dynllava_jax.data.samples import DataError

Image.init()
FORMATS = tuple(sorted(set(Image.OPEN) - {'EPS'}))
MAX_SIDE = 2**18  # pixels; the original's square would take 256 GiB
MAX_BYTES = 2**30  # more than all pixels of the largest picture
CANVAS = 2**25  # pixels of a square that is made: 128 MiB
IN_FRAMES = ('GIF', 'PNG', 'WEBP', 'AVIF', 'TIFF', 'FLI', 'DCX')  # animations and pages; MPO's further ones are views of the first
BAND = 2**20  # pixels transposed at a time
# Pillow resizes columns first; from 13.0 on rows where the height shrinks by more than twice as many pixels as the width (PR 9549).
ROWS_FIRST = int(PIL.__version__.partition('.')[0]) >= 13
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # of half the limit: read, as in the original
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
  return _as_rgb(lambda: Image.open(io.BytesIO(content), formats=FORMATS), name, f'; {len(content)} bytes', rotate)


def from_memory(image: np.ndarray | Image.Image, name: str) -> Image.Image:
  """A picture that is decoded already, or opened by Pillow, as RGB by the rules above; DataError as for `decode`."""
  if isinstance(image, Image.Image):
    return _as_rgb(image.copy, name)
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    shape = 'x'.join(map(str, image.shape))
    raise DataError(f'{name}: {image.dtype} of shape {shape}, expected uint8 of height x width x 3 (RGB)', 'undecodable_image')
  return Image.fromarray(image)


def _as_rgb(open_: Callable[[], Image.Image], name: str, size: str = '', rotate: bool = False) -> Image.Image:
  """What `open_` opens as RGB; DataError if it cannot be. `size`: for messages."""
  try:
    image = open_()
    if max(image.size) > MAX_SIDE:
      message = f'{name}: {image.size[0]} x {image.size[1]} pixels, sides of at most {MAX_SIDE:,} are read; scale it down or cut it'
      raise DataError(message, 'undecodable_image')
    if image.mode not in CONVERTIBLE:
      message = f'{name}: {image.format or "picture"} of mode {image.mode}, expected 8 bits per channel; convert the file'
      raise DataError(message, 'undecodable_image')
    if image.format in IN_FRAMES and getattr(image, 'n_frames', 1) > 1:
      message = f'{name}: {image.format} of {image.n_frames} frames, expected one picture; save the frame that is meant'
      raise DataError(message, 'other_content')
    image.info.pop('transparency', None)  # Pillow would warn, and the colours are the same
    image.load()
    if rotate:
      image = ImageOps.exif_transpose(image)
    return image if image.mode == 'RGB' else image.convert('RGB')
  except DataError:
    raise
  except UnidentifiedImageError:
    raise DataError(f'{name}: no picture in a format that is read{size}', 'undecodable_image') from None
  except Exception as e:  # a broken file can make Pillow's readers raise anything
    why = str(e) or type(e).__name__
    raise DataError(f'{name}: cannot be decoded ({why}){size}', 'undecodable_image') from None


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
  colour = tuple(int(255 * m) for m in cfg.image_mean)
  if aspect == 'pad' and width != height:
    side = max(width, height)
    if side * side > CANVAS:
      return _padded(image, size, colour)
    square = Image.new('RGB', (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    image, width, height = square, side, side
  short = min(width, height)
  width, height = size * width // short, size * height // short
  if width * height > CANVAS:
    return _middle(image, size)
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  if (width, height) != (size, size):
    image = image.crop((left, top, left + size, top + size))
  return np.asarray(image)


def _padded(image: Image.Image, size: int, colour: tuple[int, int, int]) -> np.ndarray:
  """As padded to a square and resized, columns before rows as Pillow resizes a square."""
  width, height = image.size
  side = max(width, height)
  how = dict(total=side, at=(side - min(width, height)) // 2, size=size, count=size, fill=colour)
  if width > height:
    return resize_lines(np.asarray(image.resize((size, height), Image.Resampling.BICUBIC)), **how)
  return np.asarray(_resize_columns(image, **how).resize((size, size), Image.Resampling.BICUBIC))


def _middle(image: Image.Image, size: int) -> np.ndarray:
  """As resized to `size` along the shorter side, the middle cut out; what no pixel of the middle depends on is cut off first."""
  width, height = image.size
  total, resized = max(width, height), size * max(width, height) // min(width, height)
  first = (resized - size) // 2
  begin, end, _ = windows(total, resized, first, size)
  how = dict(total=total, at=int(begin[0]), size=resized, first=first, count=size)
  if width > height:
    image = image.crop((begin[0], 0, end[-1], height))
    return np.asarray(_resize_columns(image, **how).resize((size, size), Image.Resampling.BICUBIC))
  image = image.crop((0, begin[0], width, end[-1]))
  if ROWS_FIRST and resized < height and height - resized > 2 * (width - size):
    return np.asarray(Image.fromarray(resize_lines(np.asarray(image), **how)).resize((size, size), Image.Resampling.BICUBIC))
  return resize_lines(np.asarray(image.resize((size, image.size[1]), Image.Resampling.BICUBIC)), **how)


def _resize_columns(image: Image.Image, *, count: int, **how) -> Image.Image:
  """`resize_lines` of the columns, some rows at a time: the memory that it takes does not grow with the picture."""
  width, height = image.size
  out = np.empty((height, count, 3), np.uint8)
  step = max(BAND // max(width, count), 1)
  for top in range(0, height, step):
    band = np.asarray(image.crop((0, top, width, min(top + step, height))))
    out[top : top + step] = resize_lines(band.transpose(1, 0, 2), count=count, **how).transpose(1, 0, 2)
  return Image.fromarray(out)
