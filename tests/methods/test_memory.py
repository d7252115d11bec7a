"""Memory tokens: the record of ICAE and wrong builds of it, segments, slots of images in any batch and in either arrangement."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax import costs, methods, presets
from dynllava_jax.config import ConfigError, MemoryConfig, Piece, Stage
from dynllava_jax.convert.records import icae as records
from dynllava_jax.convert.records.bases import open_record
from dynllava_jax.convert.tables import memory_rules
from dynllava_jax.generate import Generator
from dynllava_jax.methods import icae
from dynllava_jax.models import memory
from dynllava_jax.models.batch import Prompt
from dynllava_jax.models.groups import init_groups

MEMORY = MemoryConfig(slots=2, rate=4, rank=4, alpha=8.0, targets=('q', 'k', 'v', 'o', 'down'))
CFG = dataclasses.replace(presets.TINY, memory=MEMORY)
P, D = CFG.vision.num_patches, CFG.llama.hidden_size
REDUCER = Piece('icae')


@pytest.fixture(scope='module')
def record():
  return open_record(GOLDEN / 'methods' / 'icae', None)


@pytest.mark.slow
def test_every_recorded_quantity_agrees(record):
  """What `--verify` does."""
  found = list(records.verify(record))
  assert [str(q) for q in found if not q.ok] == []
  compared = {q.name.rpartition(': ')[2] for q in found}
  assert [k for k in record.case if k not in compared and not k.endswith(('_ids', '/labels'))] == []


def without_scale(patch):
  original = records.model_of
  unscaled = lambda model: dataclasses.replace(model, memory=dataclasses.replace(model.memory, alpha=float(model.memory.rank)))
  patch.setattr(records, 'model_of', lambda record: unscaled(original(record)))


def full_segments(patch):
  """16 + 10 tokens, as many as a segment holds, instead of 13 + 13."""
  size = lambda m: m.slots * m.rate
  patch.setattr(icae, 'segments', lambda n, m: [range(i, min(i + size(m), n)) for i in range(0, n, size(m))])


def adapter_off(patch):
  patch.setattr(memory, 'adapters', lambda model: {})


SLOW = [pytest.param(wrong, marks=pytest.mark.slow) for wrong in (without_scale, full_segments, adapter_off)]


@pytest.mark.parametrize('wrong', [None, *SLOW])
def test_slots_and_wrong_builds_of_them(record, wrong, monkeypatch):
  if wrong:
    wrong(monkeypatch)
  model = records.model_of(record)
  params = records.text_decoder.params_of(record, model)
  context = records.context_of(record, model)[None]
  found = records.filled(records.DynLlava(model), records.cut_params(params, (Stage(),)), context)[0]
  same = found.shape == record.array('slots').shape and np.abs(found - record.array('slots')).max() < 1e-4
  assert same == (wrong is None)


def test_segments_are_as_few_as_the_rate_allows_and_alike():
  lengths = lambda n: [len(part) for part in icae.segments(n, MemoryConfig(slots=4, rate=4))]
  assert lengths(16) == [16] and lengths(26) == [13, 13] and lengths(33) == [11, 11, 11] and lengths(35) == [12, 12, 11]
  assert [i for part in icae.segments(35, MemoryConfig(slots=4, rate=4)) for i in part] == list(range(35))
  assert [len(p) for p in icae.segments(576, MemoryConfig())] == [288, 288]


@pytest.fixture(scope='module')
def params(tiny_params):
  own = init_groups(CFG, ('memory', 'memory_adapter'), jax.random.key(5))
  layers = {name.replace('stage_0', 'layers'): rows for name, rows in own['memory_adapter'].items()}
  layers = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(6), x.shape), layers)  # B is zero in the beginning
  return tiny_params | {'memory': own['memory'], 'memory_adapter': layers}


@pytest.mark.slow
def test_rows_with_and_without_image_alone_and_together(params):
  """Slots of a row do not depend on its neighbours; a row without image is what it is without the reducer; no cache, the same."""
  generator = Generator(CFG, (Stage(),), params, max_new_tokens=5, eos_id=None, reducer=REDUCER)
  more = methods.num_image_tokens(CFG, REDUCER)
  assert more == len(icae.segments(P, MEMORY)) * 2 + 1
  rng, rows = np.random.default_rng(0), ((7, 2), (5, -1), (6, 0))
  tokens = rng.integers(3, CFG.llama.vocab_size, (3, 8 + more)).astype(np.int32)
  lengths = np.asarray([n + (more if at >= 0 else 0) for n, at in rows], np.int32)
  prompt = Prompt(tokens, lengths, np.asarray([at for _, at in rows], np.int32), np.zeros(3, np.uint32))
  pixels = rng.integers(0, 256, (3, CFG.vision.image_size, CFG.vision.image_size, 3)).astype(np.uint8)
  together = jax.device_get(generator(prompt, pixels))
  np.testing.assert_array_equal(jax.device_get(generator.generate_uncached(prompt, pixels)).tokens, together.tokens)
  for row in range(3):
    one = jax.tree.map(lambda x, row=row: x[row : row + 1], prompt)
    np.testing.assert_array_equal(jax.device_get(generator(one, pixels[row : row + 1])).tokens[0], together.tokens[row])
  plain = {k: v for k, v in params.items() if not k.startswith('memory')}
  dense = Generator(presets.TINY, (Stage(),), plain, max_new_tokens=5, eos_id=None)
  wide = dataclasses.replace(jax.tree.map(lambda x: x[1:2], prompt), tokens=np.pad(tokens[1:2], [(0, 0), (0, P - more)]))
  np.testing.assert_array_equal(jax.device_get(dense(wide, pixels[1:2])).tokens[0], together.tokens[1])
  assert (together.kept_image[0] == -1).all()


def test_names_of_every_matrix_fit_its_shape():
  """The rules of all targets, there and back."""
  cfg = dataclasses.replace(CFG, memory=dataclasses.replace(MEMORY, targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down')))
  leaves, llama = memory.adapter_leaves(cfg), cfg.llama
  inputs = {'o': llama.num_heads * llama.head_dim, 'down': llama.mlp_dim}
  for rule in memory_rules(cfg.memory)[1:]:
    name, shape = rule.path[-1], leaves[rule.path[-1]].shape
    torch = rule.transform.torch_shape(shape)
    assert torch[0 if name.endswith('_a') else 1] == MEMORY.rank
    if name.endswith('_a'):
      assert torch[1] == inputs.get(name[:-2], D)
    x = np.random.default_rng(1).random(torch)
    np.testing.assert_array_equal(rule.transform.invert(rule.transform.apply(x, shape)), x)


def test_what_is_refused():
  with pytest.raises(ConfigError, match='the model has no memory tokens'):
    methods.check_run(presets.TINY, (Stage(),), REDUCER)
  with pytest.raises(ConfigError, match='expected one of ae, lm, ft'):
    methods.check_run(CFG, (Stage(),), Piece('icae', {'task': 'qa'}))
  with pytest.raises(ConfigError, match='each once'):
    MemoryConfig(targets=('q', 'q'))


def test_the_second_pass_is_counted():
  """Of one segment: all layers over its tokens and the memory tokens, and the adapter's products."""
  cfg = dataclasses.replace(CFG, memory=MemoryConfig(slots=P, rate=4, rank=4, targets=('q',)))
  llama, rows = cfg.llama, 2 * P
  plain = llama.num_layers * costs.layer_flops(cfg, rows, rows * (rows + 1) / 2)
  adapter = llama.num_layers * 2 * rows * 4 * (D + llama.num_heads * llama.head_dim)
  assert icae.flops(cfg, icae.Options()) == pytest.approx(plain + adapter, rel=0.02)
