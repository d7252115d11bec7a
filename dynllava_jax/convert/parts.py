"""What a model is put together from: a base, and an adapter or a projector that belongs to it."""

import dataclasses
import pathlib
import re
from typing import Any

from dynllava_jax.convert.configs import check_same_arithmetic, tied
from dynllava_jax.convert.inputs import ConversionError, read_json
from dynllava_jax.convert.layouts import ADAPTER_CONFIG, Layout, canonical, detect
from dynllava_jax.convert.lora import merge
from dynllava_jax.convert.readers import Tensor, by_name, check_filled, directory_tensors, file_tensors

PROJECTOR_FILE = 'mm_projector.bin'
NEW = 'new'
PROJECTOR = 'model.mm_projector.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What the command line asks for.

  Attributes:
    src: the checkpoint directory.
    vision: CLIP directory; by default the config's `mm_vision_tower`.
    base: the model that a LoRA adapter or a lone projector in `src` belongs to.
    projector: `mm_projector.bin`, or 'new' for a random one.
    add_predictors: make a dense model dynamic with random predictors.
    seed: of whatever is random.
  """

  src: pathlib.Path
  vision: pathlib.Path | None = None
  base: pathlib.Path | None = None
  projector: str | None = None
  add_predictors: bool = False
  seed: int = 0


def named(layout: Layout, tensors: list[Tensor], notes: list[str]) -> list[tuple[str, Tensor]]:
  """Tensors with the converter's names; ConversionError if one of them is empty."""
  check_filled(tensors)
  named = [(canonical(layout, t.key), t) for t in tensors]
  skipped = sum(k is None for k, _ in named)
  if skipped:
    notes.append(f'passed over {skipped} tensors that are computed or not part of LLaVA (rotary frequencies, ids, CLIP text side)')
  return [(k, t) for k, t in named if k is not None]


def base_directory(request: Request) -> pathlib.Path:
  """Where the model is that an adapter or projector belongs to; ConversionError if that is not said."""
  file = request.src / ADAPTER_CONFIG
  named = request.base or (read_json(file).get('base_model_name_or_path') if file.exists() else None)
  if named and pathlib.Path(str(named)).is_dir():
    return pathlib.Path(str(named))
  raise ConversionError(
    f'{request.src}: an adapter or projector alone; give the directory of the model it belongs to with --base'
    + (f' ({named} is not here)' if named else '')
  )


def on_base(
  request: Request, layout: Layout, config: dict[str, Any], notes: list[str]
) -> tuple[list[tuple[str, Tensor]], Layout, dict[str, Any], pathlib.Path]:
  """The base's tensors with the adapter and the separately trained weights of `src` put in; layout, config and its file.

  Raises:
    ConversionError: adapter and base do not belong together.
  """
  base, file = base_directory(request), request.src / 'config.json'
  base_layout, base_config = detect(base)
  adapter = layout is Layout.LORA
  expected = (Layout.LLAMA, Layout.LLAVA, Layout.DYNAMIC_LLAVA, *[Layout.LLAVA_HF] * adapter)
  if base_layout not in expected:
    raise ConversionError(f'{base}: {base_layout.value}; expected a LLaMA or LLaVA checkpoint as --base')
  found = by_name(named(base_layout, directory_tensors(base, notes), notes))
  if base_layout is Layout.LLAVA_HF:  # PEFT's adapters bring no config
    layout, config, file = base_layout, base_config, base / 'config.json'
  else:
    check_same_arithmetic(base / 'config.json', base_config, file, config)
    config = base_config | config
  if adapter:
    found = merge(request.src, found, base_layout, tied(base / 'config.json', base_config), notes)
  elif not request.projector:
    trained = projector_tensors(request.src / PROJECTOR_FILE)
    found |= trained
    notes.append(f'took {len(trained)} tensors from {request.src / PROJECTOR_FILE}')
  return list(found.items()), layout, config, file


def projector_tensors(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a projector file by the converter's names; ConversionError if it holds anything else."""
  if not path.exists():
    raise ConversionError(f'{path}: missing; expected a projector file ({PROJECTOR_FILE})')
  tensors = file_tensors(path)
  check_filled(tensors)
  named = by_name((re.sub(r'.*mm_projector\.', PROJECTOR, t.key), t) for t in tensors)
  strange = [t.key for k, t in named.items() if not k.startswith(PROJECTOR)]
  if strange or not named:
    raise ConversionError(f'{path}: holds {strange[0] if strange else "nothing"}; expected only the tensors of a projector')
  return named
