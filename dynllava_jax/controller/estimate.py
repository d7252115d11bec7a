"""What one way to run a model costs on given hardware, by arithmetic: memory, latency, tokens/s, energy, FLOPs."""

import dataclasses
import functools

from dynllava_jax import costs, methods, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, ModelConfig, Piece, Stage
from dynllava_jax.controller.hardware import Hardware
from dynllava_jax.models.params import abstract_params, count_parameters

CACHED, UNCACHED = 'cached', 'uncached'
# Temporaries of a prefill, numbers per position and unit of width: what the TPU compiler allots to 7B (benchmarks/tpu_fit.py).
TEMPORARIES = 73


@dataclasses.dataclass(frozen=True)
class Work:
  """What is asked: `text` tokens of a prompt besides the image's, `new` tokens of an answer."""

  text: int
  new: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to run a model. `image`, `text`: shares that are kept; `stages` follow from them."""

  image: float
  text: float
  batch: int
  mode: str
  stages: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Bytes of a device, seconds of an answer and of its prefill, joules of an answer, share of dense's FLOPs."""

  memory: float
  latency: float
  prefill: float
  tokens_per_second: float
  energy: float
  flops: float


class Costs:
  """A model on hardware, at one kind of work."""

  def __init__(self, model: ModelConfig, hardware: Hardware, work: Work, width: int, reducer: Piece | None = None):
    """`width`: bytes of a number, of weights and cache."""
    self.model, self.hardware, self.work, self.width, self.reducer = model, hardware, work, width, reducer
    shapes = sharding.unboxed(abstract_params(model))
    self.weights = count_parameters(shapes) * width
    llama = shapes['llama']
    self.decoder = (count_parameters(llama) - (0 if model.llama.tie_embeddings else count_parameters(llama['embedding']))) * width
    self._dense = self.flops_of(DENSE, 1.0, CACHED)

  def prefill_seconds(self, stages: tuple[Stage, ...], rows: int) -> float:
    """Of so many prompts together."""
    flops, _ = self.flops_of(stages, 1.0, CACHED)
    return self.hardware.seconds('prefill', rows * flops, self.weights)

  def step_seconds(self, setting: Setting) -> float:
    """Of one token for every request of the batch, answers half written."""
    _, step = self.flops_of(setting.stages, setting.text, setting.mode)
    if setting.mode == UNCACHED:
      return self.hardware.seconds('uncached', setting.batch * step, self.decoder)
    return self.hardware.seconds('decode', setting.batch * step, self.decoder + setting.batch * self.kv_bytes(setting.stages))

  def kv_bytes(self, stages: tuple[Stage, ...]) -> int:
    """Of one request."""
    spec = CacheSpec(max_new_tokens=self.work.new)
    return sum(costs.cache_bytes(self.model, stages, self.work.text, spec, self.width, self.reducer))

  def of(self, setting: Setting) -> Estimate:
    """All of a setting."""
    prefill, step = self.prefill_seconds(setting.stages, setting.batch), self.step_seconds(setting)
    latency = prefill + (self.work.new - 1) * step
    cached = setting.mode == CACHED
    positions = self.work.text + methods.num_image_tokens(self.model, self.reducer) + (0 if cached else self.work.new)
    temporaries = TEMPORARIES * positions * self.model.llama.hidden_size * self.width * (1 if cached else setting.batch)
    held = self.weights + temporaries + (setting.batch * self.kv_bytes(setting.stages) if cached else 0)
    first, later = self.flops_of(setting.stages, setting.text, setting.mode)
    dense_first, dense_later = self._dense if cached else self.flops_of(DENSE, 1.0, UNCACHED)
    total = lambda first, later: first + (self.work.new - 1) * later
    return Estimate(
      memory=held / self.hardware.chips,
      latency=latency,
      prefill=prefill,
      tokens_per_second=setting.batch * self.work.new / latency,
      energy=self.hardware.watts * self.hardware.chips * latency / setting.batch,
      flops=total(first, later) / total(dense_first, dense_later),
    )

  @functools.lru_cache(maxsize=4096)  # noqa: B019 - lives as long as a search
  def flops_of(self, stages: tuple[Stage, ...], text: float, mode: str) -> tuple[float, float]:
    """Of a prompt, and on average of a token after the first, for one request whose gate keeps what there is room for."""
    spec, steps = CacheSpec(max_new_tokens=self.work.new), self.work.new - 1
    flops = lambda tokens, kept=(): costs.sample_flops(self.model, stages, tokens, kept, spec, reducer=self.reducer)
    prefill = flops(self.work.text)
    if mode == UNCACHED:
      return prefill, flops(self.work.text + round(text * self.work.new / 2)) - costs.vision_flops(self.model, self.reducer)
    kept = [int((i + 1) * text) > int(i * text) for i in range(steps)]
    return prefill, (flops(self.work.text, kept) - prefill) / steps
