"""Sizes that batches of prompts are padded to, so that whatever comes in compiles a bounded number of programs.

Text slots are rounded up to 16, 24, 32, 48, 64, 96, ... and rows to 1, 2, 3, 4, 6, 8, 12, 16, ...: powers of two, and what lies
halfway between them. Batches of up to 64 rows with up to 2,048 text slots, however many kinds come, have at most 12 x 15 shapes.
Padding changes no answer: rows do not see each other, and a row does not see what is behind its length.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

LEAST_TEXT = 16
OPTIONAL = ('instruct_start', 'question')  # arrays of a prompt that not every run needs


def bucket(size: int, least: int) -> int:
  """The smallest of `least` x (1, 1.5, 2, 3, 4, 6, ...), as far as they are whole, that is not smaller than `size`."""
  power = least
  while power < size:
    if power % 2 == 0 and size <= power // 2 * 3:
      return power // 2 * 3
    power *= 2
  return power


def pad_prompt(prompt: Any, pixels: Any, num_image: int) -> tuple[Any, Any]:
  """A checked batch (`models.dynllava.Prompt`, uint8[B, R, R, 3]) in the sizes of its buckets.

  Further rows repeat the last one, so that they end when it does. Arrays that lie on several devices keep their number of rows, and
  of those that are not all on this host nothing is changed.
  """
  arrays = (prompt.tokens, prompt.length, prompt.image_start, prompt.seed, pixels)
  placed = [x for x in arrays if isinstance(x, jax.Array)]
  if any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in placed):
    return prompt, pixels
  rows, slots = prompt.tokens.shape
  more_slots = bucket(slots - num_image, LEAST_TEXT) - (slots - num_image)
  spread = any(len(x.sharding.device_set) > 1 for x in placed)
  more_rows = 0 if spread else bucket(rows, 1) - rows

  def padded(x, slots=0):
    if not slots and not more_rows:
      return x
    values = np.pad(np.asarray(x), [(0, more_rows)] + [(0, 0)] * (x.ndim - 1), mode='edge')
    values = np.pad(values, [(0, 0), (0, slots)]) if slots else values
    return jax.device_put(values, x.sharding) if isinstance(x, jax.Array) else values

  fields = {name: padded(x) for name in ('length', 'image_start', 'seed', *OPTIONAL) if (x := getattr(prompt, name)) is not None}
  return dataclasses.replace(prompt, tokens=padded(prompt.tokens, more_slots), **fields), padded(pixels)


def first_rows(tree: Any, rows: int) -> Any:
  """The first rows of all arrays [B, ...]; those themselves if there are no more."""
  if all(x.shape[0] == rows for x in jax.tree.leaves(tree)):
    return tree
  return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:rows]), tree)  # sliced on the device it would be one more program
