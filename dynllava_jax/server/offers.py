"""What a server answers with: one checkpoint, run in one or several ways, each a model of its own name and an engine of its own."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynllava_jax import api, costs
from dynllava_jax.config import ConfigError
from dynllava_jax.controller import rungs
from dynllava_jax.controller.ladder import Ladder, Need
from dynllava_jax.controller.rules import DECODE, Rules
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.layout import Layout, Loaded, Rows
from dynllava_jax.serving import batch
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.pools import Pools
from dynllava_jax.serving.questions import SETTING
from dynllava_jax.serving.request import Request

PROBE = 'a'  # a question of which only the length counts


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What engines have room for, see `Engine` and `api.load`."""

  slots: int = 8
  steps: int = 8
  max_new_tokens: int = 256
  text_lengths: tuple[int, ...] = api.TEXT_LENGTHS
  queue: int = 256


@dataclasses.dataclass(frozen=True)
class Offer:
  """One way to run the checkpoint. `name`: of the model, as clients ask for it; `stages`: as in `api.load`."""

  name: str
  stages: api.Stages
  loaded: Loaded

  def rows(self, question: Question, seed: int, sizes: Sizes) -> Rows:
    """A question laid out, a batch of one; DataError if it cannot be asked."""
    return Layout(self.loaded, [question], sizes.text_lengths, 0, SETTING).rows([0]).seeded(seed)


def offers(path: str, name: str, stages: api.Stages, also: Sequence[str], quantization: str | None = None) -> dict[str, Offer]:
  """The model `name`, run as `stages` says, and `name:WAY` for each of `also`; CheckpointError or ConfigError as `api.load`."""
  out = {}
  for label, way in [(name, stages), *((f'{name}:{way}', way) for way in also)]:
    if label in out:
      raise ConfigError(f'--also: {way} is there twice')
    out[label] = Offer(label, way, api.describe(path, way, quantization)[0])
  return out


def meshes(tensor: int) -> list[Mesh]:
  """This host's devices in groups of `tensor`; ConfigError if they do not divide."""
  devices = jax.local_devices()
  if len(devices) % tensor:
    raise ConfigError(f'--tensor: {tensor} does not divide the {len(devices)} devices of this host')
  return batch.meshes(devices, tensor)


def engines(made: Mapping[str, Offer], mesh: Mesh, dtype: str, sizes: Sizes, room: int | None = None) -> dict[str, Engine]:
  """An engine for each, on one group of devices; all that cut the decoder as the first one does share its weights.

  Args:
    made: what is offered; mesh: the devices; dtype: of the computation; sizes: what the engines have room for.
    room: with it the first one is run by a controller, which has so many bytes for keys and values; 0 is as many as the slots
      take up dense.

  Raises:
    ConfigError: the controller has no room for a request, or a run does not fit the model.
  """
  first, *others = made.values()
  limits = dict(max_new_tokens=sizes.max_new_tokens, batch_size=sizes.slots, text_lengths=sizes.text_lengths)
  limits |= dict(quantization=first.loaded.quantization)
  model = api.load(first.loaded.path, stages=first.stages, dtype=dtype, mesh=mesh, **limits)
  models = {first.name: model} | {offer.name: model.run_as(offer.stages) for offer in others}
  runs = {name: model.generator for name, model in models.items()}
  if room is not None:
    runs[first.name] = on_ladder(model, dtype, sizes, room)
  options = dict(text_length=max(sizes.text_lengths), slots=sizes.slots, steps=sizes.steps, limit=sizes.queue)
  return {name: Engine(run, made[name].loaded.tokenizer, **options) for name, run in runs.items()}


def on_ladder(model: api.Model, dtype: str, sizes: Sizes, room: int) -> Pools:
  """The checkpoint on the rungs that the controller's rules give it; see `engines`."""
  loaded, text = model.loaded, max(sizes.text_lengths)
  lists = rungs.by_rules(loaded.info.stages, loaded.model, Rules(), DECODE)
  width = costs.number_bytes(loaded.model, jnp.dtype(dtype).itemsize, loaded.int8_cache)
  ladder = Ladder(rungs.rungs(loaded.model, lists, width, loaded.reducer))
  room = room or sizes.slots * ladder.rungs[0].bytes(Need(text, sizes.max_new_tokens))
  return Pools.on(ladder, {rung.name: model.run_as(rung.stages).generator for rung in ladder.rungs}, room, text)


def warm(offer: Offer, engine: Engine, sizes: Sizes) -> None:
  """Compiles every program that requests can need, before anybody asks."""
  rows = offer.rows(Question('first', (PROBE,), PROBE, np.zeros((8, 8, 3), np.uint8)), 0, sizes)
  text = rows.prompt.tokens.shape[1] - offer.loaded.num_image
  requests = []
  for length in sizes.text_lengths:
    if length >= text:
      tokens = np.pad(rows.prompt.tokens, ((0, 0), (0, length - text)))
      requests.append(Request('first', dataclasses.replace(rows, prompt=dataclasses.replace(rows.prompt, tokens=tokens))))
  engine.warm(requests)
