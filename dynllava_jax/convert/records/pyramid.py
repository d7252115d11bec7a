"""Recomputes what was recorded of a Dynamic Pyramid Network: routes, probabilities, lengths and positions, logits, tokens.

The record brings a decoder of its own and image tokens, no tower. Rows are run by the program of their route, alone and together
with a text-only row and a longer one, which may take another.
"""

import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import ConfigError, ModelConfig, PyramidConfig, VisionConfig
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, load_case, token_ids
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.decoded import Asked
from dynllava_jax.convert.records.decoder import llama_of, params_of
from dynllava_jax.convert.records.described import NUMBER, WHOLE, WHOLES, every
from dynllava_jax.convert.records.pyramid_training import verify_training
from dynllava_jax.convert.records.runs import Answer, Runner, neighbours
from dynllava_jax.convert.records.training import output
from dynllava_jax.methods import dpn

METHOD = 'Dynamic Pyramid Network (arXiv 2503.20322)'
PATCH = 14  # of the tower that is not there
PROBABILITY = 1e-5
PROMPT = re.compile(r'(infer(\d+)/)prompt_ids')
LISTS = every(WHOLES, 'a list of lists of whole numbers')
SKIPPED = -1  # a layer in front of which nothing is pooled


class Routed:
  """A recorded model, with a program for each route that occurs."""

  def __init__(self, record: Record):
    self.model = model_of(record)
    self.cfg = self.model.dpn
    self.params = params_of(record, self.model, ('llama', 'dpn'), load_case(record.folder / 'weights.npz'))
    self._runners: dict[tuple[int, ...], Runner] = {}

  def runner(self, route: tuple[int, ...]) -> Runner:
    """The model run by a route."""
    if route not in self._runners:
      stages = dpn.route_stages(self.cfg, self.model.num_image_tokens, route)
      self._runners[route] = Runner(self.model, self.params, stages)
    return self._runners[route]

  def routes(self, asked: Sequence[Asked], steps: int, text: int) -> list[tuple[int, ...]]:
    """Of each prompt; `steps` and `text` as in `Runner.answer`."""

    def probe(route: tuple[int, ...], rows: list[int]) -> list[np.ndarray]:
      runner = self.runner(route)
      prompt, image = runner.lay_out([asked[row] for row in rows], text)
      _, _, traces, _ = runner._prefill(prompt, image, CacheSpec(max_new_tokens=steps), None)
      return [np.asarray(trace.of_selector['routes']) if trace.of_selector else None for trace in traces[1:]]

    return dpn.routes_of(self.cfg, self.model.num_image_tokens, [a.image is not None for a in asked], probe)

  def answers(self, asked: Sequence[Asked], steps: int, text: int) -> list[tuple[tuple[int, ...], Answer]]:
    """The route and the answer of each prompt; those of one route are run together."""
    routes = self.routes(asked, steps, text)
    found: dict[int, Answer] = {}
    for route in sorted(set(routes)):
      mine = [row for row in range(len(asked)) if routes[row] == route]
      found |= dict(zip(mine, self.runner(route).answer([asked[row] for row in mine], steps, text)))
    return [(route, found[row]) for row, route in enumerate(routes)]


def model_of(record: Record) -> ModelConfig:
  """What `config` of the record describes; ConversionError if it is no model."""
  whole, number = (functools.partial(record.setting, 'config', kind=kind) for kind in (WHOLE, NUMBER))
  lists = functools.partial(record.setting, 'config', kind=WHOLES)
  try:
    llama = llama_of(record, 'config')
    pyramid = PyramidConfig(
      layers=tuple(layer + 1 for layer in lists('pool_after_layers')),
      kernels=tuple(tuple(kernels) for kernels in record.setting('config', 'experts', kind=LISTS)),
      router_id=whole('router_id'),
      temperature=float(number('router_temperature')),
    )
    size = dict(hidden_size=4, mlp_dim=4, num_layers=1, num_heads=1, select_layer=-1)
    vision = VisionConfig(image_size=lists('grid')[0] * PATCH, patch_size=PATCH, **size)
    return ModelConfig(vision=vision, llama=llama, dpn=pyramid)
  except (ConfigError, TypeError, ValueError) as e:
    raise ConversionError(f'{record.folder}/meta.json: config: {e}') from None


def verify(record: Record, alone: bool = True) -> Iterator[Quantity]:
  """Every quantity of the record."""
  found = {named[1]: int(named[2]) for key in record.case if (named := PROMPT.fullmatch(key))}
  if not found:
    raise ConversionError(f'{record.folder}/case.npz: no array inferN/prompt_ids; expected a record of {record.method}')
  routed = Routed(record)
  llama, num_image = routed.model.llama, routed.model.num_image_tokens
  images = record.given('image_features', (None, num_image, llama.hidden_size))
  prompts = []
  for at, row in found.items():
    if row >= len(images):
      raise ConversionError(f'{record.at}: {at}prompt_ids needs image {row}, and image_features has {len(images)}')
    prompts.append(Asked(token_ids(record.at, record.case, f'{at}prompt_ids', llama.vocab_size), images[row]))
  everyone = [*prompts, *neighbours(prompts)]
  text = max(asked.text_tokens for asked in everyone)
  steps = max(record.steps(f'{at}tokens') for at in found)
  together = routed.answers(everyone, steps, text)
  for row, at in enumerate(found):
    if alone:
      yield from compare_prompt(record, routed, at, '', *routed.answers([prompts[row]], steps, text)[0])
    yield from compare_prompt(record, routed, at, 'in a batch: ', *together[row])
  yield from verify_training(record, routed.model, routed.params, alone)


def compare_prompt(
  record: Record, routed: Routed, at: str, where: str, route: tuple[int, ...], answer: Answer
) -> Iterator[Quantity]:
  """The arrays of one prompt below `at`."""
  layers, stages = routed.model.llama.num_layers, routed.runner(route).model.stages
  chosen = [kernels.index(kernel) if kernel else SKIPPED for kernels, kernel in zip(routed.cfg.kernels, route)]
  yield compare(f'{where}{at}route', chosen, record.array(f'{at}route'), EXACT)
  probabilities = {stage.start: trace.of_selector['routes'] for stage, trace in zip(stages[1:], answer.traces[1:])}
  for depth, recorded in enumerate(record.array(f'{at}probs')[: len(route)]):
    ours = probabilities.get(routed.cfg.layers[depth])
    real = recorded[~np.isnan(recorded)]
    yield compare(f'{where}{at}probs[{depth}]', real[:0] if ours is None else ours, real, PROBABILITY)
  starts = [stage.start for stage in stages]
  lengths = [int(trace.length) for trace in answer.traces]
  of_layer = [lengths[sum(start <= layer for start in starts) - 1] for layer in range(layers)]
  yield compare(f'{where}{at}layer_len', of_layer, record.array(f'{at}layer_len'), EXACT)
  yield compare(f'{where}{at}final_len', lengths[-1], record.array(f'{at}final_len'), EXACT)
  shown = len(output(record.at, record.case, f'{at}logits'))
  yield compare(f'{where}{at}logits', answer.prefill_logits[-shown:], record.array(f'{at}logits'), LOGITS)
  steps = record.steps(f'{at}tokens')
  yield compare(f'{where}{at}tokens', answer.tokens[:steps], record.array(f'{at}tokens'), EXACT)
  yield compare(f'{where}{at}step_logits', answer.logits[:steps], record.array(f'{at}step_logits'), LOGITS)
  yield compare(f'{where}{at}position', answer.position[: steps - 1], record.array(f'{at}position'), EXACT)
