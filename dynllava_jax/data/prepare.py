"""LLaVA's JSON and image folders to ArrayRecord shards (`preparation`): the command line.

    python -m dynllava_jax.data.prepare --json=llava_v1_5_mix665k.json --images=data --out=prepared/llava/1.0.0 \\
        --tokenizer=vicuna-7b-v1.5 --on_bad_sample=skip
    python -m dynllava_jax.data.prepare --json=... --images=... --out=check --check       # only look

On several machines that see one --out, each `... --part=3/16`, twice: the first time it checks, and once all have, it writes its
shards. Then one of them the same with --finish instead: shards and digests are those that one machine makes.
"""

import contextlib
import math
import os
import sys

from absl import flags

from dynllava_jax import command_line, locks, paths, remote
from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import parts
from dynllava_jax.workspace import workspace


def define_flags() -> None:
  """The command line, defined only where this file is the program: tests import it."""
  command_line.define_path('json', None, 'JSON or JSONL file in LLaVA format; may be given several times.', several=True)
  flags.DEFINE_multi_float('weight', [], 'How often a sample of the JSON file is drawn per epoch; once per --json.')
  command_line.define_path('images', None, 'Folder that the image paths in the JSON start from.')
  command_line.define_path('out', None, 'Where the shards and the report go.')
  flags.DEFINE_bool('check', False, 'Only check and report.')
  flags.DEFINE_bool('image_bytes', True, 'Store the image files in the shards; off stores their paths.')
  command_line.define_path('tokenizer', None, 'Folder with the tokenizer; without it lengths are not measured.')
  flags.DEFINE_string('conversation', 'vicuna_v1', 'Template.')
  flags.DEFINE_integer('text_length', 1472, 'Largest text bucket; 1472 and 576 image tokens make 2048.')
  flags.DEFINE_multi_integer('bucket', [], 'Further, smaller text buckets, for the histogram.')
  flags.DEFINE_integer('image_tokens', 576, 'Positions an image takes.', lower_bound=1, upper_bound=2**20)
  flags.DEFINE_bool('truncate', False, 'Samples longer than the largest bucket will be cut in training: no problem.')
  flags.DEFINE_bool('allow_outside', False, 'Image paths may lead out of --images: by .., as absolute paths, through links.')
  flags.DEFINE_enum('on_bad_sample', 'error', ['error', 'skip'], 'Stop at bad samples, or leave them out.')
  flags.DEFINE_string('part', None, 'Do this part of the work, such as 3/16, while other machines do the others.')
  flags.DEFINE_bool('finish', False, 'All parts are done: make a data set of what they wrote, and write what is missing.')
  flags.DEFINE_integer('processes', os.cpu_count(), 'Worker processes.', lower_bound=1, upper_bound=1024)
  flags.DEFINE_integer('shard_samples', 5000, 'Samples per shard: 700 MB with the images of mix665k.', lower_bound=1)


def main(_) -> None:
  """One run of the command line; exit status 1 if there is something to mend."""
  given = flags.FLAGS
  with command_line.readable_errors():
    for name in ('json', 'images', 'out'):
      if not given[name].value:
        raise ConfigError(f'--{name} is missing; see --help')
    images, out = paths.given(given.images, '--images'), command_line.output_directory(given['out'])
    if not images.is_dir():
      raise ConfigError(f'--images: {images} is no folder; expected the one that the paths in the JSON start from')
    files = [remote.fetched(paths.given(text, '--json')) for text in given.json]
    names = [p.stem for p in files]
    if len(set(names)) < len(names):
      raise ConfigError(f'--json: {", ".join(names)}; files need different names, they name the sources')
    weights = given.weight or [1.0] * len(files)
    if len(weights) != len(files) or not all(math.isfinite(w) and w > 0 for w in weights):
      raise ConfigError(f'--weight: {weights}; expected one positive number per --json, {len(files)} of them')
    part = parts.read(given.part) if given.part is not None else None
    if (part or given.finish) and (given.check or (part and given.finish)):
      raise ConfigError('--part, --finish, --check: one of them at a time; --finish comes when all parts are done')
    # These bring jax along; the flags are known to be right by now.
    from dynllava_jax.data.check import Scan
    from dynllava_jax.data.conversation import check_template, template
    from dynllava_jax.data.preparation import prepare
    from dynllava_jax.data.shards import UNFINISHED
    from dynllava_jax.data.tokenizer import load_tokenizer, read_files

    data = DataConfig(
      conversation=given.conversation,
      text_length=given.text_length,
      buckets=tuple(given.bucket),
      truncate=given.truncate,
      on_bad_sample=given.on_bad_sample,
      allow_outside=given.allow_outside,
    )
    scan = Scan(
      json=dict(zip(names, files)),
      images=images,
      data=data,
      tokenizer=read_files(given.tokenizer) if given.tokenizer else None,
      num_patches=given.image_tokens,
      processes=given.processes,
    )
    style = template(data.conversation)  # a typo must not leave settings behind
    if scan.tokenizer:
      try:
        check_template(style, load_tokenizer(scan.tokenizer))
      except ConfigError as e:
        raise ConfigError(f'--tokenizer={given.tokenizer}: {e}') from None
    form = dict(only_check=given.check, image_bytes=given.image_bytes, shard_samples=given.shard_samples)
    form |= dict(part=part, finish=given.finish)
    if part and not paths.is_local(out):
      hint = 'mount the bucket (gcsfuse, s3fs) and give that path'
      raise ConfigError(f'--out: {out}: the machines of --part need a folder that all of them see; {hint}')
    try:
      with workspace(out, '--out') as folder, contextlib.ExitStack() as stack:
        stack.enter_context(locks.sole_use(folder, '--out', shared=part is not None))
        if part:
          stack.enter_context(locks.sole_use(folder / UNFINISHED / f'part-{part.number}-of-{part.count}', '--part'))
        good = prepare(scan, weights, folder, **form)
    except KeyboardInterrupt:
      print('interrupted; the same command goes on')
      sys.exit(130)
    sys.exit(0 if good else 1)


if __name__ == '__main__':
  define_flags()
  command_line.run(main)
