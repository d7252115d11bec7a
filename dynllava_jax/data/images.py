"""Images on the host: RGB uint8, padded to a square in the mean colour, bicubic resize (Pillow), as LLaVA does."""

import numpy as np
from PIL import Image

from dynllava_jax.config import VisionConfig


def preprocess(image: np.ndarray, cfg: VisionConfig) -> np.ndarray:
  """uint8[H, W, 3] -> uint8[R, R, 3]; normalisation happens on the device (`ops.images.normalize`)."""
  height, width = image.shape[:2]
  side = max(height, width)
  if height != width:
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * m) for m in cfg.image_mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    image = square
  if side == cfg.image_size:
    return image
  return np.asarray(Image.fromarray(image).resize((cfg.image_size, cfg.image_size), Image.Resampling.BICUBIC))
