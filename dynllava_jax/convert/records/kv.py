"""Recomputes what was recorded of compressors that keep the best-scored keys, mostly by kvpress: one format for all of them.

`PROMPT/CASE/NAME` per prompt and setting, with the settings of the scores in `hyper` and the share that leaves in
`PROMPT/CASE/ratio`. A method `kv_NAME` is over the prompt, `kv_NAME_image` over the image; in `kv_rerotation` a case begins with
the name of its scores.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dynllava_jax.config import Piece, Stage
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, Quantity
from dynllava_jax.convert.records.bases import Base, Record
from dynllava_jax.convert.records.decoded import Group, base_of, decoded
from dynllava_jax.convert.records.described import FLAG, GROUP, NUMBER, TEXT, WHOLE, Kind
from dynllava_jax.convert.records.runs import Answer, Own, Runner, compare_run, per_layer
from dynllava_jax.methods import COMPRESSORS, options_of
from dynllava_jax.methods.kv_scores import FORCED, IMAGE, PROMPT
from dynllava_jax.methods.kv_scores import Options as Shared

SCORE = KEY = 1e-5
NEEDED = ('scores', 'kept', 'position')
SCORES = sorted(name for name, piece in COMPRESSORS.items() if issubclass(piece.options, Shared))
REROTATION = 'kv_rerotation'
RECORDED = (*(f'kv_{name}{over}' for name in SCORES for over in ('', '_image')), REROTATION)
# Settings as kvpress calls them.
HYPER = {
  'window_size': 'window',
  'kernel_size': 'kernel',
  'n_future_positions': 'n_future',
  'lag_size': 'lag',
  'use_covariance': 'covariance',
  'use_vnorm': 'value_norm',
}


KINDS: dict[type, Kind] = {int: WHOLE, float: NUMBER, bool: FLAG, str: TEXT}


@dataclasses.dataclass(frozen=True)
class Case(Group):
  """The arrays of one prompt at one setting, `PROMPT/CASE/NAME`."""

  @property
  def at(self) -> str:
    return '/'.join(part for part in (self.base, self.prompt, self.config) if part) + '/'


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its cases. Prompts with the same settings are run together."""
  runs: dict[tuple[str, Piece], list[Case]] = {}
  for case in cases(record):
    if not only or case.config in only:
      runs.setdefault((case.base, piece(record, case)), []).append(case)
  bases: dict[str, Base] = {}
  needed = NEEDED if record.method.endswith('_image') else (*NEEDED, 'kept_count', 'cache_len')
  for (name, compressor), together in runs.items():
    base = bases[name] = bases.get(name) or base_of(record, name)
    runner = Runner(base.info.model, base.params, (Stage(compressor=compressor),))
    yield from compare_run(record, together, runner, base, own(compressor), alone, needed)


def cases(record: Record) -> list[Case]:
  """What was recorded, in the order of the record; ConversionError if there is nothing."""
  found = [Case(base, config, prompt) for base, prompt, config in decoded(record)]
  if not found:
    raise ConversionError(f'{record.at}: no group PROMPT/CASE/tokens; expected a record of {record.method}')
  return found


def piece(record: Record, case: Case) -> Piece:
  """The compressor of a case; ConversionError if the record does not say."""
  rerotated = record.method == REROTATION
  name = record.method.removeprefix('kv_')
  over = IMAGE if name.endswith('_image') else PROMPT
  name = name.removesuffix('_image')
  if rerotated:
    begins = [name for name in SCORES if case.config.startswith(name.removesuffix('_llm').removesuffix('_attention'))]
    if not begins:
      raise ConversionError(f'{record.at}: case {case.config!r}, expected it to begin with one of {", ".join(SCORES)}')
    name = max(begins, key=len)
  known = {field.name: field.type for field in dataclasses.fields(COMPRESSORS[name].options)}
  options = {'ratio': float(record.given(f'{case.at}ratio', ())), 'over': over, 'rerotate': rerotated}
  if 'cross_scoring' in known:
    options['cross_scoring'] = 'cross' in case.config
  for key, value in record.setting('hyper', kind=GROUP).items():
    if (option := HYPER.get(key, key)) in known:
      of_case = (case.config,) if isinstance(value, dict) else ()
      told = record.setting('hyper', key, *of_case, kind=KINDS[known[option]], default=None)
      options |= {} if told is None else {option: told}
  return Piece(name, options)


def own(compressor: Piece) -> Own:
  """The arrays of a compressor by name."""

  options = options_of(compressor, 'compressor')

  def partitions(length: int) -> int:
    """Of a prompt, those that LagKV scores."""
    return max((length - options.n_sink) // options.lag - 1, 0)

  def array(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
    seen = answer.traces[0].of_layers[0]
    keep = seen['keep'][..., : int(answer.traces[0].length)]
    if name in ('position', 'cache_len'):
      return per_layer(getattr(answer, name), recorded), EXACT
    if name == 'kept_count':
      return np.unique(keep.sum(-1), axis=1)[:, 0], EXACT
    if name == 'kept':
      return kept(keep), EXACT
    if name in ('k', 'v'):
      return getattr(answer, name)[0].swapaxes(1, 2), KEY
    if name == 'partition_scores' and name in seen:
      return seen[name][:, :, : partitions(int(answer.traces[0].length))], SCORE
    if name == 'scores':
      # Theirs are 0 and 1 by what stays.
      ours = keep if compressor.name == 'streaming_llm' else seen[name]
      if options.over == PROMPT:
        ours = ours[..., : keep.shape[-1]]
      return scores(ours, recorded), SCORE
    return None

  return array


def kept(keep: np.ndarray) -> np.ndarray:
  """bool[L, K, P] -> int[L, K, C], places ascending, -1 behind the fewer."""
  count = keep.sum(-1, keepdims=True)
  places = np.argsort(~keep, -1, kind='stable')[..., : count.max()]
  return np.where(np.arange(places.shape[-1]) < count, places, -1)


def scores(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
  """[L, K, M] as recorded: what stays in any case has some number there that is larger than all others."""
  if ours.shape != recorded.shape:  # `compare` says so
    return ours
  forced = ours >= FORCED
  highest = np.where(forced, -np.inf, recorded).max(-1, keepdims=True)
  return np.where(forced & (recorded > highest), recorded, ours)
