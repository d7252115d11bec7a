"""The training step: state, optimiser, schedules and the one jitted function."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynllava_jax import methods, sharding
from dynllava_jax.config import (
  IGNORE,
  LoraConfig,
  ModelConfig,
  OptimizerConfig,
  Stage,
  TrainConfig,
)
from dynllava_jax.config.groups import GROUPS, STORED_ALONG, idle
from dynllava_jax.data.batches import Batch
from dynllava_jax.losses import count, training_losses
from dynllava_jax.methods.training import Drawn, Shape
from dynllava_jax.models import trained
from dynllava_jax.models.batch import TrainInputs
from dynllava_jax.models.dynllava import DynLlava, Prompt
from dynllava_jax.models.lora import ADAPTERS, abstract_adapters, as_variables
from dynllava_jax.models.matrices import SCALES, abstract_scales
from dynllava_jax.models.params import abstract_params, cut_params
from dynllava_jax.ops.images import normalize
from dynllava_jax.training.freezing import check_paths, joined, split_frozen
from dynllava_jax.training.precision import in_float32, moments_in, store

EMBEDDINGS = ('embedding', 'class_embedding', 'position_embedding')
ROUNDING, DROPOUT = range(2**31, 2**31 + 2)  # what the keys for these are made with
WINDOW = 64  # good steps that a spike is told by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What changes from step to step.

  `params`: the trained groups, cut for the run's stages; `watch`: what bad steps are told by (`new_watch`), None if nobody asks.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: Any
  watch: dict[str, jax.Array] | None = None


def schedule(peak: float, steps: int, cfg: OptimizerConfig) -> optax.Schedule:
  """Linear warm-up over `warmup_share` of the steps, then cosine to 0."""
  warmup = max(1, round(cfg.warmup_share * steps))
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def new_watch(cfg: TrainConfig) -> dict[str, np.ndarray] | None:
  """`recent` float32[2, W]: loss and gradient norm of the last good steps; `skipped` int32. None if the run has no use for it."""
  if not cfg.spike and cfg.on_bad_step == 'stop':
    return None
  return {'recent': np.full((2, WINDOW), np.nan, np.float32), 'skipped': np.int32(0)}


def judge(
  watch: dict[str, jax.Array], loss: jax.Array, norm: jax.Array, cfg: TrainConfig
) -> tuple[dict[str, jax.Array], jax.Array]:
  """(the next `watch`, bool: the step is bad): no number, or far above the median of the window once that is full."""
  now, recent = jnp.stack([loss, norm]).astype(jnp.float32), watch['recent']
  bad = ~jnp.isfinite(now).all()
  if cfg.spike:
    bad |= (now > cfg.spike * jnp.median(recent, 1)).any()  # a median with NaN is one, and nothing is above that
  recent = jnp.where(bad, recent, jnp.roll(recent, -1, 1).at[:, -1].set(now))
  return {'recent': recent, 'skipped': watch['skipped'] + bad}, bad


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """One learning rate for what methods bring and one for everything else, gradients clipped together, all of it in float32."""
  decayed = functools.partial(decays, embeddings=cfg.decay_embeddings) if cfg.weight_decay else None

  def rule(peak):
    if cfg.name == 'adamw':
      return optax.adamw(schedule(peak, steps, cfg), b2=cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
    return optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(cfg.weight_decay, decayed),
      optax.scale_by_learning_rate(schedule(peak, steps, cfg)),
    )

  def label(params):
    return {group: GROUPS[group].rate if group in GROUPS else 'model' for group in params}

  groups = {'model': rule(cfg.learning_rate), 'predictor': rule(cfg.predictor_learning_rate)}
  optimizer = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), optax.multi_transform(groups, label))
  if cfg.moment_dtype != 'float32':
    optimizer = moments_in(jnp.dtype(cfg.moment_dtype), optimizer)
  return in_float32(optimizer)


def decays(params: Any, embeddings: bool) -> Any:
  """Which parameters weight decay is for, as a tree of bools: all but norms and biases, and `embeddings` if they are to be."""

  def decayed(path, _):
    name = path[-1].key
    return not (name == 'scale' or name.endswith('bias') or (name in EMBEDDINGS and not embeddings))

  return jax.tree_util.tree_map_with_path(decayed, params)


def unused(cfg: TrainConfig) -> tuple[str, ...]:
  """Groups that the run has no use for; an export needs them."""
  return (*STORED_ALONG, *idle(cfg.stages))


def state_shardings(cfg: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
  """Where each leaf of the state lives; optimiser moments lie with their parameters. ConfigError as for `check_paths`."""
  every = cut_abstract(cfg)
  check_paths(cfg, every)
  boxed, _ = split_frozen(every, cfg.held, cfg.only)
  params = sharding.shardings(boxed, mesh)
  whole = sharding.replicated(mesh)
  by_path = dict(jax.tree_util.tree_leaves_with_path(params))

  shapes = sharding.unboxed(boxed)
  shape_of = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}

  def like_its_parameter(path, leaf):
    # A moment's path ends in its parameter's path; counters match none, sums of rows and columns have another shape.
    own = next((path[i:] for i in range(len(path)) if path[i:] in by_path), None)
    return by_path[own] if shape_of.get(own) == leaf.shape else whole

  opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, jax.eval_shape(optimizer.init, shapes))
  return State(whole, params, opt_state, jax.tree.map(lambda _: whole, new_watch(cfg)))


def cut_abstract(cfg: TrainConfig) -> dict[str, Any]:
  """Shapes and axis names of the parameters that the run uses, cut for its stages."""
  return dict(_cut_abstract(cfg.model, cfg.stages, cfg.lora, unused(cfg)))


@functools.lru_cache(maxsize=1)
def _cut_abstract(model: ModelConfig, stages: tuple[Stage, ...], lora: LoraConfig | None, left_out: tuple[str, ...]):
  used = {k: v for k, v in abstract_params(model).items() if k not in left_out}
  if lora:
    used[ADAPTERS] = abstract_adapters(model.llama, lora)
    if lora.base == 'int8':
      used[SCALES] = abstract_scales(model.llama)
  return jax.eval_shape(lambda p: cut_params(p, stages), used)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
  """uint32[rows, 2]: data of one key per row."""
  return jax.random.key_data(jax.random.split(key, rows))


def as_prompt(batch: Batch) -> Prompt:
  """What the model sees of a batch."""
  return Prompt(batch.tokens, batch.length, batch.image_start, batch.seed, batch.instruct_start)


def train_inputs(batch: Batch, drawn: dict[str, Drawn]) -> TrainInputs:
  """What training knows of it besides."""
  return TrainInputs(batch.answer_start, batch.labels, drawn)


def gradients(loss_fn, params: Any, inputs: Any, parts: int, mesh: Mesh, places: Any) -> tuple[Any, Any]:
  """(what `loss_fn` tells, its gradients), summed over `parts` parts of the rows, one part in memory at a time.

  Args:
    loss_fn: (params, *inputs) -> (scalar, tree of scalars); those of the parts must add up to those of the batch.
    params, places: the trained parameters and their shardings.
    inputs: tree of arrays [B, ...]; each device splits its own rows.
  """
  gradient = jax.value_and_grad(loss_fn, has_aux=True)
  if parts == 1:
    (_, told), grads = gradient(params, *inputs)
    return told, grads

  def add(total, part):
    (_, told), grads = gradient(params, *part)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (told, grads)), None

  parted = sharding.split_rows(inputs, parts, mesh)
  (_, told), _ = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], parted))
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
  start = zeros(told), jax.lax.with_sharding_constraint(zeros(params), places)
  return jax.lax.scan(add, start, parted)[0]


def make_train_step(cfg: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
  """Compiles (state, frozen, batch) -> (state, metrics); the state is donated.

  The random numbers of a step follow from (cfg.seed, step) alone. Metrics are float32 scalars by name.
  """
  methods.check_training(cfg.stages, bool(cfg.lora))
  parts, objective = trained.parts(cfg.model, cfg.stages), cfg.objective
  model = DynLlava(cfg.model, cfg.stages, jnp.dtype(cfg.dtype), cfg.remat, cfg.reducer)
  num_image = methods.num_image_tokens(cfg.model, cfg.reducer)
  places = state_shardings(cfg, optimizer, mesh)

  def step_fn(state: State, frozen: dict[str, Any], batch: Batch):
    rows, positions = batch.tokens.shape
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    shape = Shape(rows, positions, num_image, cfg.model)
    drawn = {part.name: part.draw(key, shape, state.step / cfg.steps, objective) for part in parts}
    told = {name: value for d in drawn.values() for name, value in d.told.items()}
    counts = count(as_prompt(batch), train_inputs(batch, drawn), objective, parts, cfg.accumulate)

    def loss_fn(params, batch, by_row, dropout):
      variables, prompt = as_variables(joined(params, frozen), cfg.lora, cfg.stages, dropout), as_prompt(batch)
      image = model.apply(variables, normalize(batch.pixels, cfg.model.vision), method='encode_images')
      of_rows = {name: dataclasses.replace(d, **by_row[name]) for name, d in drawn.items()}
      inputs = train_inputs(batch, of_rows)
      out = model.apply(variables, prompt, image, inputs, objective, method='train_forward')
      losses = training_losses(out, prompt, inputs, objective, parts, counts)
      return losses.total, losses

    by_row = {name: dict(noise=d.noise, dense=d.dense) for name, d in drawn.items()}
    inputs = (batch, by_row, row_keys(jax.random.fold_in(key, DROPOUT), rows) if cfg.lora and cfg.lora.dropout else None)
    losses, grads = gradients(loss_fn, state.params, inputs, cfg.accumulate, mesh, places.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      'loss': losses.total,
      'ce': losses.ce,
      'grad_norm': optax.tree.norm(grads),
      **{f'grad_norm/{group}': optax.tree.norm(tree) for group, tree in grads.items()},
      **{f'update_norm/{group}': optax.tree.norm(tree) for group, tree in updates.items()},
      'learning_rate': schedule(cfg.optimizer.learning_rate, cfg.steps, cfg.optimizer)(state.step),
      'supervised_tokens': (batch.labels[:, 1:] != IGNORE).sum().astype(jnp.float32),
    }
    if any(GROUPS[group].rate == 'predictor' for group in state.params if group in GROUPS):
      rate = schedule(cfg.optimizer.predictor_learning_rate, cfg.steps, cfg.optimizer)(state.step)
      metrics |= {'predictor_learning_rate': rate}
    metrics |= losses.shown | told
    moved = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, state.params, updates)
    params, watch = store(jax.random.fold_in(key, ROUNDING), moved, state.params), state.watch
    if watch:
      watch, bad = judge(watch, losses.total, metrics['grad_norm'], cfg)
      metrics |= {'bad_step': bad.astype(jnp.float32), 'skipped_steps': watch['skipped'].astype(jnp.float32)}
      if cfg.on_bad_step == 'skip':
        unmoved = lambda new, old: jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)
        params, opt_state = unmoved(params, state.params), unmoved(opt_state, state.opt_state)
    return State(state.step + 1, params, opt_state, watch), metrics

  frozen_boxed = split_frozen(cut_abstract(cfg), cfg.held, cfg.only)[1]
  return jax.jit(
    step_fn,
    donate_argnums=0,
    in_shardings=(places, sharding.shardings(frozen_boxed, mesh), sharding.batch_sharding(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
  )
