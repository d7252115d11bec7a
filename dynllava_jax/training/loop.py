"""Training, from top to bottom."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dynllava_jax import checkpoint, methods, sharding
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import TOKENIZER_FILES, ConfigError, TrainConfig, first_difference, from_config_dict, to_dict
from dynllava_jax.data.pipeline import LayOut, to_mesh, training_batches
from dynllava_jax.data.sources import TrainingData, new_tokenizer, training_data
from dynllava_jax.models.params import abstract_params, cut_params, init_params, join_params
from dynllava_jax.training.metrics import Display, MetricsLog
from dynllava_jax.training.step import (
  NEVER_TRAINED,
  PREDICTORS,
  State,
  make_optimizer,
  make_train_step,
  split_frozen,
  state_shardings,
)

CHECKPOINTS = 'checkpoints'
CONFIG_FILE = 'config.json'
SKIPPED_FILE = 'skipped.json'  # samples left out, by reason
DATA_MAY_CHANGE = ('workers', 'images')
MAY_CHANGE = ('mesh', 'log_every', 'save_every', 'init_from', 'remat', 'accumulate')  # between start and resumption


class Interrupted(Exception):
  """The run was asked to stop; its state is saved."""


def train(cfg: TrainConfig, workdir: pathlib.Path) -> None:
  """Runs or resumes a training run.

  Raises:
    ConfigError: something in the config cannot be run here.
    Interrupted: SIGINT or SIGTERM; the last finished step is saved, and starting again goes on from it. With several hosts
      that is the next step that is logged.
    FloatingPointError: the loss is not a number.
  """
  # 1. Mesh and data.
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  first_host = jax.process_index() == 0  # it alone writes, but for the arrays, and shows
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_batch(cfg.batch_size, mesh, cfg.accumulate)
  hosts, host = sharding.batch_hosts(mesh)
  directory = (workdir / CHECKPOINTS).absolute()
  if checkpoint.all_steps(directory):
    check_same_run(cfg, workdir)
    tokenizer, assets = checkpoint.read_tokenizer(directory), checkpoint.read_assets(directory)
  elif cfg.init_from:
    tokenizer, assets = inherited_tokenizer(cfg.init_from), checkpoint.read_assets(cfg.init_from)
  else:
    tokenizer, assets = new_tokenizer(cfg.data, cfg.model.llama.vocab_size), {}
  num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
  training = training_data(cfg.data, num_image, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed)
  layout = LayOut(cfg.data, cfg.model.vision, tokenizer, num_image)

  # 2. State: the run's own newest step, else `init_from`, else random numbers.
  optimizer = make_optimizer(cfg.optimizer, cfg.steps)
  with sharding.on_mesh(mesh):
    state, frozen = initial_state(cfg, optimizer, mesh, directory)
    first = int(state.step)
    # The top of a CLIP tower and the instruction predictor, never run: no use for the step, but an export needs them.
    tail = {k: frozen.pop(k) for k in NEVER_TRAINED if k in frozen}
    info = CheckpointInfo(
      model=cfg.model,
      stages=cfg.stages,
      reducer=cfg.reducer,
      sparsity=cfg.sparsity,
      conversation=cfg.data.conversation,
      image_aspect=cfg.data.image_aspect,
      unused_vision_layers='vision_tail' in tail,
    )
    if first_host:
      checkpoint.write_info(directory, info, tokenizer, assets)
      checkpoint.write_atomically(workdir / CONFIG_FILE, json.dumps(to_dict(cfg), indent=1).encode())

    # 3. The step, and what watches it.
    train_step = make_train_step(cfg, optimizer, mesh)
    policies = ocp.training.preservation_policies
    saver = ocp.training.Checkpointer(
      directory,
      preservation_policy=policies.LatestN(1),
      cleanup_tmp_directories=True,
      context=checkpoint.sealing_context(directory),
    )
    stop = _StopRequest()
    log = MetricsLog(workdir, first) if first_host else None

    def save(state: State) -> None:
      # force: by default Orbax passes over a step while the one before is still being written, the last one too.
      saver.save_checkpointables_async(
        int(state.step),
        {'params': join_params(state.params | frozen) | tail, 'optimizer': {'step': state.step, 'opt_state': state.opt_state}},
        force=True,
      )

    # 4. The loop: batch, step, log, save.
    try:
      batches = training_batches(training, layout, batch_size=cfg.batch_size, step=first, hosts=hosts, host=host)
      with contextlib.closing(batches), Display(workdir.name, cfg.steps, first, quiet=not first_host) as display:
        if first_host:
          write_skipped(training, workdir)
        display.say(describe_data(training, workdir))
        if first:
          display.say(f'{workdir}: ' + ('finished already' if first >= cfg.steps else f'goes on from step {first}'))
        since, tokens = time.monotonic(), 0
        for step in range(first + 1, cfg.steps + 1):
          batch = next(batches)
          tokens += int(np.sum(batch.length)) * hosts
          state, metrics = train_step(state, frozen, to_mesh(batch, sharding.batch_sharding(mesh)))
          if step == first + 1:  # leave the compilation out of tokens/s
            jax.block_until_ready(metrics)
            since, tokens = time.monotonic(), 0
          logging = step % cfg.log_every == 0 or step == cfg.steps
          stopping = stop.agreed(logging) and step < cfg.steps
          saving = step % cfg.save_every == 0 or step == cfg.steps or stopping
          if saving or logging:
            values = {name: float(v) for name, v in metrics.items()}
            if not np.isfinite([values['loss'], values['grad_norm']]).all():
              raise FloatingPointError(
                f'step {step}: the loss is {values["loss"]}, the gradient norm {values["grad_norm"]}; the last saved step is '
                'intact. Lower the learning rate, or look at the batch: every row needs an answer'
              )
          if logging:
            values = {name: v for name, v in values.items() if not np.isnan(v)}  # keep rates of a batch without any such token
            now = time.monotonic()
            if tokens:
              values['tokens_per_second'] = tokens / (now - since)
            since, tokens = now, 0
            if log:
              log.write(step, values)
            display.show(step, values)
          if saving:
            save(state)
          if stopping:
            raise Interrupted(f'stopped after step {step} of {cfg.steps}; start the same command again to go on')
    finally:
      saver.close()
      if log:
        log.close()
      stop.restore()


def write_skipped(training: TrainingData, workdir: pathlib.Path) -> None:
  """The ids of samples left out, by reason, to `skipped.json`."""
  if training.skipped:
    checkpoint.write_atomically(workdir / SKIPPED_FILE, json.dumps(training.skipped, indent=1).encode())


def describe_data(training: TrainingData, workdir: pathlib.Path) -> str:
  """What an epoch is made of, as text."""
  lines = [f'data: {training.order.whole:,} of {len(training.source):,} samples per epoch']
  if training.skipped:
    counts = ', '.join(f'{len(ids)} {reason}' for reason, ids in training.skipped.items())
    lines.append(f'left out: {counts}; ids in {workdir / SKIPPED_FILE}')
  lines += [f'text bucket {u.text_length}: {u.batches:,} batches, {u.padding:.0%} padding' for u in training.order.bucket_plan()]
  return '\n'.join(lines)


def initial_state(
  cfg: TrainConfig, optimizer: Any, mesh: jax.sharding.Mesh, directory: pathlib.Path
) -> tuple[State, dict[str, Any]]:
  """(state, frozen groups and, if there is one, the unused top of the CLIP tower) of a new or resumed run, on the mesh.

  Raises:
    ConfigError: `init_from` holds another model.
  """
  places = state_shardings(cfg, optimizer, mesh)
  if checkpoint.all_steps(directory):
    params = cut_params(checkpoint.load_params(directory, mesh), cfg.stages)
    trained, frozen = split_frozen(params, cfg.frozen)
    abstract = jax.eval_shape(optimizer.init, trained)
    target = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      {'step': jax.ShapeDtypeStruct((), jnp.int32), 'opt_state': abstract},
      {'step': places.step, 'opt_state': places.opt_state},
    )
    folder, step = checkpoint.locate(directory)
    checkpoint.check_integrity(folder / str(step), 'optimizer')
    stored = ocp.load_checkpointables(folder / str(step), {'optimizer': target})['optimizer']
    return State(stored['step'], trained, stored['opt_state']), frozen

  loaded = pretrained(cfg, mesh) if cfg.init_from else {}
  boxed = {k: v for k, v in abstract_params(cfg.model).items() if k not in loaded}
  draw = lambda: {k: v for k, v in sharding.unboxed(init_params(cfg.model, jax.random.key(cfg.seed))).items() if k in boxed}
  fresh = jax.jit(draw, out_shardings=sharding.shardings(boxed, mesh))()
  trained, frozen = split_frozen(cut_params(loaded | fresh, cfg.stages), cfg.frozen)
  # Converted checkpoints are often bfloat16, in which the small steps of fine-tuning round to nothing unless rounded at random.
  trained = jax.tree.map(lambda x: x.astype(cfg.param_dtype), trained)
  opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
  return State(jax.device_put(jnp.int32(0), places.step), trained, opt_state), frozen


def check_same_run(cfg: TrainConfig, workdir: pathlib.Path) -> None:
  """Raises ConfigError if the run in `workdir` was started with other settings that its course depends on."""
  file = workdir / CONFIG_FILE
  if not file.exists():
    return
  try:
    written = json.loads(file.read_text())  # settings that it does not know have their defaults
    if isinstance(written, dict):
      written = {k: v for k, v in written.items() if k not in MAY_CHANGE}
    started = from_config_dict(TrainConfig, written)
  except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as e:
    raise ConfigError(
      f'{file}: not the settings of a run ({e}); put them back, or remove the file if you are sure of yours'
    ) from None
  before, now = to_dict(started), to_dict(cfg)
  for side in (before, now):  # the stream is the same for any number of workers and wherever the pictures lie
    side['data'] = {k: v for k, v in side['data'].items() if k not in DATA_MAY_CHANGE}
  if found := first_difference(*({k: v for k, v in side.items() if k not in MAY_CHANGE} for side in (before, now))):
    key, old, new = found
    raise ConfigError(
      f'config.{key}: the run in {workdir} was started with {old!r}, the config says {new!r}; choose another --workdir or remove it'
    )


def pretrained(cfg: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters of `init_from`. Predictors may be missing there; everything else must fit."""
  found = checkpoint.read_info(cfg.init_from)
  theirs, ours = (to_dict(dataclasses.replace(m, predictor=None)) for m in (found.model, cfg.model))
  if difference := first_difference(theirs, ours):
    key, old, new = difference
    raise ConfigError(
      f'config.init_from: the model in {cfg.init_from} has {key} {old!r}, the config says {new!r}; set --config.model.{key}={old}'
    )
  if cfg.model.predictor and found.model.predictor not in (None, cfg.model.predictor):
    raise ConfigError(f'config.init_from: {cfg.init_from} has other predictors: {found.model.predictor}')
  left_out = () if cfg.model.predictor else PREDICTORS
  return {k: v for k, v in checkpoint.load_params(cfg.init_from, mesh).items() if k not in left_out}


def inherited_tokenizer(path: str) -> dict[str, bytes]:
  """The tokenizer that `init_from` was trained with; ConfigError if it has none."""
  try:
    tokenizer = checkpoint.read_tokenizer(path)
  except CheckpointError as e:
    raise ConfigError(f'config.init_from: {e}') from None
  if tokenizer is None:
    raise ConfigError(f'config.init_from: {path} has no tokenizer; put its files there: {", ".join(TOKENIZER_FILES[:3])}')
  return tokenizer


class _StopRequest:
  """SIGINT and SIGTERM ask the loop to save and end; a second SIGINT ends at once."""

  def __init__(self):
    self.requested = False
    self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

  def _ask(self, number, frame):
    del frame
    self.requested = True
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)

  def agreed(self, logging: bool) -> bool:
    """Whether to end after this step. Several hosts must end after the same one, and only talk about it when they log."""
    if jax.process_count() == 1:
      return self.requested
    return logging and bool(multihost_utils.process_allgather(np.asarray(self.requested)).any())

  def restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
