"""Training, from top to bottom."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dynllava_jax import checkpoint, compilation, locks, methods, sharding
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import IGNORE, IMAGE_ID, TOKENIZER_FILES, ConfigError, TrainConfig, first_difference, to_dict
from dynllava_jax.data.batches import Batch
from dynllava_jax.data.pipeline import LayOut, to_mesh, training_batches
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.sources import TrainingData, new_tokenizer, require_vocabulary, training_data
from dynllava_jax.display import Terminal
from dynllava_jax.files import sweep
from dynllava_jax.models.lora import ADAPTERS
from dynllava_jax.models.params import abstract_params, cut_params, init_params, join_params
from dynllava_jax.training import limits
from dynllava_jax.training import record as records
from dynllava_jax.training.adapters import adapted, belonging, held_as, new_adapters, to_store
from dynllava_jax.training.metrics import Display, MetricsLog, missing_lines, unreadable_lines
from dynllava_jax.training.record import CHECKPOINTS
from dynllava_jax.training.saving import Saver, check_path
from dynllava_jax.training.step import (
  PREDICTORS,
  State,
  make_optimizer,
  make_train_step,
  split_frozen,
  state_shardings,
  unused,
)
from dynllava_jax.training.stopping import StopRequest
from dynllava_jax.training.throughput import Clock, compilations

SKIPPED_FILE = 'skipped.json'  # samples left out, by reason


class Interrupted(Exception):
  """The run was asked to stop; its state is saved."""


def train(cfg: TrainConfig, workdir: pathlib.Path) -> None:
  """Runs or resumes a training run.

  Raises:
    ConfigError: something in the config cannot be run here, or what it names has changed since the run was started.
    CheckpointError: a step cannot be written.
    BusyError: another process trains in `workdir`.
    Interrupted: SIGINT or SIGTERM; the last finished step is saved, and starting again goes on from it. With several hosts
      that is the next step that is logged.
    FloatingPointError: a weight or the loss is not a number.
  """
  with contextlib.ExitStack() as stack:
    stop = StopRequest()
    stack.callback(stop.restore)
    check_path((workdir / CHECKPOINTS).absolute())
    compilation.keep()
    if jax.process_index() == 0:
      stack.enter_context(locks.sole_use(workdir, '--workdir'))
      for folder in (workdir, workdir / CHECKPOINTS):
        sweep(folder)
    _train(cfg, workdir, stop, stack)


def _train(cfg: TrainConfig, workdir: pathlib.Path, stop: StopRequest, stack: contextlib.ExitStack) -> None:
  # 1. Mesh, what is there of this run, and data.
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  methods.check_tail(cfg.model, cfg.reducer, there=False)  # a step holds nothing that is never trained
  if methods.unmerged_tokens(cfg.model, cfg.reducer):
    raise ConfigError(f'config.reducer: {cfg.reducer.name} cannot unmerge in training; set its unmerge to False')
  first_host = jax.process_index() == 0  # it alone writes, but for the arrays, and shows
  say = Terminal(quiet=not first_host).print
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_batch(cfg.batch_size, mesh, cfg.accumulate)
  limits.require_room(cfg, mesh)
  hosts, host = sharding.batch_hosts(mesh)
  directory = (workdir / CHECKPOINTS).absolute()
  started, first = records.find(cfg, workdir, say)
  if started and first:
    tokenizer, assets = checkpoint.read_tokenizer(directory), checkpoint.read_assets(directory)
  elif cfg.init_from:
    tokenizer, assets = inherited_tokenizer(cfg.init_from), checkpoint.read_assets(cfg.init_from)
  else:
    tokenizer, assets = new_tokenizer(cfg.data, cfg.model.llama.vocab_size), {}
  require_vocabulary(tokenizer, cfg.model.llama.vocab_size)
  num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
  training = training_data(cfg.data, num_image, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed)
  layout = LayOut(cfg.data, cfg.model.vision, tokenizer, num_image)
  inputs = records.inputs(cfg, training.source, tokenizer)
  if started and first:
    records.check_same_inputs(cfg, started, inputs, workdir)

  # 2. State: the run's own newest step, else `init_from`, else random numbers.
  optimizer = make_optimizer(cfg.optimizer, cfg.steps)
  with sharding.on_mesh(mesh):
    state, frozen = initial_state(cfg, optimizer, mesh, directory)
    limits.check_weights(state.params | frozen, str(directory if first else cfg.init_from or 'the random weights'))
    # The top of a CLIP tower, and an instruction predictor that is not run: no use for the step, but an export needs them.
    tail = {k: frozen.pop(k) for k in unused(cfg) if k in frozen}
    info = CheckpointInfo(
      model=cfg.model,
      stages=cfg.stages,
      reducer=cfg.reducer,
      sparsity=cfg.sparsity,
      conversation=cfg.data.conversation,
      image_aspect=cfg.data.image_aspect,
      unused_vision_layers='vision_tail' in tail,
    )
    if cfg.lora:
      info = belonging(cfg, info, directory)
    record = records.begin(cfg, started, first, inputs, checkpoint.describe(info, tokenizer, assets))
    if first_host:
      record.write(workdir)
      checkpoint.write_info(directory, info, tokenizer, assets)

    # 3. The step, and what watches it.
    train_step = make_train_step(cfg, optimizer, mesh)
    saver = stack.enter_context(Saver(directory, cfg.keep))
    log = stack.enter_context(contextlib.closing(MetricsLog(workdir, first))) if first_host else None
    if damaged := unreadable_lines(workdir):
      say(damaged)
    if started and (gone := missing_lines(workdir, first, started.settings['log_every'])):
      say(gone)

    def save(state: State) -> None:
      saver.save(
        int(state.step),
        {
          'params': join_params(to_store(info, state.params, frozen | tail) if cfg.lora else state.params | frozen | tail),
          'optimizer': {'step': state.step, 'opt_state': state.opt_state},
        },
      )

    # 4. The loop: batch, step, log, save.
    batches = stack.enter_context(
      contextlib.closing(training_batches(training, layout, batch_size=cfg.batch_size, step=first, hosts=hosts, host=host))
    )
    if first_host:
      write_skipped(training, workdir)
    say(describe_data(training, workdir))
    if first:
      say(f'{workdir}: ' + ('finished already' if first >= cfg.steps else f'goes on from step {first}'))
    display = stack.enter_context(Display(workdir.name, cfg.steps, first, quiet=not first_host))
    stop.in_loop()
    clock, unseen, compiled = Clock(cfg, hosts), [], stack.enter_context(compilations())
    step = first
    for step in range(first + 1, cfg.steps + 1):
      with clock.spent_on('data'):
        batch = next(batches)
      check_tokens(batch, cfg.model.llama.vocab_size, step)
      clock.saw(batch)
      state, metrics = train_step(state, frozen, to_mesh(batch, sharding.batch_sharding(mesh)))
      unseen.append((step, metrics['loss'], metrics['grad_norm']))
      if step == first + 1:  # leave the compilation out of the times
        jax.block_until_ready(metrics)
        clock.restart()
      logging = step % cfg.log_every == 0 or step == cfg.steps
      stopping = stop.agreed(logging) and step < cfg.steps
      saving = step % cfg.save_every == 0 or step == cfg.steps or stopping
      if saving or logging:
        check_losses(jax.device_get(unseen))
        unseen = []
        values = {name: float(v) for name, v in metrics.items()}
      if logging:
        values = {name: v for name, v in values.items() if not np.isnan(v)}  # keep rates of a batch without any such token
        values |= clock.report() | {'compilations': len(compiled)}
        if log:
          log.write(step, values)
        display.show(step, values)
        record = records.mark(record, saver.written(), workdir)
      if saving:
        with clock.spent_on('save'):
          save(state)
      if stopping:
        break
    saver.close()
    records.mark(record, saver.written(), workdir)
    if step < cfg.steps:
      raise Interrupted(f'stopped after step {step} of {cfg.steps}; start the same command again to go on')


def check_losses(seen: Sequence[tuple[int, float, float]]) -> None:
  """FloatingPointError for the first step whose loss or gradient is not a number. `seen`: (step, loss, gradient norm)."""
  for step, loss, norm in seen:
    if not np.isfinite([loss, norm]).all():
      raise FloatingPointError(
        f'step {step}: the loss is {loss}, the gradient norm {norm}; the last saved step is intact. Lower the learning rate, or '
        'look at the batch: every row needs an answer'
      )


def check_tokens(batch: Batch, vocab_size: int, step: int) -> None:
  """DataError if a batch holds tokens that the model has not, which would read another token's weights without a word."""
  for ids, apart in ((batch.tokens, IMAGE_ID), (batch.labels, IGNORE)):
    if wrong := ids[(ids != apart) & ((ids < 0) | (ids >= vocab_size))].tolist():
      raise DataError(
        f'step {step}: token {wrong[0]} in the batch, the model has {vocab_size}; is the tokenizer the one of the weights? Set '
        'config.model.llama.vocab_size, or give the tokenizer that belongs to them'
      )


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

  The newest step in `directory` is not compared with its checksums: `recovery.newest_whole_step` has just done that.

  Raises:
    ConfigError: `init_from` holds another model.
  """
  places = state_shardings(cfg, optimizer, mesh)
  if checkpoint.all_steps(directory):
    whole = adapted(cfg, directory, mesh) if cfg.lora else checkpoint.load_params(directory, mesh, checked=True)
    trained, frozen = split_frozen(cut_params(whole, cfg.stages), cfg.held)
    abstract = jax.eval_shape(optimizer.init, trained)
    target = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      {'step': jax.ShapeDtypeStruct((), jnp.int32), 'opt_state': abstract},
      {'step': places.step, 'opt_state': places.opt_state},
    )
    folder, step = checkpoint.locate(directory)
    stored = ocp.load_checkpointables(folder / str(step), {'optimizer': target})['optimizer']
    return State(stored['step'], trained, stored['opt_state']), frozen

  loaded = pretrained(cfg, mesh) if cfg.init_from else {}
  boxed = {k: v for k, v in abstract_params(cfg.model).items() if k not in loaded}
  draw = lambda: {k: v for k, v in sharding.unboxed(init_params(cfg.model, jax.random.key(cfg.seed))).items() if k in boxed}
  fresh = jax.jit(draw, out_shardings=sharding.shardings(boxed, mesh))()
  params = loaded | fresh
  if cfg.lora:
    params = held_as(params, cfg.lora.base) | {ADAPTERS: new_adapters(cfg, mesh)}
  trained, frozen = split_frozen(cut_params(params, cfg.stages), cfg.held)
  # Converted checkpoints are often bfloat16, in which the small steps of fine-tuning round to nothing unless rounded at random.
  trained = jax.tree.map(lambda x: x.astype(cfg.param_dtype), trained)
  opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
  return State(jax.device_put(jnp.int32(0), places.step), trained, opt_state), frozen


def pretrained(cfg: TrainConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Parameters of `init_from`. Predictors may be missing there; everything else must fit."""
  found = checkpoint.read_info(cfg.init_from)
  theirs, ours = (to_dict(dataclasses.replace(m, predictor=None)) for m in (found.model, cfg.model))
  if difference := first_difference(theirs, ours):
    key, old, new = difference
    raise ConfigError(
      f'config.init_from: the model in {cfg.init_from} has {key} {old!r}, the config says {new!r}; set --config.model.{key}={old}'
    )
  known = found.model.predictor
  grown = cfg.model.predictor and dataclasses.replace(cfg.model.predictor, instruct=False)  # one for instructions is added
  if cfg.model.predictor and known not in (None, cfg.model.predictor, grown):
    raise ConfigError(f'config.init_from: {cfg.init_from} has other predictors: {known}')
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
