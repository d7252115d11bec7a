"""Numbers that no trained model holds, looked for while a tensor is hashed and lies in the processor's cache anyway."""

import dataclasses
from typing import Protocol

import numpy as np

TOO_LARGE = 65536.0  # the published checkpoints of all these models fit into float16, whose largest number is 65,504
BLOCK = 2**19  # bytes


class Digest(Protocol):
  """What `hashlib` and `xxhash` give."""

  def update(self, data, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Looked:
  """What was seen of a tensor: whether some numbers are impossible, whether all are zero."""

  implausible: bool
  zero: bool


def look(value: np.ndarray, digest: Digest) -> Looked:
  """Feeds the bytes of a contiguous array of floating-point numbers to a digest, and looks at the numbers.

  As integers, the numbers of one sign grow with their magnitude up to infinity and NaN: two maxima, one of them with the
  sign as the highest bit, tell the largest magnitude of each sign.
  """
  bits = value.reshape(-1).view(f'u{value.itemsize}')
  signed = bits.view(f'i{value.itemsize}')
  sign = 1 << (8 * value.itemsize - 1)
  with np.errstate(over='ignore'):  # in float16 the limit is infinity
    limit = int(np.asarray(TOO_LARGE).astype(value.dtype).view(bits.dtype))
  positive = any_sign = 0
  for start in range(0, bits.size, BLOCK // value.itemsize):
    block = slice(start, start + BLOCK // value.itemsize)
    digest.update(bits[block].data)
    positive = max(positive, int(signed[block].max()))
    any_sign = max(any_sign, int(bits[block].max()))
  return Looked(positive >= limit or any_sign >= sign + limit, positive == 0 and any_sign in (0, sign))


def describe(value: np.ndarray) -> str:
  """How many numbers of an array are NaN, infinite or too large, for people."""
  numbers = value.astype(np.float64)
  counts = {
    'NaN': np.isnan(numbers).sum(),
    'infinite': np.isinf(numbers).sum(),
    f'beyond {TOO_LARGE:,.0f}': (np.isfinite(numbers) & (np.abs(numbers) >= TOO_LARGE)).sum(),
  }
  return f'of {value.size:,} numbers ' + ', '.join(f'{n:,} {"is" if n == 1 else "are"} {kind}' for kind, n in counts.items() if n)
