"""The methods that a run can be made of, and whether they still compute what was recorded of them.

    python -m dynllava_jax.methods
    python -m dynllava_jax.methods --verify=RECORD --bases=DIR

The first lists them: name, options, where each is published, and what it was compared with. The second recomputes a record, a
folder with case.npz and meta.json; the models that it was recorded with are looked for beside it and below DIR. It prints a line
per quantity: its name, the largest difference, the largest allowed. Exit status 1 unless all agree.
"""

import dataclasses
import sys

from absl import flags

from dynllava_jax import command_line, methods, paths, remote
from dynllava_jax.config import ConfigError

ANY = dataclasses.MISSING
# What was asked, which nothing recomputes.
GIVEN = (
  *('input_ids', 'text_ids', 'chunk_ids', 'attention_mask', '/labels', 'pixel_values', 'image_index', '/ratio'),
  *('/gumbel_image', '/gumbel_text', '/gumbel_instruct', '/tau', '/expanded_labels'),
)


def listing() -> list[str]:
  """One paragraph per piece, by site."""
  lines = []
  for site, pieces in methods.METHODS.items():
    for name, piece in sorted(pieces.items()):
      fields = dataclasses.fields(piece.options)
      options = ', '.join(f'{f.name}: {f.type.__name__}' + (f' = {f.default!r}' if f.default is not ANY else '') for f in fields)
      lines.append(f'{site:<10} {name}')
      lines += [f'{"":<13}{what}: {text}' for what, text in (('options', options), ('from', piece.source)) if text]
      lines.append(f'{"":<13}compared with: {piece.verified or "nothing, a baseline of this project"}')
  return lines


def verify(folder: str, bases: str | None) -> bool:
  """Prints a line per quantity of a record; whether all agree."""
  from dynllava_jax.convert.records.bases import open_record
  from dynllava_jax.convert.verify import verify_method, why_left

  places = (text and remote.fetched(paths.given(text, flag)) for text, flag in ((folder, '--verify'), (bases, '--bases')))
  record = open_record(*places)
  found = []
  for quantity in verify_method(record):
    print(quantity, flush=True)
    found.append(quantity)
  named = {q.name.rpartition(': ')[2].partition('[')[0] for q in found}  # NAME[ROW] is a part of an array
  left = [k for k in record.case if k not in named and not k.endswith(GIVEN)]
  for reason, names in why_left(record, left).items():
    print(f'not compared: {", ".join(names)} ({reason})')
  passed = sum(q.ok for q in found)
  print(f'verify: {passed} of {len(found)} passed')
  return passed == len(found) > 0


def main(_) -> None:
  """Lists, or verifies."""
  given = flags.FLAGS
  with command_line.readable_errors():
    if given.verify is None:
      if given.bases is not None:
        raise ConfigError('--bases: no use without --verify; leave it out')
      print('\n'.join(listing()))
      return
    well = verify(given.verify, given.bases)
  sys.exit(0 if well else 1)


if __name__ == '__main__':
  command_line.define_path('verify', None, 'Folder of the record to recompute.')
  command_line.define_path('bases', None, 'Folder of the models that records name.')
  command_line.run(main)
