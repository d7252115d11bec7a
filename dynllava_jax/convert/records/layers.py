"""Recomputes what was recorded of RedundancyLens, whose layers differ from plain ones for the image rows of a prefill.

Per layer: what attention and MLP add to the stream, and the channels chosen; then the logits and tokens, decoded in plain layers.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import Piece, Stage
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoded import Group, decoded_groups, with_bases
from dynllava_jax.convert.records.described import NUMBER, WHOLE, WHOLES
from dynllava_jax.convert.records.runs import Answer, Runner, compare_run, compare_uncached
from dynllava_jax.methods import redundancylens

SCORE = 1e-5
ARRAYS = {  # NAME_LAYER of the record: our name, tolerance
  'attention_output': ('attention_output', LOGITS),
  'ffn_output': ('mlp_output', LOGITS),
  'channel_scores': ('channel_scores', SCORE),
  'channels': ('channels', EXACT),
}


ROWS = ('attention_output', 'mlp_output')  # have an entry per row of the prompt


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its configs, `BASE/CONFIG`."""
  for base, groups in with_bases(record, decoded_groups(record).values(), only):
    told = functools.partial(record.setting, 'configs', groups[0].setting)
    options = settings(record, groups[0])
    num_image, channels = methods.num_image_tokens(base.info.model), base.info.model.llama.mlp_dim
    at = f'{groups[0].setting}: '
    probes = redundancylens.probe_places(num_image, options['probe_tokens'])
    yield compare(f'{at}probe_tokens', probes, told('probe_tokens', kind=WHOLES), EXACT)
    if (number := told('channels', kind=WHOLE, default=None)) is not None:
      yield compare(f'{at}channels', redundancylens.num_channels(channels, options['channel_ratio']), number, EXACT)
    runner = Runner(base.info.model, base.params, (Stage(layers=Piece('redundancylens', options)),))
    yield from compare_run(record, groups, runner, base, own, alone)
    if alone:
      yield from compare_uncached(record, groups, runner, base)


def settings(record: Record, group: Group) -> dict[str, Any]:
  """Our options of a config."""
  told = functools.partial(record.setting, 'configs', group.setting)
  lists = {name: told(name, kind=WHOLES) for name in ('attention_layers', 'ffn_layers')}
  single = {'attention_range': told('attention_range', kind=WHOLE), 'channel_ratio': told('channel_ratio', kind=NUMBER)}
  return lists | single | {'probe_tokens': len(told('probe_tokens', kind=WHOLES))}


def own(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
  """The arrays of a layer by name, and the stream behind the last one."""
  if name == 'last_hidden':
    return answer.hidden, LOGITS
  first, _, layer = name.rpartition('_')
  if first not in ARRAYS or not layer.isdecimal():
    return None
  ours, tolerance = ARRAYS[first]
  found = answer.traces[0].of_layers[0].get(ours, ())
  if int(layer) >= len(found):  # no such layer, or none that is told to differ so
    return None
  found = found[int(layer)]
  return found[: len(answer.hidden)] if ours in ROWS else found, tolerance
