"""Brings PyTorch LLaVA and Dynamic-LLaVA checkpoints here, and ours back to PyTorch.

    python convert_weights.py --src=llava-1.5-7b-hf --dst=checkpoints/llava-7b
    python convert_weights.py --src=hf:llava-hf/llava-1.5-7b-hf --dst=checkpoints/llava-7b
    python convert_weights.py --src=llava-v1.5-7b --vision=clip-vit-large-patch14-336 --dst=checkpoints/llava-7b
    python convert_weights.py --src=vicuna-7b-v1.5 --vision=CLIP --projector=mm_projector.bin --dst=DIR
    python convert_weights.py --src=llava-lora --base=vicuna-7b-v1.5 --vision=CLIP --dst=DIR
    python convert_weights.py --src=checkpoints/llava-7b --export=llava-hf --dst=DIR
    python convert_weights.py --src=checkpoints/llava-7b --dst=checkpoints/moe-7b --upcycle=4
    python convert_weights.py --inspect=DIR
    python convert_weights.py --src=DIR --dst=DIR --verify=case.npz

The layout is recognised; docs/checkpoints.md has a table. With --verify a recorded case is recomputed with the
converted weights; exit status 1 unless every quantity agrees.
"""

import sys

from absl import flags

from dynllava_jax import command_line, hub, paths
from dynllava_jax.display import printable
from dynllava_jax.workspace import workspace

SRC = command_line.define_path('src', None, 'PyTorch checkpoint, a directory or hf:ORG/NAME[@REVISION]; with --export one of ours.')
DST = command_line.define_path('dst', None, 'Directory to write; new or empty, unless --overwrite.')
VISION = command_line.define_path('vision', None, "CLIP directory or hf:ORG/NAME; the config's mm_vision_tower if not given.")
BASE = command_line.define_path('base', None, 'Model that the LoRA adapter or lone projector in --src belongs to.')
PROJECTOR = command_line.define_path('projector', None, "mm_projector.bin, or 'new' for a random projector.")
ADD_PREDICTORS = flags.DEFINE_bool('add_predictors', False, 'Make a dense model dynamic with untrained predictors.')
SEED = flags.DEFINE_integer(
  'seed', 0, 'Seed of untrained projectors, predictors and routers.', lower_bound=0, upper_bound=2**32 - 1
)
EXPORT = flags.DEFINE_enum(
  'export', None, ['llava-hf', 'llava', 'dynamic-llava', 'moe-llava', 'peft'], 'Write --src, one of ours, for PyTorch.'
)
DROP_PREDICTORS = flags.DEFINE_bool('drop_predictors', False, 'Export the dense part of a model with predictors.')
UPCYCLE = flags.DEFINE_integer('upcycle', None, 'Make --src, one of ours, a model with so many experts.', lower_bound=1)
INSPECT = command_line.define_path('inspect', None, 'Only describe the checkpoint in this directory, PyTorch or ours.')
DTYPE = flags.DEFINE_enum(
  'dtype',
  'keep',
  ['keep', 'float32', 'bfloat16', 'int8'],
  "What to store; keep: what the source has, int8: the decoder's matrices.",
)
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace what is at --dst, once the new checkpoint is whole.')
NO_READBACK = flags.DEFINE_bool('no_readback', False, 'Do not read again and compare what was written.')
VERIFY = command_line.define_path('verify', None, 'Recorded case (.npz) to recompute with the converted weights.')

NOT_UPCYCLING = (BASE, PROJECTOR, ADD_PREDICTORS, VERIFY)
ONLY_CONVERSION = (*NOT_UPCYCLING, SEED)
NOT_INSPECTION = (SRC, DST, VISION, *ONLY_CONVERSION, EXPORT, DROP_PREDICTORS, DTYPE, OVERWRITE, NO_READBACK, UPCYCLE)


def refuse(reason: str, *unused: flags.FlagHolder) -> None:
  given = [f'--{f.name}' for f in unused if f.value != f.default]
  if given:
    raise command_line.ConfigError(f'{", ".join(given)}: no use {reason}; leave out')


def source(flag: flags.FlagHolder):
  """The file or folder that a flag gives, on this machine: of the hub or of a store its copy."""
  return hub.fetched(flag.value, f'--{flag.name}') if hub.is_hub(flag.value) else command_line.read(flag)


def main(_) -> None:
  with command_line.readable_errors():
    if INSPECT.value:
      refuse('with --inspect', *NOT_INSPECTION)
    elif UPCYCLE.value:
      refuse('with --upcycle', *NOT_UPCYCLING, VISION, EXPORT, DROP_PREDICTORS, DTYPE, NO_READBACK)
    elif EXPORT.value:
      refuse('with --export', *ONLY_CONVERSION)
    else:
      refuse('without --export', DROP_PREDICTORS)
      if DTYPE.value == 'int8':
        refuse('with --dtype=int8, whose rounded weights do not give the recorded numbers', VERIFY)
      if PROJECTOR.value != 'new' and not ADD_PREDICTORS.value:
        refuse('without --projector=new or --add_predictors', SEED)
    from dynllava_jax.convert import inspection, report
    from dynllava_jax.convert.source import Request

    if INSPECT.value:
      print(printable(inspection.describe(command_line.read(INSPECT)), lines=True))
      return
    if not SRC.value or not DST.value:
      raise command_line.ConfigError('--src and --dst are needed; see --help')
    dst = command_line.path(DST)
    for flag in (SRC, VISION, BASE, PROJECTOR):
      if flag.value not in (None, 'new') and not hub.is_hub(flag.value) and paths.overlap(command_line.path(flag), dst):
        raise command_line.ConfigError(f'--dst: {dst} is, holds or lies in --{flag.name}={flag.value}; choose another')
    request = Request(
      src=source(SRC),
      vision=source(VISION),
      base=source(BASE),
      projector=PROJECTOR.value if PROJECTOR.value in (None, 'new') else str(command_line.read(PROJECTOR)),
      add_predictors=ADD_PREDICTORS.value,
      seed=SEED.value,
    )
    case, readback = command_line.read(VERIFY), not NO_READBACK.value
    with workspace(dst, '--dst', stub=lambda name: True, at_once=True) as folder:
      if UPCYCLE.value:
        report.run_upcycle(request.src, folder, UPCYCLE.value, seed=SEED.value, overwrite=OVERWRITE.value)
        return
      if EXPORT.value:
        options = dict(dtype=DTYPE.value, overwrite=OVERWRITE.value, drop_predictors=DROP_PREDICTORS.value)
        report.run_export(request.src, folder, EXPORT.value, vision=request.vision, readback=readback, **options)
        return
      passed = report.run_conversion(request, folder, DTYPE.value, OVERWRITE.value, readback, case and str(case))
  sys.exit(0 if passed else 1)


if __name__ == '__main__':
  command_line.run(main)
