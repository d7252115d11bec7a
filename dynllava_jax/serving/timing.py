"""Times and memory of one way to run a model of random weights: prefill, decoding with and without a cache, end to end, the engine.

Programs are compiled apart, and their times kept apart; what a call needs at most in memory is what the compiler says of it.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import costs, methods, sharding
from dynllava_jax.arrangement import best
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import QUANTIZATIONS, BenchConfig, EvalRun, ModelConfig
from dynllava_jax.controller.hardware import BANDWIDTH, Limits
from dynllava_jax.evals.layout import Rows
from dynllava_jax.generate import Generator
from dynllava_jax.models.dynllava import Prompt
from dynllava_jax.models.matrices import SCALES, smaller
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Request
from dynllava_jax.training.throughput import peak_flops

PARTS = ('prefill', 'decode', 'uncached', 'end to end', 'engine')


def limits(dtype: Any) -> Limits:
  """Those of the first device: the data sheet's, or of a device that has none here, such as a CPU, measured."""
  kind = jax.devices()[0].device_kind
  known = [k for k in BANDWIDTH if kind.startswith(k)]
  if peak_flops(kind) and known:
    return Limits(peak_flops(kind), BANDWIDTH[max(known, key=len)], 'data sheet')
  size, long = 1024, 2**25
  square, line = jnp.ones((size, size), dtype), jnp.ones(long, jnp.float32)
  multiply, read = jax.jit(lambda x: x @ x), jax.jit(lambda x: x.sum())
  best = lambda f, x: min(timed(lambda: f(x)) for _ in range(6))
  return Limits(
    2 * size**3 / best(multiply, square), 4 * long / best(read, line), 'measured: a product of 1,024 squared, a sum of 128 MiB'
  )


def timed(call: Callable[[], Any]) -> float:
  """Seconds until what it returns is there."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def random_params(model: ModelConfig, run: EvalRun, dtype: Any, seed: int) -> dict[str, Any]:
  """Parameters cut for a run: normal, of deviation 0.02, norms one; int8 ones evenly drawn, with scales that give as much.

  Runs share the arrays that have the same place and shape.
  """
  whole = sharding.unboxed(abstract_params(model, methods.needs_tail(model, run.reducer)))
  if 'weights' in QUANTIZATIONS[run.quantization]:
    whole |= jax.eval_shape(lambda llama: dict(zip(('llama', SCALES), smaller(llama))), whole['llama'])
  shapes = jax.eval_shape(lambda p: cut_params(p, run.stages, best(jax.local_devices()[:1])), whole)
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

  def made(number: int, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if path[0].key == SCALES:
      return jnp.full(leaf.shape, 0.02 / (127 / 3**0.5), jnp.float32)
    if path[-1].key == 'scale':
      return jnp.ones(leaf.shape, dtype)
    return drawn(seed, number, leaf.shape, leaf.dtype if leaf.dtype == jnp.int8 else jnp.dtype(dtype))

  return jax.tree.unflatten(tree, [made(number, *leaf) for number, leaf in enumerate(leaves)])


@functools.cache  # dozens of runs of one model would not fit into memory, each with weights of its own
def drawn(seed: int, number: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """The weights at one place."""
  whole = lambda key: jax.random.randint(key, shape, -127, 128, dtype)
  parts = lambda key: (0.02 * jax.random.normal(key, shape)).astype(dtype)  # never whole in float32
  return jax.jit(whole if dtype == jnp.int8 else parts)(jax.random.fold_in(jax.random.key(seed), number))


class NoText:
  """A tokenizer for tokens that mean nothing."""

  def decode(self, ids: Any) -> str:
    """Nothing."""
    del ids
    return ''


class Contender:
  """One run of a benchmark, its weights made; `batch` gets its programs for a batch size ready."""

  def __init__(self, cfg: BenchConfig, run: EvalRun):
    self.cfg, self.run = cfg, run
    params = random_params(cfg.model, run, jnp.dtype(cfg.dtype), cfg.seed)
    options = dict(eos_id=None, dtype=jnp.dtype(cfg.dtype), reducer=run.reducer, int8_cache=self.int8_cache)
    make = lambda new: Generator(cfg.model, run.stages, params, max_new_tokens=new, **options)
    self.generator = make(cfg.new)
    self.uncached = make(cfg.uncached_new) if cfg.uncached_new and not any(s.compressor for s in run.stages) else None
    self.num_image = methods.num_image_tokens(cfg.model, run.reducer)
    self.parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))

  @property
  def int8_cache(self) -> bool:
    """Whether keys and values are held as int8."""
    return 'cache' in QUANTIZATIONS[self.run.quantization]

  def batch(self, rows: int) -> 'Batch':
    """All parts for so many rows, compiled and run once."""
    return Batch(self, rows)

  def ideal(self, part: str, rows: int, kept: float, limit: Limits) -> float:
    """The least seconds that a part can take here, for what its static shapes compute and read."""
    cfg, reducer = self.cfg, self.run.reducer
    spec = CacheSpec(max_new_tokens=cfg.new)
    flops = lambda text, fed=(): costs.sample_flops(cfg.model, self.run.stages, text, fed, spec, reducer=reducer)
    prefill = flops(cfg.text)
    if part == 'prefill':
      return limit.seconds(rows * prefill, self.parameter_bytes)
    if part == 'uncached':
      tower = costs.vision_flops(cfg.model, reducer)
      again = limit.seconds(rows * (flops(cfg.text + cfg.uncached_new) - tower), self.parameter_bytes)
      return cfg.uncached_new * again + limit.seconds(rows * tower, 0)
    steps = cfg.new - 1
    step = (flops(cfg.text, [i < kept * steps for i in range(steps)]) - prefill) / steps
    decode = steps * limit.seconds(rows * step, self.step_bytes(rows))
    return decode if part == 'decode' else decode + limit.seconds(rows * prefill, self.parameter_bytes)

  def step_bytes(self, rows: int) -> int:
    """Bytes that a decoding step reads: the decoder's weights, and every slot of the cache."""
    cfg, spec = self.cfg, CacheSpec(max_new_tokens=self.cfg.new)
    width = costs.number_bytes(cfg.model, jnp.dtype(cfg.dtype).itemsize, self.int8_cache)
    return self.decoder_bytes + rows * sum(costs.cache_bytes(cfg.model, self.run.stages, cfg.text, spec, width, self.run.reducer))

  def weights_share(self, rows: int) -> float:
    """The weights' part of what a decoding step reads."""
    return self.decoder_bytes / self.step_bytes(rows)

  @property
  def decoder_bytes(self) -> int:
    """Of the weights that a decoding step reads: layers, norms and head."""
    llama = self.generator.params['llama']
    read = [tree for name, tree in llama.items() if name not in ('embedding', 'head')] + [llama.get('head', llama['embedding'])]
    read.append(self.generator.params.get(SCALES, {}))
    return sum(x.nbytes for x in jax.tree.leaves(read))


class Batch:
  """A contender's programs for one batch size. `compiled_in`: seconds, `memory`: bytes at most, by part."""

  def __init__(self, contender: Contender, rows: int):
    cfg, generator = contender.cfg, contender.generator
    self.contender, self.rows = contender, rows
    rng = np.random.default_rng(cfg.seed)
    size = cfg.model.vision.image_size
    tokens = rng.integers(3, cfg.model.llama.vocab_size, (rows, cfg.text + contender.num_image)).astype(np.int32)
    full = lambda value, dtype=np.int32: np.full(rows, value, dtype)
    start = min(35, cfg.text - 1)
    prompt = Prompt(tokens, full(tokens.shape[1]), full(start), full(0, np.uint32), full(start + contender.num_image))
    pixels = rng.integers(0, 256, (rows, size, size, 3), np.uint8)
    self._requests = [self._alone(prompt, pixels, i) for i in range(rows)]
    self._inputs = jax.device_put((prompt, pixels))
    lowered = {part: generator.lowered(part, *self._inputs) for part in ('prefill', 'decode')}
    if contender.uncached:
      lowered['uncached'] = contender.uncached.lowered('uncached', *self._inputs)
    self.compiled_in, self.memory, self._programs = {}, {}, {}
    for part, program in lowered.items():
      begun = time.perf_counter()
      self._programs[part] = program.compile()
      self.compiled_in[part] = time.perf_counter() - begun
      found = self._programs[part].memory_analysis()
      if found is not None:
        sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
        self.memory[part] = sizes
    turn, _ = self._prefill()
    self.kv_bytes = sum(x.nbytes for s in turn.cache.stages for x in jax.tree.leaves(s.arrays))
    answers = self._decode(turn)
    self.kept = float(np.asarray(answers[0].kept)[:, :-1].mean())
    self._engine = None
    if cfg.engine:
      self._engine = Engine(generator, NoText(), text_length=cfg.text, slots=rows, steps=16)
      self.once()

  def once(self) -> dict[str, float]:
    """Seconds of every part, each of them run once."""
    seconds = {'prefill': timed(self._prefill)}
    turn, _ = jax.block_until_ready(self._prefill())
    seconds['decode'] = timed(lambda: self._decode(turn)[0].tokens)
    if 'uncached' in self._programs:
      seconds['uncached'] = timed(lambda: self._programs['uncached'](self.contender.uncached.params, *self._inputs))
    seconds['end to end'] = timed(lambda: self._decode(self._prefill()[0])[0].tokens)
    if self._engine:
      seconds['engine'] = timed(self._through_engine)
    return seconds

  def tokens(self, part: str) -> int:
    """How many a part generates for all rows."""
    cfg = self.contender.cfg
    each = {'prefill': 0, 'decode': cfg.new - 1, 'uncached': cfg.uncached_new}
    return self.rows * each.get(part, cfg.new)

  def _prefill(self):
    return self._programs['prefill'](self.contender.generator.params, *self._inputs)

  def _decode(self, turn):
    prompt, _ = self._inputs
    params = self.contender.generator.params
    return self._programs['decode'](params, turn.logits, cache=turn.cache, seed=prompt.seed, kept_image=())

  def _through_engine(self) -> list:
    tickets = [self._engine.submit(request) for request in self._requests]
    self._engine.run(tickets)
    return []

  def _alone(self, prompt: Prompt, pixels: np.ndarray, i: int) -> Request:
    one = lambda x: x[i : i + 1]
    rows = Rows(jax.tree.map(one, prompt), one(pixels), np.zeros((1, 0, 0), np.int32), np.zeros((1, 0), np.int32))
    return Request(f'row {i}', rows)
