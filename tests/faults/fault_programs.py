"""The command lines that the fault tests run, what counts of what they write, and what is finished for good while they run."""

import json
import shutil

import tensorstore
from conftest import GOLDEN
from fault_driver import Program, tree
from PIL import Image

from dynllava_jax import checkpoint
from dynllava_jax.training.metrics import read_metrics

SOURCE = GOLDEN / 'public_b' / 'checkpoint'
TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'
LOGGED = ('step', 'loss', 'grad_norm', 'learning_rate')  # the others tell of time and memory, or follow from these
MEASURED = ('seconds', 'compiled')  # parts of the names of what differs from time to time
TINY = """
from ml_collections import config_dict

VISION = dict(image_size=28, patch_size=14, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2)
LLAMA = dict(vocab_size=430, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2, num_kv_heads=2)

def get_config(name):
  if name == 'eval':
    runs = dict(dense=dict(stages=[dict(start=0)]), uniform=dict(stages=[dict(start=0), dict(start=1, selector='uniform')]))
    return config_dict.ConfigDict(dict(benchmark='digits', runs=runs, batch_size=2, questions=8, max_new_tokens=4))
  data = dict(source='digits', path='', tokenizer='', text_length=104)
  evals = dict(asked=dict(every=5, questions=4, batch_size=2, max_new_tokens=4, text_lengths=(32,)))
  sizes = dict(batch_size=2, steps=5, log_every=1, save_every=1)
  return config_dict.ConfigDict(dict(model=dict(vision=VISION, llama=LLAMA), data=data, evals=evals, init_from='', **sizes))
"""


def tiny_config(folder):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tiny.py').write_text(TINY)
  return folder / 'tiny.py'


def database(step_dir):
  """Everything in the databases of a step, by name: structure and numbers, to the last bit."""
  out = {}
  for part in ('params', 'optimizer'):
    base = {'driver': 'file', 'path': f'{step_dir / part}/'}
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
    out |= {f'{part}/{key.decode()}': store.read(key).result().value for key in store.list().result()}
  return out


def trained(workdir):
  """The newest step's arrays, which steps there are, what was logged but for the time, evaluations, and the descriptions."""
  folder = workdir / 'checkpoints'
  steps = checkpoint.all_steps(folder)
  out = database(folder / str(steps[-1])) | {'steps': steps}
  kept = lambda name: name in LOGGED or name.startswith('eval/')
  out['metrics'] = [{k: v for k, v in line.items() if kept(k)} for line in read_metrics(workdir)]
  out['answers'] = {p.relative_to(workdir).as_posix(): p.read_text() for p in workdir.glob('evals/*/*/answers.jsonl')}
  out['model.json'] = checkpoint.read_description(folder)
  run = json.loads((workdir / 'run.json').read_text())
  return out | {'run.json': {k: run[k] for k in ('settings', 'inputs', 'saved', 'history')}}


def newest_step(workdir):
  """The newest step that has its name, which only a sealed one gets."""
  steps = checkpoint.all_steps(workdir / 'checkpoints')
  assert all((workdir / 'checkpoints' / str(s) / checkpoint.INTEGRITY_FILE).exists() for s in steps[-1:])
  return max(steps, default=0)


def training(config):
  return Program(lambda workdir: ('train.py', f'--config={config}:base', f'--workdir={workdir}'), trained, newest_step)


def rows(out):
  """Answers that are on disk, by run."""
  found = {}
  for file in sorted((out / 'answers').glob('*.jsonl')):
    if 'previous' not in file.name:
      found[file.name] = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]
  return found


def evaluated(out):
  """All answers, and the scores but for the time they took."""
  scores = json.loads((out / 'results.json').read_text())
  for run in scores['runs'].values():
    for name in [n for n in run if any(m in n for m in MEASURED)]:
      del run[name]
  return rows(out) | {'results.json': scores | {'checkpoint': ''}}


def answered(out):
  """Answers that are finished; they stay."""
  return {(name, line) for name, lines in rows(out).items() for line in lines}


def evaluation(config, checkpoints):
  words = lambda out: ('eval.py', f'--config={config}:eval', f'--checkpoint={checkpoints}', f'--out={out}')
  return Program(words, evaluated, answered)


def make_samples(folder):
  """Twelve samples with three pictures, and a tokenizer."""
  folder.mkdir()
  for number, colour in enumerate(('red', 'green', 'blue')):
    Image.new('RGB', (40 + number, 30), colour).save(folder / f'{number}.png')
  turns = lambda i: [{'from': 'human', 'value': f'<image>\nWhat is it, {i}?'}, {'from': 'gpt', 'value': f'A bus {i}.'}]
  samples = [{'id': f's{i}', 'image': f'{i % 3}.png', 'conversations': turns(i)} for i in range(12)]
  (folder / 'mix.json').write_text(json.dumps(samples))
  shutil.copytree(TOKENIZER, folder / 'tok')
  return folder


def preparation(source):
  words = ['-m', 'dynllava_jax.data.prepare', f'--json={source}/mix.json', f'--images={source}', f'--tokenizer={source}/tok']
  words += ['--text_length=104', '--shard_samples=3', '--processes=1', '--conversation=plain_turns']
  return Program(lambda out: (*words, f'--out={out}'), tree, lambda out: {p.name for p in out.glob('*array_record-*-of-00004')})


def converted(folder):
  """All of a conversion but when it was made."""
  return tree(folder, lambda name: name.endswith(('_CHECKPOINT_METADATA', 'commit_success.txt')))


def exported(folder):
  """All of an export; the config names the folder of the tower."""
  found = tree(folder)
  found['config.json'] = json.loads(found['config.json']) | {'mm_vision_tower': ''}
  return found


def whole_or_nothing(folder):
  """Whether a checkpoint is at a name, or beside it, where one lies between the two renames that replace it; then it stays."""
  places = (folder, folder.with_name(f'.{folder.name}.old'))
  return int(any((p / name).exists() for p in places for name in ('model.json', 'config.json')))


def conversion(source=SOURCE):
  words = lambda dst: ('convert_weights.py', f'--src={source}', f'--dst={dst}', '--overwrite')
  return Program(words, converted, whole_or_nothing, lambda dst: dst.parent)


def export(source):
  words = lambda dst: ('convert_weights.py', f'--src={source}', f'--dst={dst}', '--export=dynamic-llava', '--overwrite')
  return Program(words, exported, whole_or_nothing, lambda dst: dst.parent)
