"""Which settings make a run fit: a search over mesh, `accumulate` and `remat`, by arithmetic."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from dynllava_jax.config import ConfigError, MeshConfig, TrainConfig
from dynllava_jax.sharding import mesh_sizes
from dynllava_jax.training import footprint

MARGIN = 0.9  # of a device's memory; what is reckoned is right to a tenth
MOST_TENSOR = 8  # ways; beyond, a layer's parts are too small to be worth their exchange
MOST_DEVICES = 2**14


@dataclasses.dataclass(frozen=True)
class Fit:
  """Settings that fit: the run with them, and the bytes that each device then holds."""

  cfg: TrainConfig
  sizes: dict[str, int]
  footprint: footprint.Footprint

  def overrides(self, cfg: TrainConfig) -> list[str]:
    """The flags that make `cfg` this one."""
    values = {f'mesh.{axis}': (getattr(cfg.mesh, axis), size) for axis, size in self.sizes.items()}
    values |= {name: (getattr(cfg, name), getattr(self.cfg, name)) for name in ('accumulate', 'remat')}
    # An axis that is -1 stays so if it comes to the same.
    came = mesh_sizes(cfg.mesh, math.prod(self.sizes.values())) if _valid(cfg.mesh, self.sizes) else {}
    return [f'--config.{k}={new}' for k, (old, new) in values.items() if old != new and came.get(k.removeprefix('mesh.')) != new]


def _valid(mesh: MeshConfig, sizes: dict[str, int]) -> bool:
  try:
    return mesh_sizes(mesh, math.prod(sizes.values())) == sizes
  except ConfigError:
    return False


def search(cfg: TrainConfig, devices: int, memory: float) -> Fit | None:
  """The settings that fit with the least exchange and the least that is computed again; None if none of those tried do."""
  lies = {}
  for changed, sizes in sorted(candidates(cfg, devices), key=lambda c: _cost(*c)):
    mesh = tuple(sizes.values())
    lies[mesh] = lies.get(mesh) or footprint.stored(changed, sizes)
    found = footprint.of_run(changed, sizes, lies=lies[mesh])
    if found.total <= MARGIN * memory:
      return Fit(changed, sizes, found)
  return None


def fewest_devices(cfg: TrainConfig, devices: int, memory: float) -> tuple[int, Fit] | None:
  """The first doubling of `devices` on which something fits."""
  while (devices := 2 * devices) <= MOST_DEVICES:
    if found := search(cfg, devices, memory):
      return devices, found
  return None


def candidates(cfg: TrainConfig, devices: int) -> Iterator[tuple[TrainConfig, dict[str, int]]]:
  """Runs of the same update on so many devices, and their meshes."""
  llama = cfg.model.llama
  for tensor in (t for t in divisors(devices) if t <= MOST_TENSOR and llama.num_kv_heads % t == llama.num_heads % t == 0):
    for fsdp in divisors(devices // tensor):
      data = devices // tensor // fsdp
      rows, left = divmod(cfg.batch_size, data * fsdp)
      if left or data % cfg.mesh.slices:
        continue
      mesh = dataclasses.replace(cfg.mesh, data=data, fsdp=fsdp, tensor=tensor)
      remats = dict.fromkeys((cfg.remat, 'block'))
      for accumulate, remat in itertools.product((a for a in divisors(rows) if a >= min(cfg.accumulate, rows)), remats):
        yield dataclasses.replace(cfg, mesh=mesh, accumulate=accumulate, remat=remat), dict(data=data, fsdp=fsdp, tensor=tensor)


def divisors(number: int) -> list[int]:
  """Ascending."""
  return [n for n in range(1, number + 1) if number % n == 0]


def _cost(cfg: TrainConfig, sizes: dict[str, int]) -> tuple[float, ...]:
  """Roughly, in shares of a step: parts of layers are exchanged at every product, weights once per micro-batch."""
  again = {'none': 0.0, 'dots': 0.05, 'offload': 0.15, 'block': 0.3}[cfg.remat]
  log = math.log2
  return 0.15 * log(sizes['tensor']) + 0.04 * log(sizes['fsdp']) + 0.03 * log(cfg.accumulate) + again, cfg.accumulate
