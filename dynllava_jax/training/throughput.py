"""How fast a run is: tokens, the share of what its chips could do, and where the time goes."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from dynllava_jax import methods
from dynllava_jax.config import TrainConfig
from dynllava_jax.costs import layer_flops, predictor_flops, vision_flops
from dynllava_jax.data.batches import Batch

# bfloat16 matrix products without sparsity, FLOP/s per device, by how `device_kind` begins; the makers' data sheets.
PEAK_FLOPS = {
  'TPU v3': 61.5e12,  # a device is one of a chip's two cores
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA L4': 121e12,
  'NVIDIA GeForce RTX 3090': 71e12,
  'NVIDIA GeForce RTX 4090': 165e12,
}
COMPILED = '/jax/core/compile/backend_compile_duration'
FORWARD, WITH_INPUT_GRADIENTS, WITH_ALL_GRADIENTS = 1, 2, 3


def peak_flops(kind: str) -> float | None:
  """FLOP/s of a device; None if it is not in the table, as CPUs are not."""
  known = [k for k in PEAK_FLOPS if kind.startswith(k)]
  return PEAK_FLOPS[max(known, key=len)] if known else None


def model_flops(cfg: TrainConfig, lengths: np.ndarray, images: int) -> float:
  """FLOPs that a step over these rows needs: real positions, each product once, nothing that is computed again.

  Args:
    cfg: the run; what is frozen needs no gradient of its weights.
    lengths: int[B], real positions of each row.
    images: rows with an image.
  """
  model = cfg.model
  positions, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
  decoder = sum(layer_flops(model, positions, pairs, experts=model.llama.has_experts(i)) for i in range(model.llama.num_layers))
  head = 2 * model.llama.hidden_size * model.llama.vocab_size * positions
  total = (decoder + head) * (WITH_INPUT_GRADIENTS if 'llama' in cfg.held else WITH_ALL_GRADIENTS)
  total += images * vision_flops(model) * (FORWARD if 'vision' in cfg.held else WITH_ALL_GRADIENTS)
  if methods.trained_by(cfg.stages) == 'masks':
    total += WITH_ALL_GRADIENTS * predictor_flops(model, images * model.vision.num_patches, positions)
  return total


class Clock:
  """Counts since the last report. What is neither waiting for data nor saving nor an evaluation is the step."""

  def __init__(self, cfg: TrainConfig, hosts: int):
    """`hosts`: how many batches like those of this process make up the step's."""
    self._cfg, self._hosts = cfg, hosts
    self._peak = peak_flops(jax.devices()[0].device_kind)
    self.restart()

  def restart(self) -> None:
    """Forgets what was counted."""
    self._since, self._spent = time.monotonic(), dict.fromkeys(('data', 'save', 'evaluate'), 0.0)
    self._steps, self._tokens, self._flops = 0, 0, 0.0

  @contextlib.contextmanager
  def spent_on(self, part: str) -> Iterator[None]:
    """Inside is time for 'data', 'save' or 'evaluate'."""
    start = time.monotonic()
    yield
    self._spent[part] += time.monotonic() - start

  def saw(self, batch: Batch) -> None:
    """One more step, with this batch."""
    self._steps += 1
    self._tokens += int(batch.length.sum()) * self._hosts
    if self._peak:
      self._flops += model_flops(self._cfg, batch.length, int((batch.image_start >= 0).sum())) * self._hosts

  def report(self) -> dict[str, float]:
    """Rates and seconds per step since the last report, which ends with a step whose results are there; nothing without a step."""
    if not self._steps:
      return {}
    seconds, chips = time.monotonic() - self._since, jax.device_count()
    values = {f'{part}_seconds': spent / self._steps for part, spent in self._spent.items()}
    values['step_seconds'] = seconds / self._steps - sum(values.values())
    seconds -= self._spent['evaluate']  # rates are those of training
    values['tokens_per_second'] = self._tokens / seconds
    values['tokens_per_second_per_chip'] = self._tokens / seconds / chips
    if self._peak:
      values['mfu'] = self._flops / seconds / chips / self._peak
    self.restart()
    return values


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Inside, the list grows by one for every program that jax compiles: a run that goes on compiling has shapes that vary."""
  seen = []

  def note(event: str, *_, **__) -> None:
    if event == COMPILED:
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
