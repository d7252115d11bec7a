"""LoRA runs: the decoder's weights as they are held, new adapters, and what a checkpoint of adapters belongs to."""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from dynllava_jax import checkpoint, paths, sharding
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import TrainConfig
from dynllava_jax.models.lora import abstract_adapters, init_adapters
from dynllava_jax.models.matrices import SCALES, smaller
from dynllava_jax.training.freezing import joined


def new_adapters(cfg: TrainConfig, mesh: Mesh) -> dict[str, Any]:
  """Adapters that change nothing yet, in checkpoint form; random numbers follow from the seed."""
  places = sharding.shardings(abstract_adapters(cfg.model.llama, cfg.lora), mesh)
  draw = lambda: sharding.unboxed(init_adapters(cfg.model.llama, cfg.lora, jax.random.key(cfg.seed)))
  return jax.jit(draw, out_shardings=places)()


def held_as(params: dict[str, Any], base: str) -> dict[str, Any]:
  """The groups with the decoder in `base`, in checkpoint form; int8 matrices bring their `scales`.

  Embedding, norms and head of an int8 decoder are bfloat16.
  """
  llama = params['llama']
  if base != 'int8':
    return params | {'llama': jax.tree.map(lambda x: x.astype(base), llama)}
  small, scales = smaller(jax.tree.map(lambda x: x, llama))
  small = jax.tree.map(lambda x: x if x.dtype == 'int8' else x.astype('bfloat16'), small)
  return params | {'llama': small, SCALES: scales}


def adapted(cfg: TrainConfig, directory: pathlib.Path, mesh: Mesh) -> dict[str, Any]:
  """All groups of a LoRA run that goes on: those it saved, and the others from the weights that it was started from."""
  return held_as(checkpoint.load_base(directory, mesh), cfg.lora.base) | checkpoint.load_adapted(directory, mesh, checked=True)


def to_store(info: CheckpointInfo, trained: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
  """What a checkpoint of adapters holds: the trained groups, and of the others those that its base does not have."""
  of_base = checkpoint.groups(info.base)
  partly = lambda name: name in trained and name != 'llama'
  return joined(trained, {n: group for n, group in held.items() if n != SCALES and (n not in of_base or partly(n))})


def belonging(cfg: TrainConfig, info: CheckpointInfo, directory: pathlib.Path) -> CheckpointInfo:
  """`info` with what the adapters belong to: the very step that the run was started from."""
  if checkpoint.all_steps(directory):
    started = checkpoint.read_info(directory)
    return dataclasses.replace(info, lora=cfg.lora, base=started.base, base_sha256=started.base_sha256)
  folder, step = checkpoint.locate(cfg.init_from)
  named = paths.given(cfg.init_from, 'config.init_from')
  base = folder / str(step) if paths.is_local(named) else named if named.name == str(step) else named / str(step)
  return dataclasses.replace(info, lora=cfg.lora, base=str(base), base_sha256=checkpoint.weights_digest(str(base)))
