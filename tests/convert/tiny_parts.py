"""The recorded dynamic model in pieces, and folders made of them."""

import json

from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dynllava_jax.convert.plan import assign, slot_name
from dynllava_jax.convert.source import Request, open_source

CASE = GOLDEN / 'public_b'
CLIP = CASE / 'clip'
WEIGHTS = load_file(CASE / 'checkpoint' / 'model.safetensors')
PROJECTOR = {k: v for k, v in WEIGHTS.items() if 'mm_projector' in k}
LLAMA = {k: v for k, v in WEIGHTS.items() if 'mm_projector' not in k and 'predictor' not in k}
CONFIG = json.loads((CASE / 'checkpoint' / 'config.json').read_text())
TEXT_CONFIG = {k: v for k, v in CONFIG.items() if not k.startswith('mm_') and k != 'sparse_config'} | {'model_type': 'llama'}


def write(directory, config, weights, name='model.safetensors'):
  """A checkpoint folder; None leaves a file out."""
  directory.mkdir(exist_ok=True)
  if config is not None:
    (directory / 'config.json').write_text(json.dumps(config))
  if weights is not None:
    save_file(weights, directory / name)
  return directory


def planned(**request):
  """Source tensor by target of what would be converted."""
  found = open_source(Request(**request))
  return found, {slot_name(a.path, a.index): a for a in assign(found.info, found.tensors, None)}
