"""What cannot go well, found before the first step: more memory than there is, by arithmetic, and weights that are no weights."""

import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynllava_jax.config import ConfigError, TrainConfig
from dynllava_jax.sharding import batch_ways

SIZES = {'float32': 4, 'bfloat16': 2}
LARGEST_WEIGHT = 1e6  # trained ones are below 100; what is larger was damaged or read as another dtype
GROUP_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')  # of a container


def require_room(cfg: TrainConfig, mesh: Mesh) -> None:
  """Raises ConfigError if a device cannot hold even the least that a step needs; names the settings that ask for most."""
  have = memory_of_a_device()
  split = math.prod(n for axis, n in mesh.shape.items() if axis != 'data')
  parts = {name: bytes_ / split for name, bytes_ in state_bytes(cfg).items()}
  parts |= batch_bytes(cfg, -(-cfg.batch_size // batch_ways(mesh.shape)))
  need = sum(parts.values())
  if need > have:
    name = max(parts, key=parts.get)
    raise ConfigError(
      f'config.{name} ask for {_size(parts[name])}, and the run for at least {_size(need)} per device, which has {_size(have)}; '
      'choose smaller ones, or a larger mesh (config.mesh.fsdp splits weights and batch)'
    )


def state_bytes(cfg: TrainConfig) -> dict[str, float]:
  """Bytes of weights, gradients and moments over all devices, by the settings they follow from; biases and norms left out."""
  vision, llama, predictor = cfg.model.vision, cfg.model.llama, cfg.model.predictor
  per_layer = 2 * llama.hidden_size**2 + 2 * llama.hidden_size * llama.head_dim * llama.num_kv_heads
  per_layer += 3 * llama.hidden_size * llama.mlp_dim
  more = len(llama.experts.layers) * (llama.experts.count - 1) if llama.experts else 0  # experts besides one MLP per layer
  numbers = {
    ('vision', 'model.vision: num_layers, hidden_size, mlp_dim, image_size, patch_size'): vision.layers_run
    * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.mlp_dim)
    + vision.hidden_size * (3 * vision.patch_size**2 + vision.num_patches),
    ('projector', 'model.projector and the hidden sizes'): cfg.model.projector_weights,
    ('llama', 'model.llama: num_layers, hidden_size, mlp_dim'): llama.num_layers * per_layer,
    ('llama', 'model.llama: experts, hidden_size, mlp_dim'): more * 3 * llama.hidden_size * llama.mlp_dim,
    ('llama', 'model.llama: vocab_size, hidden_size'): llama.vocab_size * llama.hidden_size * (1 if llama.tie_embeddings else 2),
  }
  if predictor:
    each = predictor.num_layers * (4 * predictor.d_model**2 + 2 * predictor.d_model * predictor.mlp_dim)
    numbers[('image_predictor', 'model.predictor: num_layers, d_model, mlp_dim')] = 2 * each
  moments = 2 * SIZES[cfg.optimizer.moment_dtype] if cfg.optimizer.name == 'adamw' else 0
  trained = 2 * SIZES[cfg.param_dtype] + moments  # itself and its gradient
  return {name: float(count) * (SIZES['bfloat16'] if group in cfg.held else trained) for (group, name), count in numbers.items()}


def batch_bytes(cfg: TrainConfig, rows: int) -> dict[str, float]:
  """Bytes of `rows` pictures and of what every decoder layer keeps of them for the gradient, by the settings they follow from."""
  size = SIZES[cfg.dtype]
  vision, llama = cfg.model.vision, cfg.model.llama
  at_once = -(-rows // cfg.accumulate)
  kept = 0 if cfg.remat == 'offload' else llama.hidden_size * size * llama.num_layers
  return {
    'batch_size and model.vision.image_size': (float(rows) + at_once * size) * vision.image_size**2 * 3,
    'batch_size and data.text_length': float(at_once) * min(cfg.data.text_buckets) * kept,
  }


def memory_of_a_device() -> float:
  """Bytes; of a CPU its share of the machine's or the container's memory."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if GROUP_LIMIT.exists() and (limit := GROUP_LIMIT.read_text().strip()).isdigit():
    have = min(have, int(limit))
  return have / jax.local_device_count()


def _size(count: float) -> str:
  unit = min(max(int(math.log(max(count, 1), 1000)), 0), 6)
  return f'{count / 1000**unit:,.3g} {["bytes", "kB", "MB", "GB", "TB", "PB", "EB"][unit]}'


def check_weights(params: dict[str, Any], where: str) -> None:
  """FloatingPointError if a weight is not finite or cannot have been trained; names the first such array. `where`: their origin."""
  largest = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.abs(x.astype(jnp.float32)).max(), tree))(params)
  for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(largest)):
    if not np.isfinite(value) or value > LARGEST_WEIGHT:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise FloatingPointError(
        f'{where}: {name} holds {"numbers that are not finite" if not np.isfinite(value) else f"{value:.3g}, which is no weight"}; '
        'copy or convert these weights again, or choose others with config.init_from'
      )
