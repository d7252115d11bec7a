"""Training, from top to bottom."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np

from dynllava_jax import checkpoint, compilation, locks, methods, sharding
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import ConfigError, TrainConfig, to_dict
from dynllava_jax.data.pipeline import LayOut, to_mesh, training_batches
from dynllava_jax.data.sources import TrainingData, new_tokenizer, require_vocabulary, training_data
from dynllava_jax.display import Terminal
from dynllava_jax.files import sweep
from dynllava_jax.models.params import join_params
from dynllava_jax.training import limits
from dynllava_jax.training import record as records
from dynllava_jax.training.adapters import belonging, to_store
from dynllava_jax.training.agreement import require_same
from dynllava_jax.training.evaluating import Evaluations, summary
from dynllava_jax.training.freezing import joined
from dynllava_jax.training.keeping import Keeping
from dynllava_jax.training.metrics import TENSORBOARD, Display, MetricsLog, missing_lines, read_metrics, unreadable_lines
from dynllava_jax.training.record import CHECKPOINTS
from dynllava_jax.training.saving import Saver, SaveTimes, check_path
from dynllava_jax.training.starting import added, inherited_tokenizer, initial_state, text_tower, to_save
from dynllava_jax.training.step import State, make_optimizer, make_train_step, unused
from dynllava_jax.training.stopping import Interrupted, StopRequest
from dynllava_jax.training.throughput import Clock, compilations
from dynllava_jax.training.tracing import Trace
from dynllava_jax.training.watch import Watch

SKIPPED_FILE = 'skipped.json'  # samples left out, by reason


def train(cfg: TrainConfig, workdir: pathlib.Path, profile: range = range(0), apart: bool = False) -> None:
  """Runs or resumes a training run.

  Args:
    cfg, workdir: what is trained, and where.
    profile: steps that are traced.
    apart: every host has a `workdir` of its own, alike at the start; only that of the first is kept.

  Raises:
    ConfigError: something in the config cannot be run here, what it names has changed since the run was started, or a host has
      other settings, data or code than the others.
    DataError: a batch whose labels cannot be right.
    CheckpointError: a step cannot be written.
    BusyError: another process trains in `workdir`.
    Interrupted: SIGINT or SIGTERM; the last finished step is saved, and starting again goes on from it. With several hosts
      that is the next step that is logged.
    FloatingPointError: a weight or the loss is not a number, or the loss a spike.
  """
  with contextlib.ExitStack() as stack:
    stop = StopRequest(cfg.grace_seconds)
    stack.callback(stop.restore)
    require_same({'config': to_dict(cfg), 'code': records.code_versions()}, 'start all hosts alike')
    check_path((workdir / CHECKPOINTS).absolute())
    compilation.keep()
    if jax.process_index() == 0:
      stack.enter_context(locks.sole_use(workdir, '--workdir'))
      for folder in (workdir, workdir / CHECKPOINTS):
        sweep(folder)
    _train(cfg, workdir, profile, apart, stop, stack)


def _train(
  cfg: TrainConfig, workdir: pathlib.Path, profile: range, apart: bool, stop: StopRequest, stack: contextlib.ExitStack
) -> None:
  # 1. Mesh, what is there of this run, and data.
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  methods.check_training(cfg.stages, bool(cfg.lora))
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
  started, first = records.find(cfg, workdir, say, apart)
  past = [line for line in read_metrics(workdir) if line['step'] <= first]
  if started and first:
    tokenizer, assets = checkpoint.read_tokenizer(directory), checkpoint.read_assets(directory)
  elif cfg.init_from:
    tokenizer, assets = inherited_tokenizer(cfg.init_from), checkpoint.read_assets(cfg.init_from)
  else:
    tokenizer, assets = new_tokenizer(cfg.data, cfg.model.llama.vocab_size), {}
  require_vocabulary(tokenizer, cfg.model.llama.vocab_size)
  num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
  training = training_data(cfg.data, num_image, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed)
  room = methods.text_room(cfg.stages, num_image, cfg.model.llama.num_layers)
  layout = LayOut(cfg.data, cfg.model.vision, tokenizer, num_image, room)
  inputs = records.inputs(cfg, training.source, tokenizer)
  if started and first:
    records.check_same_inputs(cfg, started, inputs, workdir)

  # 2. State: the run's own newest step, else `init_from`, else random numbers.
  optimizer = make_optimizer(cfg.optimizer, cfg.steps)
  with sharding.on_mesh(mesh):
    state, frozen = initial_state(cfg, optimizer, mesh, directory)
    limits.check_weights(joined(state.params, frozen), str(directory if first else cfg.init_from or 'the random weights'))
    if not first and (fresh := added(cfg)):
      say(f'{cfg.init_from}: has no {", ".join(fresh)}; they begin with random numbers (seed {cfg.seed})')
    # The top of a CLIP tower, and what no stage asks: no use for the step, but an export needs them.
    tail = {k: frozen.pop(k) for k in unused(cfg) if k in frozen}
    info = CheckpointInfo(
      model=dataclasses.replace(cfg.model, clip_text=text_tower(cfg, directory) if 'clip_text' in tail else None),
      stages=cfg.stages,
      reducer=cfg.reducer,
      sparsity=cfg.sparsity,
      conversation=cfg.data.conversation,
      image_aspect=cfg.data.image_aspect,
      unused_vision_layers='vision_tail' in tail,
    )
    if cfg.lora:
      info = belonging(cfg, info, directory)
    evaluations = Evaluations(cfg, info, layout, mesh, workdir, past)
    record = records.begin(cfg, started, first, inputs, checkpoint.describe(info, tokenizer, assets))
    if first_host:
      record.write(workdir)
      checkpoint.write_info(directory, info, tokenizer, assets)

    # 3. The step, and what watches it.
    train_step = make_train_step(cfg, optimizer, mesh)
    keeping = Keeping.of_run(cfg, past)
    saver, times = stack.enter_context(Saver(directory, keeping, mesh if apart else None)), SaveTimes(cfg)
    log = stack.enter_context(contextlib.closing(MetricsLog(workdir, first))) if first_host else None
    if damaged := unreadable_lines(workdir):
      say(damaged)
    if started and (gone := missing_lines(workdir, first, started.settings['log_every'])):
      say(gone)

    def save(state: State) -> None:
      held = frozen | tail
      params = join_params(to_store(info, state.params, held) if cfg.lora else joined(state.params, held))
      saver.save(int(state.step), {'params': params} | to_save(state))

    def evaluate(state: State, step: int) -> None:
      for figures in evaluations.run(step, joined(state.params, frozen), lambda: stop.agreed(True)):
        if log:
          log.write(step, figures)
        keeping.note(step, figures)
        display.say(f'{workdir.name}: step {step}/{cfg.steps}  {summary(figures)}')

    # 4. The loop: batch, step, log, save, evaluate.
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
    own = cfg.batch_size // hosts
    watch = Watch(cfg, training, layout, workdir, display.say, slice(host * own, (host + 1) * own))
    trace = stack.enter_context(Trace(profile, workdir / TENSORBOARD))
    clock, compiled = Clock(cfg, hosts), stack.enter_context(compilations())
    evaluate(state, first)  # what a stop left undone
    if stop.agreed(True):
      raise stopped(first, cfg, stop)
    step, interrupted = first, False
    for step in range(first + 1, cfg.steps + 1):
      with clock.spent_on('data'):
        batch = next(batches)
      watch.check(batch, step)
      clock.saw(batch)
      trace.before(step)
      state, metrics = train_step(state, frozen, to_mesh(batch, sharding.batch_sharding(mesh)))
      watch.saw(step, metrics)
      trace.after(step, metrics)
      if step == first + 1:  # leave the compilation out of the times
        jax.block_until_ready(metrics)
        clock.restart()
      logging = step % cfg.log_every == 0 or step == cfg.steps
      interrupted = stop.agreed(logging) and step < cfg.steps
      evaluating = bool(evaluations.due(step)) and not interrupted
      saving = times.due(step, logging) or evaluating or interrupted
      if saving or logging:
        watch.look()
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
        times.saved()
      if evaluating:
        with clock.spent_on('evaluate'):
          evaluate(state, step)
        interrupted = stop.agreed(True)
      if interrupted:
        break
    saver.close()
    records.mark(record, saver.written(), workdir)
    if interrupted:
      raise stopped(step, cfg, stop)


def stopped(step: int, cfg: TrainConfig, stop: StopRequest) -> Interrupted:
  """The error of a run that was asked to stop."""
  return Interrupted(f'stopped after step {step} of {cfg.steps}; start the same command again to go on', stop.code)


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
