"""One axis of a picture resized as Pillow does it (bicubic, 8 bits), without the padding or the parts that nobody will see.

Pillow resizes one axis after the other and needs the whole padded square for that, which for a strip of 60,000 pixels takes 14 GB.
Every output line depends on a window of input lines alone, so those that are there are enough. The arithmetic is that of Pillow's
Resample.c (HPND licence): weights in double precision, rounded to 22 bits, sums in integers; the results are equal bit by bit.
"""

import numpy as np

BITS = 22  # of the weights behind the binary point: 32 - 8 for the pixel - 2 for the sign and sums above 1
REACH = 2.0  # of the bicubic filter to either side, in pixels of the coarser of input and output


def windows(total: int, size: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Which lines enter outputs `first` to `first + count`, where `total` lines become `size`.

  Returns:
    (int[N] first line, int[N] line behind the last, float64[N, T] weights times 2**BITS, all integers).
  """
  scale = total / size
  coarser = max(scale, 1.0)
  center = (np.arange(first, first + count) + 0.5) * scale
  begin = np.maximum((center - REACH * coarser + 0.5).astype(np.int64), 0)
  end = np.minimum((center + REACH * coarser + 0.5).astype(np.int64), total)
  taps = np.arange((end - begin).max())
  weights = _bicubic((taps + begin[:, None] - center[:, None] + 0.5) * (1.0 / coarser))
  weights = np.where(taps < (end - begin)[:, None], weights, 0.0)
  weights /= np.cumsum(weights, 1)[:, -1:]  # one after the other, as Pillow sums
  return begin, end, np.trunc(weights * 2**BITS + np.where(weights < 0, -0.5, 0.5))


def _bicubic(x: np.ndarray) -> np.ndarray:
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  return np.where(x < 1, near, np.where(x < REACH, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))


def resize_lines(
  lines: np.ndarray, *, total: int, at: int, size: int, count: int, first: int = 0, fill: tuple[int, ...] | None = None
) -> np.ndarray:
  """Lines `first` to `first + count` of `total` lines resized to `size`.

  Args:
    lines: uint8[L, M, 3], lines `at` to `at + L` of the total.
    total, at, size: see above.
    count, first: how many outputs are wanted, and from where on.
    fill: [3], the colour of all lines that are not given; None where no window reaches them.

  Returns:
    uint8[count, M, 3].
  """
  begin, end, weights = windows(total, size, first, count)
  given = lines.reshape(len(lines), -1).astype(np.float64)  # sums of integers below 2**53: exact in any order
  fill = np.zeros(given.shape[1]) if fill is None else np.tile(np.float64(fill), lines.shape[1])
  out = np.empty((count, given.shape[1]))
  for i in range(count):
    low, high = max(begin[i], at), min(end[i], at + len(given))
    out[i] = weights[i].sum() * fill
    if low < high:
      used = weights[i, low - begin[i] : high - begin[i]]
      out[i] += used @ given[low - at : high - at] - used.sum() * fill
  out = np.floor((out + 2 ** (BITS - 1)) / 2**BITS)
  return np.clip(out, 0, 255).astype(np.uint8).reshape(count, *lines.shape[1:])
