"""One conversion from top to bottom, and what it prints."""

import collections
import pathlib

from dynllava_jax import checkpoint
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.verify import load_case, verify


def run(src: pathlib.Path, dst: pathlib.Path, vision: str | None, case: str | None) -> bool:
  """Converts, prints the report and, if a case is given, the comparison. Returns whether all is well.

  Raises:
    ConversionError: nothing was written, or the case is unusable.
  """
  if case:
    load_case(case)  # a wrong path should not cost a conversion
  info, mapped, copies = convert(src, dst, vision)
  for line in mapped:
    print(f'{line.source:<72} -> {line.target:<48} {line.shape!s:<18} {line.dtype}')
  parts = collections.Counter(line.target.split('/')[0] for line in mapped)
  print(f'converted {len(mapped)} tensors to {dst}: ' + ', '.join(f'{n} {part}' for part, n in parts.items()))
  if copies:
    print(
      f'passed over {copies} tensors: the vision tower inside the checkpoint (the CLIP directory was read instead), and '
      'rotary frequencies (they are computed)'
    )
  if not case:
    return True
  quantities = verify(info, checkpoint.load_params(dst), case)
  for quantity in quantities:
    print(quantity)
  passed = sum(q.ok for q in quantities)
  print(f'verify: {passed} of {len(quantities)} passed')
  return passed == len(quantities)
