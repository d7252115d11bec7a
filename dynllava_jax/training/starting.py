"""The state that a run starts or goes on from: its own newest step, other weights, or random numbers."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import TOKENIZER_FILES, ClipTextConfig, ConfigError, TrainConfig, first_difference, to_dict
from dynllava_jax.config.groups import groups_of, grown, without_methods
from dynllava_jax.models.groups import MODULES
from dynllava_jax.models.lora import ADAPTERS
from dynllava_jax.models.params import abstract_params, cut_params, init_params
from dynllava_jax.training.adapters import adapted, held_as, new_adapters
from dynllava_jax.training.freezing import split_frozen
from dynllava_jax.training.step import State, new_watch, state_shardings


def initial_state(
  cfg: TrainConfig, optimizer: Any, mesh: jax.sharding.Mesh, directory: pathlib.Path
) -> tuple[State, dict[str, Any]]:
  """(state, frozen groups and, if there is one, the unused top of the CLIP tower) of a new or resumed run, on the mesh.

  The newest step in `directory` is not compared with its checksums: `recovery.newest_whole_step` has just done that.

  Raises:
    ConfigError: `init_from` holds another model.
  """
  places = state_shardings(cfg, optimizer, mesh)
  if checkpoint.all_steps(directory):
    whole = adapted(cfg, directory, mesh) if cfg.lora else checkpoint.load_params(directory, mesh, checked=True)
    trained, frozen = split_frozen(cut_params(whole, cfg.stages), cfg.held, cfg.only)
    abstract = jax.eval_shape(optimizer.init, trained)
    target = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      {'step': jax.ShapeDtypeStruct((), jnp.int32), 'opt_state': abstract},
      {'step': places.step, 'opt_state': places.opt_state},
    )
    folder, step = checkpoint.locate(directory)
    stored = ocp.load_checkpointables(folder / str(step), {'optimizer': target})['optimizer']
    return State(stored['step'], trained, stored['opt_state'], _watch(cfg, places, folder / str(step))), frozen

  loaded = pretrained(cfg, mesh) if cfg.init_from else {}
  boxed = {k: v for k, v in abstract_params(cfg.model).items() if k not in loaded}
  draw = lambda: {k: v for k, v in sharding.unboxed(init_params(cfg.model, jax.random.key(cfg.seed))).items() if k in boxed}
  fresh = jax.jit(draw, out_shardings=sharding.shardings(boxed, mesh))()
  params = loaded | fresh
  if cfg.init_from:
    for name in (n for n in fresh if MODULES[n].like):
      params[name] = jax.jit(MODULES[name].like, out_shardings=sharding.shardings(boxed[name], mesh))(loaded)
  if cfg.lora:
    params = held_as(params, cfg.lora.base) | {ADAPTERS: new_adapters(cfg, mesh)}
  trained, frozen = split_frozen(cut_params(params, cfg.stages), cfg.held, cfg.only)
  # Converted checkpoints are often bfloat16, in which the small steps of fine-tuning round to nothing unless rounded at random.
  trained = jax.tree.map(lambda x: x.astype(cfg.param_dtype), trained)
  opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
  return State(jax.device_put(jnp.int32(0), places.step), trained, opt_state, _watch(cfg, places)), frozen


def _watch(cfg: TrainConfig, places: State, step_dir: pathlib.Path | None = None) -> dict[str, jax.Array] | None:
  """A stored `State.watch`, or a new one where none was asked for when the step was saved."""
  new = new_watch(cfg)
  if new is None or step_dir is None or not (step_dir / 'watch').exists():
    return new and jax.device_put(new, places.watch)
  target = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), new, places.watch)
  return ocp.load_checkpointables(step_dir, {'watch': target})['watch']


def to_save(state: State) -> dict[str, Any]:
  """What a checkpoint holds of a state besides parameters, by part."""
  parts = {'optimizer': {'step': state.step, 'opt_state': state.opt_state}}
  return parts | {'watch': state.watch} if state.watch else parts


def pretrained(cfg: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters of `init_from`. What methods bring may be missing there; everything else must fit."""
  found = checkpoint.read_info(cfg.init_from)
  plain = (dataclasses.replace(without_methods(m), clip_text=None) for m in (found.model, cfg.model))
  if difference := first_difference(*map(to_dict, plain)):
    key, old, new = difference
    raise ConfigError(
      f'config.init_from: the model in {cfg.init_from} has {key} {old!r}, the config says {new!r}; set --config.model.{key}={old}'
    )
  for what, theirs in grown(found.model, cfg.model).values():
    raise ConfigError(f'config.init_from: {cfg.init_from} has another {what}: {theirs}')
  left_out = set(groups_of(found.model)) - set(groups_of(cfg.model))
  return {k: v for k, v in checkpoint.load_params(cfg.init_from, mesh).items() if k not in left_out}


def added(cfg: TrainConfig) -> tuple[str, ...]:
  """Groups that the run begins with and `init_from` has not got; () without it."""
  if not cfg.init_from:
    return ()
  there = groups_of(checkpoint.read_info(cfg.init_from).model)
  return tuple(name for name in groups_of(cfg.model) if name not in there)


def text_tower(cfg: TrainConfig, directory: pathlib.Path) -> ClipTextConfig | None:
  """The text tower that a run carries along, as its own newest step or `init_from` describes it."""
  return checkpoint.read_info(directory if checkpoint.all_steps(directory) else cfg.init_from).model.clip_text


def inherited_tokenizer(path: str) -> dict[str, bytes]:
  """The tokenizer that `init_from` was trained with; ConfigError if it has none."""
  try:
    tokenizer = checkpoint.read_tokenizer(path)
  except CheckpointError as e:
    raise ConfigError(f'config.init_from: {e}') from None
  if tokenizer is None:
    raise ConfigError(f'config.init_from: {path} has no tokenizer; put its files there: {", ".join(TOKENIZER_FILES[:3])}')
  return tokenizer
