"""Recomputes what was recorded of RedundancyLens, whose layers differ from plain ones for the image rows of a prefill.

Per layer: what attention and MLP add to the stream, and the channels chosen; then the logits and tokens, decoded in plain layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import Piece, Stage
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.runs import Answer, Group, Runner, compare_run, compare_uncached, decoded_groups, with_bases
from dynllava_jax.methods import redundancylens

SCORE = 1e-5
ARRAYS = {  # NAME_LAYER of the record: our name, tolerance
  'attention_output': ('attention_output', LOGITS),
  'ffn_output': ('mlp_output', LOGITS),
  'channel_scores': ('channel_scores', SCORE),
  'channels': ('channels', EXACT),
}


def verify(record: Record, alone: bool = True, only: Sequence[str] = ()) -> Iterator[Quantity]:
  """Every quantity of the record; `only` some of its configs, `BASE/CONFIG`."""
  for base, groups in with_bases(record, decoded_groups(record).values(), only):
    given = record.setting('configs', groups[0].setting)
    options = settings(record, groups[0])
    num_image, channels = methods.num_image_tokens(base.info.model), base.info.model.llama.mlp_dim
    at = f'{groups[0].setting}: '
    probes = redundancylens.probe_places(num_image, options['probe_tokens'])
    yield compare(f'{at}probe_tokens', probes, given['probe_tokens'], EXACT)
    if 'channels' in given:
      yield compare(f'{at}channels', redundancylens.num_channels(channels, options['channel_ratio']), given['channels'], EXACT)
    runner = Runner(base.info.model, base.params, (Stage(layers=Piece('redundancylens', options)),))
    yield from compare_run(record, groups, runner, base, own, alone)
    if alone:
      yield from compare_uncached(record, groups, runner, base)


def settings(record: Record, group: Group) -> dict[str, Any]:
  """Our options of a config."""
  given = lambda name: record.setting('configs', group.setting, name)
  lists = {name: tuple(given(name)) for name in ('attention_layers', 'ffn_layers')}
  single = {name: given(name) for name in ('attention_range', 'channel_ratio')}
  return lists | single | {'probe_tokens': len(given('probe_tokens'))}


def own(name: str, recorded: np.ndarray, answer: Answer) -> tuple[Any, float] | None:
  """The arrays of a layer by name, and the stream behind the last one."""
  if name == 'last_hidden':
    return answer.hidden, LOGITS
  first, _, layer = name.rpartition('_')
  if first not in ARRAYS:
    return None
  ours, tolerance = ARRAYS[first]
  found = answer.traces[0].of_layers[ours][int(layer)]
  return found[: len(recorded)], tolerance
