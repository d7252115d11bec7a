"""Every setting of a run that goes on: what may be another, what is refused, and what has no effect any more."""

import dataclasses
import pathlib

import pytest

from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointError
from dynllava_jax.config import ConfigError, TrainConfig, from_config_dict, to_dict
from dynllava_jax.data import digits
from dynllava_jax.training import record

WORKDIR = pathlib.Path('runs/w')
DENSE = {
  'model': {
    'vision': {'image_size': 28, 'hidden_size': 16, 'mlp_dim': 16, 'num_layers': 3, 'num_heads': 2},
    'projector': 'tokenpacker',
    'packer': {'scale_factor': 1, 'levels': (1,), 'num_heads': 2},
    'llama': {
      'vocab_size': 430,
      'hidden_size': 16,
      'mlp_dim': 16,
      'num_layers': 2,
      'num_heads': 4,
      'num_kv_heads': 2,
      'rope_scaling': {'kind': 'llama3', 'factor': 8.0},
    },
    'predictor': {'d_model': 16, 'num_heads': 2, 'num_layers': 1, 'mlp_dim': 16, 'instruct': True},
    'clip_text': {'vocab_size': 32, 'hidden_size': 16, 'mlp_dim': 16, 'num_layers': 2, 'num_heads': 2, 'end_id': 3},
    'relevance': {'width': 16},
    'pruning': {'dim': 16},
  },
  'reducer': {'name': 'fastervlm'},
  'init_from': 'base',
  'lora': {'rank': 4},
  'frozen': ('vision',),
}
# With what each does. A field that is neither here nor refused is a field about which nobody has decided.
MAY_CHANGE = {
  'mesh.data': 'the same numbers on other devices',
  'mesh.fsdp': 'the same numbers on other devices',
  'mesh.tensor': 'the same numbers on other devices',
  'mesh.expert': 'the same numbers on other devices',
  'mesh.slices': 'the same numbers on other devices',
  'accumulate': 'the same update in parts',
  'remat': 'the same gradients, other memory',
  'log_every': 'what is shown',
  'save_every': 'what is kept',
  'save_minutes': 'what is kept',
  'keep': 'what is kept',
  'keep_every': 'what is kept',
  'keep_best': 'what is kept',
  'keep_best_by': 'what is kept',
  'grace_seconds': 'what is kept',
  'evals': 'what is measured',
  'on_bad_step': 'what happens to a step that is no number',
  'spike': 'what happens to a step that stands out',
  'data.workers': 'who reads',
  'data.path': 'compared by content',
  'data.images': 'compared by content',
  'data.tokenizer': 'compared by content, or empty',
  'init_from': 'compared by content, or empty',
  'steps': 'of a dense run: more',
}
NONE = {  # of settings that are None in the run above
  'model.llama.experts': {'layers': (0,)},
  'model.routers': {'method': 'pmod'},
  'model.dpn': {'layers': (1,), 'kernels': ((2,),)},
  'model.memory': {'slots': 4},
  'model.exit_head': {},
}
WORDS = ('float32', 'bfloat16', 'int8', 'linear', 'llama3', 'adamw', 'adafactor', 'all', 'block', 'pad', 'square')
WORDS += ('error', 'skip', 'other', 'none', 'held', 'gumbel', 'mlp')


def leaves(settings, where=''):
  for name, value in settings.items():
    if isinstance(value, dict) and name not in ('reducer', 'evals'):
      yield from leaves(value, f'{where}{name}.')
    else:
      yield f'{where}{name}', value


def changed(settings, key, value):
  first, _, rest = key.partition('.')
  return settings | {first: changed(settings[first], rest, value) if rest else value}


def another(key, value):
  """A config that differs in one setting; what else must change along is said here."""
  whole = to_dict(from_config_dict(TrainConfig, DENSE))
  tries = {
    bool: [value is False],
    int: [value + 1, value - 1, value * 2] if type(value) is int else [],
    float: [x for x in (value / 2, value + 0.1, 0.3, 2.5) if x != value] if type(value) is float else [],
    str: [w for w in WORDS if w != value],
    tuple: [('projector',), (0.1, 0.2, 0.3), (2,), ('q',), (64,), ({'start': 0}, {'start': 1})],
    dict: [{'held': {'every': 2}}] if key == 'evals' else [None],
    type(None): [NONE.get(key)],
  }[type(value)]
  along = {
    'model.projector': {'model.packer': None},
    'model.llama.experts': {'lora': None},
    'data.tokenizer': {'init_from': '', 'lora': None},
    'keep_best': {'evals': {'held': {'every': 2}}},
    'keep_best_by': {'evals': {'held': {'every': 2}}},
  }.get(key, {})
  for new in tries:
    try:
      settings = changed(whole, key, new)
      for other, with_it in along.items():
        settings = changed(settings, other, with_it)
      cfg = from_config_dict(TrainConfig, settings)
    except ConfigError:
      continue
    return cfg, along
  raise AssertionError(f'{key}: no other value that a config may have is known here; add one to `tries`')


def started_with(settings, **inputs):
  return record.RunRecord(to_dict(from_config_dict(TrainConfig, settings)), inputs, {}, {}, 4)


KEYS = [key for key, _ in leaves(to_dict(from_config_dict(TrainConfig, DENSE)))]


@pytest.mark.parametrize('key', KEYS)
def test_every_setting_is_refused_or_is_one_that_may_change(key):
  cfg, along = another(key, dict(leaves(to_dict(from_config_dict(TrainConfig, DENSE))))[key])
  whole = to_dict(from_config_dict(TrainConfig, DENSE))
  for other, value in along.items():
    whole = changed(whole, other, value) if not other.startswith('model.') else whole
  started = started_with(whole)
  if key in MAY_CHANGE:
    record.check_same_run(cfg, started, WORKDIR, 4)
  else:
    with pytest.raises(ConfigError, match=r'config\..*: the run in runs/w was started with .*the config says .*go on with .* or'):
      record.check_same_run(cfg, started, WORKDIR, 4)


def test_the_list_names_fields_that_there_are():
  assert set(MAY_CHANGE) <= set(KEYS)
  known = {*record.MAY_CHANGE, *record.BEGAN_FROM, 'steps'}
  assert {k for k in KEYS if any(f'{k}.'.startswith(f'{n}.') for n in known)} == set(MAY_CHANGE)


BEGUN = {'model': DENSE['model'] | {'projector': 'linear', 'packer': None}, 'data': {'source': 'digits'}}


@pytest.fixture
def weights(monkeypatch):
  """Digests of checkpoints by their path; others cannot be read."""
  known = {'base': 'aa' * 32, 'copy': 'aa' * 32, 'other': 'bb' * 32}

  def weights_digest(path):
    if path not in known:
      raise CheckpointError(f'{path}: no checkpoint here')
    return known[path]

  monkeypatch.setattr(checkpoint, 'weights_digest', weights_digest)
  return known


def go_on(started, tokenizer=b'tokens', **settings):
  """The record of a run that goes on with these settings; ConfigError if it may not."""
  whole = changed(BEGUN, 'init_from', '') | {k: v for k, v in settings.items() if '.' not in k}
  for key, value in settings.items():
    whole = changed(whole, key, value) if '.' in key else whole
  cfg = from_config_dict(TrainConfig, whole)
  source = digits.TrainingScenes('train', 0, digits.FROM_NOTHING)
  found = record.inputs(cfg, source, {'tokenizer.model': tokenizer})
  if started is None:
    return record.begin(cfg, None, 0, found, {})
  record.check_same_inputs(cfg, started, found, WORKDIR)
  return record.begin(cfg, started, 4, found, {})


@pytest.mark.parametrize('given', ['base', 'copy', 'other', 'gone'])
@pytest.mark.parametrize('began', ['', 'base'])
def test_weights_named_on_resumption(began, given, weights):
  started = go_on(None, init_from=began)
  assert go_on(started, init_from='').settings['init_from'] == began, 'what a run began with stays noted'
  if began and given in ('base', 'copy'):
    assert go_on(started, init_from=given).settings['init_from'] == began
    return
  words = {'other': 'are not those|was started without', 'gone': 'cannot be read'}.get(given, 'was started without, .* no effect')
  with pytest.raises(ConfigError, match=f'config.init_from.*({words}).*leave (it|config.init_from) empty'):
    go_on(started, init_from=given)


def test_weights_that_are_gone_since_are_not_needed(weights):
  started = go_on(None, init_from='base')
  del weights['base']
  assert go_on(go_on(started, init_from='base'), init_from='base').inputs['base weights'] == 'aa' * 32


def test_tokenizer_named_on_resumption(tmp_path):
  folder = tmp_path / 'tokenizer'
  folder.mkdir()
  (folder / 'tokenizer.model').write_bytes(b'tokens')
  named = {'data.tokenizer': str(folder)}
  for started in (go_on(None, **named), go_on(None)):
    went_on = go_on(started, **named)
    assert went_on.settings['data']['tokenizer'] == started.settings['data']['tokenizer']
    go_on(started)  # it has its own
    with pytest.raises(ConfigError, match='config.data.tokenizer: .* cannot be read.*leave config.data.tokenizer empty'):
      go_on(started, **{'data.tokenizer': str(tmp_path / 'gone')})
  started = go_on(None, **named)
  (folder / 'tokenizer.model').write_bytes(b'others')
  with pytest.raises(ConfigError, match="the tokenizer's files in config.data.tokenizer=.* are not those"):
    go_on(started, **named)


def test_what_changed_is_noted():
  started = go_on(None)
  went_on = go_on(started, mesh={'fsdp': 2}, remat='block')
  assert went_on.history == ('step 4: mesh.fsdp 1 -> 2', "step 4: remat 'none' -> 'block'")
  assert went_on.settings['mesh']['fsdp'] == 2 and dataclasses.replace(went_on, history=()) != started


@pytest.mark.parametrize('before, now', [(None, 'cc' * 32), ('cc' * 32, None)])
def test_pictures_that_come_or_go(before, now):
  started = dataclasses.replace(go_on(None), inputs={'pictures': before} if before else {})
  started.settings['data']['images'] = 'photos' if before else ''
  cfg = from_config_dict(TrainConfig, changed(BEGUN, 'data', {'images': 'photos' if now else ''}))
  with pytest.raises(ConfigError, match='config.data.images.*(say where the pictures lie|none, now cccccccccccc)'):
    record.check_same_inputs(cfg, started, {'pictures': now} if now else {}, WORKDIR)
