"""Recomputes what was recorded of MoE-LLaVA: gating, a training step with its gradients, inference, and a dense model upcycled.

The record has text alone, and the weights of its decoder with it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import presets
from dynllava_jax.arrangement import APART, STACKED, Arrangement
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import DENSE, IGNORE, ExpertsConfig, ExpertsTraining, LlamaConfig, ModelConfig, Objective, from_config_dict
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.records.base import EXACT, LOGITS, LOSS, Quantity, compare, in_range, load_case, prompt_from_ids
from dynllava_jax.convert.records.bases import Record
from dynllava_jax.convert.records.described import NUMBER, WHOLE, WHOLES
from dynllava_jax.convert.records.training import compare_gradients
from dynllava_jax.convert.tables import llava_rules
from dynllava_jax.losses import training_losses
from dynllava_jax.methods.training import Drawn
from dynllava_jax.models import trained, trained_experts
from dynllava_jax.models.batch import Prompt, TrainInputs, TrainOutput
from dynllava_jax.models.dynllava import DynLlava
from dynllava_jax.models.params import abstract_params, cut_params, join_params
from dynllava_jax.ops import experts
from dynllava_jax.sharding import unboxed

METHOD = 'MoE-LLaVA (arXiv 2401.15947)'
GATING, LAYER = 1e-6, 1e-5
WEIGHTS, DENSE_WEIGHTS = 'weights.npz', 'dense/'
TIGHT = 0.5  # factor at which the record's upcycled model loses tokens


def verify(record: Record, stacked: bool = True) -> Iterator[Quantity]:
  """Every quantity of the record; inference also with layers as training has them if `stacked`."""
  model, at = described(record), record.folder / WEIGHTS
  own = load_case(at)
  params = filled(model, own, at)
  yield from gating(record)
  yield from training(record, model, params)
  for name in sorted(key.split('/')[0] for key in record.case if key.endswith('/prompt')):
    for arrangement in (APART, STACKED) if stacked else (APART,):
      yield from inference(record, name, model, params, arrangement)
  yield from upcycled(record, model, own)


def described(record: Record) -> ModelConfig:
  """The recorded model; its tower is a stand-in that nothing runs."""
  told = lambda name, kind=WHOLE: record.setting('config', name, kind=kind)
  chosen = ExpertsConfig(layers=told('moe_layers', WHOLES), count=told('num_experts'), top_k=told('top_k'))
  llama = dict(
    vocab_size=told('vocab_size'),
    hidden_size=told('hidden_size'),
    mlp_dim=told('intermediate_size'),
    num_layers=told('num_hidden_layers'),
    num_heads=told('num_attention_heads'),
    num_kv_heads=told('num_attention_heads'),
    rms_norm_eps=told('rms_norm_eps', NUMBER),
    rope_theta=float(told('rope_theta', NUMBER)),
  )
  described = from_config_dict(LlamaConfig, llama, 'llama')
  return dataclasses.replace(presets.TINY, predictor=None, llama=dataclasses.replace(described, experts=chosen))


def filled(model: ModelConfig, own: Mapping[str, np.ndarray], at: pathlib.Path) -> dict[str, Any]:
  """The decoder of a record in checkpoint form, float32; ConversionError if the file `at` does not hold it."""
  params = {'llama': jax.tree.map(lambda x: np.zeros(x.shape, np.float32), unboxed(abstract_params(model)['llama']))}
  for rule in (r for r in llava_rules(model) if r.path[0] == 'llama'):
    leaf = params
    for name in rule.path:
      leaf = leaf[name]
    for key, index in rule.keys(len(leaf)):
      wanted = rule.transform.torch_shape(leaf[index].shape)
      if key not in own or own[key].shape != wanted:
        found = f'has shape {own[key].shape}' if key in own else 'is missing'
        raise ConversionError(f'{at}: tensor {key} {found}, the record describes {wanted}')
      leaf[index] = rule.transform.apply(own[key], leaf[index].shape)
  return jax.tree.map(jnp.asarray, params)


def dense_tokens(routes: experts.Routes, number: int) -> np.ndarray:
  """float32[N, E], how much each expert counts for each token."""
  return np.asarray((jax.nn.one_hot(routes.expert, number) * routes.weight[..., None]).sum(1))


def gating(record: Record) -> Iterator[Quantity]:
  """Choices, places, weights and balance of tokens by themselves."""
  logits = jnp.asarray(record.given('unit_top2/logits', (None, None)), jnp.float32)
  count, number = logits.shape
  for top_k, noise in ((2, 'gumbel'), (1, 'uniform')):
    at = f'unit_top{top_k}/'
    array = lambda name, at=at: record.array(at + name)
    found = experts.trained(logits, top_k, jnp.asarray(record.given(at + noise, logits.shape)), jnp.ones(count, bool), 1.0)
    yield compare(at + 'weights', dense_tokens(found, number), array('weights'), GATING)
    yield compare(at + 'capacity', found.capacity, array('capacity'), EXACT)
    yield compare(at + 'l_aux', found.balance, array('l_aux'), LOSS, relative=True)
    yield compare(at + 'first_choice_counts', np.asarray(found.load) * count, array('first_choice_counts'), 1e-4)
    if at + 'slot' in record.case:
      slots = np.full((count, number), -1)
      np.put_along_axis(slots, np.asarray(found.expert), np.asarray(found.place), 1)
      yield compare(at + 'slot', slots, array('slot'), EXACT)


def train_ids(record: Record, model: ModelConfig) -> np.ndarray:
  """int[B, S], the rows of the recorded step."""
  return in_range(record.at, 'train/ids', record.given('train/ids', (None, None), whole=True), 0, model.llama.vocab_size)


def step(
  model: ModelConfig, params: dict[str, Any], prompt: Prompt, labels: jax.Array, noise: jax.Array, objective: Objective
) -> tuple[Any, TrainOutput]:
  """(losses, what the forward pass gave) of a training step with this noise, float32[B, L, S, E]."""
  inputs = TrainInputs(prompt.length, labels, {trained_experts.NAME: Drawn(noise=noise)})
  image = jnp.zeros((len(labels), model.num_image_tokens, model.llama.hidden_size))
  out = DynLlava(model, DENSE).apply({'params': params}, prompt, image, inputs, objective, method='train_forward')
  return training_losses(out, prompt, inputs, objective, trained.parts(model, DENSE)), out


def recorded_noise(record: Record, model: ModelConfig) -> jax.Array:
  """float32[B, L, S, E]; none for layers without experts, nor for the padding behind the recorded rows."""
  batch, size = train_ids(record, model).shape
  noise = np.zeros((batch, model.llama.num_layers, size + model.num_image_tokens, model.llama.experts.count), np.float32)
  for layer in model.llama.experts.layers:
    drawn = record.given(f'train/gumbel_{layer}', (batch * size, model.llama.experts.count))
    noise[:, layer, :size] = drawn.reshape(batch, size, -1)
  return jnp.asarray(noise)


def padded_labels(record: Record, prompt: Prompt) -> jax.Array:
  """int32[B, S] for the rows of a prompt, which have padding behind."""
  labels = record.given('train/labels', record.array('train/ids').shape, whole=True)
  return jnp.asarray(np.pad(labels, [(0, 0), (0, prompt.tokens.shape[1] - labels.shape[1])], constant_values=IGNORE), jnp.int32)


def training(record: Record, model: ModelConfig, params: dict[str, Any]) -> Iterator[Quantity]:
  """A step: what each layer chose and lost, logits, losses, gradients."""
  array = lambda name: record.array(f'train/{name}')
  ids, cfg = train_ids(record, model), model.llama.experts
  told = lambda name: record.setting('config', name, kind=NUMBER)
  weighed = ExpertsTraining(capacity_factor=told('capacity_factor'), balance_weight=told('router_aux_loss_coef'))
  objective, prompt = Objective(experts=weighed), prompt_from_ids(ids, model.num_image_tokens)
  noise, labels = recorded_noise(record, model), padded_labels(record, prompt)

  def loss(params):
    losses, out = step(model, params, prompt, labels, noise, objective)
    return losses.total, (losses, out, out.logits)

  (total, (losses, out, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cut_params(params, DENSE))
  yield compare('train/capacity', experts.places(ids.size, cfg.count, cfg.top_k, weighed.capacity_factor), array('capacity'), EXACT)
  for i, layer in enumerate(cfg.layers):
    tokens = lambda name, i=i: out.seen[name][i][:, : ids.shape[1]].reshape(ids.size, -1)
    yield compare(f'train/router_logits_{layer}', tokens('expert_logits'), array(f'router_logits_{layer}'), LAYER)
    yield compare(f'train/weights_{layer}', tokens('expert_weights'), array(f'weights_{layer}'), LAYER)
    yield compare(f'train/l_aux_{layer}', out.seen['expert_balance'][i], array(f'l_aux_{layer}'), LOSS, relative=True)
  yield compare('train/logits', last_rows(logits, ids, array('logits')), array('logits'), LOGITS)
  yield compare('train/ce_loss', losses.ce, array('ce_loss'), LOSS, relative=True)
  aux = weighed.balance_weight * losses.shown['expert_balance']
  yield compare('train/aux_loss', aux, array('aux_loss'), LOSS, relative=True)
  yield compare('train/loss', total, array('loss'), LOSS, relative=True)
  yield from compare_gradients(model, record.at, record.case, 'train/grad/', join_params(gradients))


def last_rows(found: jax.Array, ids: np.ndarray, recorded: np.ndarray) -> jax.Array:
  """Of float[B, S, V] the last recorded positions in front of the padding."""
  return found[:, ids.shape[1] - recorded.shape[1] : ids.shape[1]]


def inference(
  record: Record, name: str, model: ModelConfig, params: dict[str, Any], arrangement: Arrangement
) -> Iterator[Quantity]:
  """Prompt and decoding of a row that has another, longer one beside it."""
  array = lambda key: record.array(f'{name}/{key}')
  ids_of = lambda key: in_range(record.at, key, record.given(key, (None,), whole=True), 0, model.llama.vocab_size)
  given, answer = ids_of(f'{name}/prompt'), ids_of(f'{name}/tokens')
  size, steps = len(given) + 3, len(answer)
  ids = np.stack([np.pad(given, (0, size - len(given))), (np.arange(size) * 7 + 3) % model.llama.vocab_size])
  prompt = prompt_from_ids(ids, model.num_image_tokens, np.arange(size) < np.array([[len(given)], [size]]))
  module, cut = DynLlava(model, DENSE, arrangement=arrangement), cut_params(params, DENSE, arrangement)
  image = jnp.zeros((2, model.num_image_tokens, model.llama.hidden_size))
  where = f'{"each layer apart" if arrangement.apart else "layers stacked"}: {name}/'

  def begin(module):
    hidden, traces, cache = module.prefill(prompt, image, CacheSpec(max_new_tokens=steps))
    return module.logits(hidden)[0], traces[0].of_layers, cache

  def feed(module, token, cache):
    hidden, cache, _ = module.extend(token, jnp.ones(2, jnp.int32), cache, judge=True)
    return module.logits(hidden)[0, 0], cache

  run = lambda method: jax.jit(lambda *args: module.apply({'params': cut}, *args, method=method))
  logits, (seen,), cache = run(begin)()
  yield compare(where + 'prompt_logits', logits[: len(given)], array('prompt_logits'), LOGITS)
  for i, layer in enumerate(model.llama.experts.layers):
    weights = seen['expert_weights'][i][0, : len(given)]
    yield compare(f'{where}weights_{layer}[prompt]', weights, array(f'weights_{layer}')[: len(given)], LAYER)
  found, feed = [logits[len(given) - 1]], run(feed)
  for token in answer[:-1]:
    now, cache = feed(jnp.full((2, 1), token, jnp.int32), cache)
    found.append(now)
  yield compare(where + 'logits', np.stack(found), array('logits'), LOGITS)
  yield compare(where + 'tokens', np.stack(found).argmax(-1), answer, EXACT)
  yield from fed_weights(record, name, where, model, params)


def fed_weights(record: Record, name: str, where: str, model: ModelConfig, params: dict[str, Any]) -> Iterator[Quantity]:
  """What counts for the fed tokens, in one pass over prompt and answer."""
  ids = np.concatenate([record.array(f'{name}/prompt'), record.array(f'{name}/tokens')[:-1]])[None]
  prompt, image = prompt_from_ids(ids, model.num_image_tokens), jnp.zeros((1, model.num_image_tokens, model.llama.hidden_size))
  whole = lambda m: m.prefill(prompt, image, CacheSpec(max_new_tokens=1))[1][0].of_layers
  (seen,) = jax.jit(lambda p: DynLlava(model, DENSE).apply({'params': p}, method=whole))(cut_params(params, DENSE))
  for i, layer in enumerate(model.llama.experts.layers):
    key = f'{name}/weights_{layer}'
    yield compare(f'{where.partition(":")[0]}: {key}', seen['expert_weights'][i][0, : ids.size], record.array(key), LAYER)


def upcycled(record: Record, model: ModelConfig, own: Mapping[str, np.ndarray]) -> Iterator[Quantity]:
  """Experts that are copies of a dense MLP: as dense without loss, and otherwise with little room."""
  told = {key.removeprefix(DENSE_WEIGHTS): value for key, value in own.items() if key.startswith(DENSE_WEIGHTS)}
  copies = dict(own)
  for key, value in told.items():
    layer, _, leaf = key.partition('.mlp.')
    copies |= {f'{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}.{leaf}': value for e in range(model.llama.experts.count)}
  plain = dataclasses.replace(model, llama=dataclasses.replace(model.llama, experts=None))
  ids = train_ids(record, model)
  prompt = prompt_from_ids(ids, model.num_image_tokens)
  image = jnp.zeros((len(prompt.tokens), model.num_image_tokens, model.llama.hidden_size))
  recorded, tight = (record.array(f'upcycle/{name}') for name in ('dense_logits', 'logits_tight_capacity'))

  def logits(module):
    return last_rows(module.logits(module.prefill(prompt, image, CacheSpec(max_new_tokens=1))[0]), ids, recorded)

  for name, cfg, weights in (('dense', plain, dict(own) | told), ('upcycled', model, copies)):
    cut = cut_params(filled(cfg, weights, record.folder / WEIGHTS), DENSE)
    found = jax.jit(lambda p, cfg=cfg: DynLlava(cfg, DENSE).apply({'params': p}, method=logits))(cut)
    yield compare(f'{name}: upcycle/dense_logits', found, recorded, LOGITS)
  objective = Objective(experts=ExpertsTraining(capacity_factor=TIGHT))
  labels, noise = padded_labels(record, prompt), recorded_noise(record, model)
  trained = jax.jit(lambda p: step(model, p, prompt, labels, noise, objective)[1].logits)(cut)
  yield compare('upcycle/logits_tight_capacity', last_rows(trained, ids, tight), tight, LOGITS)
