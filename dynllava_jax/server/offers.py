"""What a server answers with: one checkpoint, run in one or several ways, each a model of its own name and an engine of its own."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dynllava_jax import api
from dynllava_jax.config import ConfigError
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.layout import Layout, Loaded, Rows
from dynllava_jax.serving import batch, growth
from dynllava_jax.serving.engine import Engine, Ticket
from dynllava_jax.serving.questions import SETTING
from dynllava_jax.serving.request import Options, Request

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

  def held_by(self, ticket: Ticket) -> int:
    """Slots of keys and values, over all layers, that a request takes up so far."""
    prompt = ticket.request.rows.prompt
    image = self.loaded.num_image if prompt.image_start[0] >= 0 else 0
    kept = tuple(ticket.kept)
    return sum(growth.slots(self.loaded, int(prompt.length[0]) - image, image, len(kept), sum(kept) - ticket.evicted))

  def room(self, sizes: Sizes) -> int:
    """Slots of keys and values, over all layers, that the longest request may take up."""
    new = sizes.max_new_tokens
    return sum(growth.slots(self.loaded, max(sizes.text_lengths), self.loaded.num_image, new, new))


def offers(path: str, name: str, stages: api.Stages, also: Sequence[str]) -> dict[str, Offer]:
  """The model `name`, run as `stages` says, and `name:WAY` for each of `also`; CheckpointError or ConfigError as `api.load`."""
  out = {}
  for label, way in [(name, stages), *((f'{name}:{way}', way) for way in also)]:
    if label in out:
      raise ConfigError(f'--also: {way} is there twice')
    out[label] = Offer(label, way, api.describe(path, way)[0])
  return out


def meshes(tensor: int) -> list[Mesh]:
  """This host's devices in groups of `tensor`; ConfigError if they do not divide."""
  devices = jax.local_devices()
  if len(devices) % tensor:
    raise ConfigError(f'--tensor: {tensor} does not divide the {len(devices)} devices of this host')
  return batch.meshes(devices, tensor)


def engines(made: Mapping[str, Offer], mesh: Mesh, dtype: str, sizes: Sizes) -> dict[str, Engine]:
  """An engine for each, on one group of devices; all that cut the decoder as the first one does share its weights."""
  first, *others = made.values()
  room = dict(max_new_tokens=sizes.max_new_tokens, batch_size=sizes.slots, text_lengths=sizes.text_lengths)
  model = api.load(first.loaded.path, stages=first.stages, dtype=dtype, mesh=mesh, **room)
  models = {first.name: model} | {offer.name: model.run_as(offer.stages) for offer in others}
  options = dict(text_length=max(sizes.text_lengths), slots=sizes.slots, steps=sizes.steps, limit=sizes.queue)
  return {name: Engine(model.generator, made[name].loaded.tokenizer, **options) for name, model in models.items()}


def warm(offer: Offer, engine: Engine, sizes: Sizes) -> None:
  """Compiles every program that requests can need, before anybody asks."""
  for length in sizes.text_lengths:
    rows = offer.rows(Question('first', (PROBE,), PROBE, np.zeros((8, 8, 3), np.uint8)), 0, sizes)
    text = rows.prompt.tokens.shape[1] - offer.loaded.num_image
    if length < text:
      continue
    pad = ((0, 0), (0, length - text))
    prompt = dataclasses.replace(rows.prompt, tokens=np.pad(rows.prompt.tokens, pad))
    size = 1
    while size <= min(sizes.slots, engine.prefill_rows):
      alone = Request('warm', dataclasses.replace(rows, prompt=prompt), Options(max_tokens=1 + sizes.steps))
      engine.run([engine.submit(alone) for _ in range(size)])
      size *= 4
