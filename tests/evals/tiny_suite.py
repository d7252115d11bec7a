"""A tiny random checkpoint with a real tokenizer, a few rows of every benchmark in LLaVA's layout."""

import base64
import csv
import io
import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from orbax.checkpoint import v1 as ocp
from PIL import Image

from dynllava_jax import checkpoint, sharding
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import LlamaConfig, ModelConfig, PredictorConfig, Stage, VisionConfig
from dynllava_jax.data.tokenizer import read_files
from dynllava_jax.evals import forced, runner
from dynllava_jax.evals.benchmarks.base import LETTER, UNANSWERABLE, WORD
from dynllava_jax.evals.benchmarks.mme import CATEGORIES
from dynllava_jax.evals.benchmarks.pope import CATEGORIES as POPE_CATEGORIES
from dynllava_jax.generate import Generator
from dynllava_jax.models.params import abstract_params

MODEL = ModelConfig(
  vision=VisionConfig(image_size=56, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2),
  llama=LlamaConfig(vocab_size=1800, hidden_size=16, mlp_dim=16, num_layers=2, num_heads=2, num_kv_heads=2),
  predictor=PredictorConfig(d_model=16, num_heads=2, num_layers=1, mlp_dim=16),
)
DYNAMIC = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.25))


@pytest.fixture(scope='session')
def tiny_checkpoint(tmp_path_factory):
  directory = tmp_path_factory.mktemp('checkpoint')
  rng = np.random.default_rng(3)  # not init_params: compiling the initialisers takes longer than all the rest
  shapes = sharding.unboxed(abstract_params(MODEL))
  params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
  checkpoint.write_info(directory, CheckpointInfo(model=MODEL, stages=DYNAMIC), read_files(GOLDEN / 'text' / 'tok_nonlegacy'))
  ocp.save_checkpointables(directory / '1', {'params': params})
  checkpoint.seal(directory / '1')
  return directory


@pytest.fixture(scope='session')
def compiled():
  """Generators by what they were made with."""
  return {}


@pytest.fixture
def small_machine(monkeypatch, compiled):
  """One device, and what was compiled for one benchmark serves the next: all run programs of the same shapes."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'))
  monkeypatch.setattr(sharding, 'make_mesh', lambda cfg: mesh)

  def make(cfg, stages, params, **options):
    key = (cfg, stages, *options.items())
    if key not in compiled:
      compiled[key] = Generator(cfg, stages, params, **options)
    return compiled[key]

  for module in (runner, forced):
    monkeypatch.setattr(module, 'Generator', make)


def picture(seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, 'PNG')
  return content.getvalue()


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif isinstance(content, str):
    path.write_text(content)
  elif path.suffix == '.jsonl' or path.name.startswith('coco_pope'):
    path.write_text(''.join(json.dumps(row) + '\n' for row in content))
  else:
    path.write_text(json.dumps(content))


@pytest.fixture(scope='session')
def eval_data(tmp_path_factory):
  """A folder laid out as `playground/data/eval`, three questions or so for each benchmark."""
  root = tmp_path_factory.mktemp('eval')
  ask = lambda i: f'Is there a dog {i}?'
  three = range(3)
  for i in three:
    folders = ('vqav2/test2015', 'gqa/data/images', 'vizwiz/test', 'vizwiz/val', 'scienceqa/images/test', 'textvqa/train_images')
    more = ('pope/val2014', 'seed_bench/SEED-Bench-image', 'llava-bench-in-the-wild/images', 'mm-vet/images')
    for folder in (*folders, *more, 'lvis_vqa/images', 'sharegpt4v_vqa/images'):
      write(root / folder / f'{i}.png', picture(i))
    write(root / 'vqav2/val2014' / f'COCO_val2014_{i:012}.jpg', picture(i))
  word = [{'question_id': i, 'image': f'{i}.png', 'text': f'{ask(i)}\n{WORD}', 'category': 'x'} for i in three]
  ten = lambda answer: [{'answer': answer}] * 10
  write(root / 'vqav2/llava_vqav2_mscoco_test-dev2015.jsonl', word)
  write(root / 'vqav2/llava_vqav2_mscoco_test2015.jsonl', [*word, word[0] | {'question_id': 99}])
  questions = [{'question_id': i, 'image_id': i, 'question': ask(i)} for i in three]
  write(root / 'vqav2/v2_OpenEnded_mscoco_val2014_questions.json', {'questions': questions})
  labels = [{'question_id': i, 'image_id': i, 'answer_type': 'yes/no', 'answers': ten('yes')} for i in three]
  write(root / 'vqav2/v2_mscoco_val2014_annotations.json', {'annotations': labels})
  write(root / 'gqa/llava_gqa_testdev_balanced.jsonl', [q | {'question_id': f'2{q["question_id"]}'} for q in word])
  kind = lambda i: {'structural': 'verify' if i else 'query'}
  gqa = {f'2{i}': {'question': ask(i), 'answer': 'yes', 'imageId': str(i), 'types': kind(i)} for i in three}
  write(root / 'gqa/data/testdev_balanced_questions.json', gqa)
  write(root / 'vizwiz/llava_test.jsonl', [q | {'text': f'{ask(q["question_id"])}\n{UNANSWERABLE}\n{WORD}'} for q in word])
  write(root / 'vizwiz/val.json', [{'image': f'{i}.png', 'question': ask(i), 'answers': ten('no')} for i in three])
  sqa = []
  for i in three:
    turns = [{'from': 'human', 'value': f'{ask(i)}\nA. x\nB. y'}, {'from': 'gpt', 'value': 'The answer is B.'}]
    sqa.append({'id': str(i), 'conversations': turns} | ({'image': f'{i}.png'} if i else {}))
  write(root / 'scienceqa/llava_test_CQM-A.json', sqa)
  ocr = [f'{ask(i)}\nReference OCR token: A, B\n{WORD}' for i in three]
  text = [{'question_id': '0', 'image': '0.png', 'text': t, 'category': 'default'} for t in ocr]  # one image, three questions
  write(root / 'textvqa/llava_textvqa_val_v051_ocr.jsonl', text)
  labels = [{'image_id': '0', 'question': ask(i), 'answers': ['yes'] * 10} for i in three]
  write(root / 'textvqa/TextVQA_0.5.1_val.json', {'data': labels})
  pope = []
  for c, category in enumerate(POPE_CATEGORIES):
    for i in three:
      pope.append(word[i] | {'question_id': 10 * c + i, 'category': category})
    labels = [{'question_id': i, 'image': f'{i}.png', 'text': ask(i), 'label': ('yes', 'no')[i % 2]} for i in three]
    write(root / f'pope/coco/coco_pope_{category}.json', labels)
  write(root / 'pope/llava_pope_test.jsonl', pope)
  mme = []
  release = root / 'MME/MME_Benchmark_release_version'
  for c, category in enumerate(CATEGORIES):
    nested = category in ('artwork', 'posters')
    image = f'{category}/images/7.png' if nested else f'{category}/7.png'
    write(release / image, picture(c))
    pair = ''.join(f'Is it {x}? Please answer yes or no.\t{a}\n' for x, a in (('red', 'Yes'), ('blue', 'No')))
    write(release / category / ('questions_answers_YN/7.txt' if nested else '7.txt'), pair)
    mme += [{'question_id': image, 'image': image, 'text': f'Is it {x}?\n{WORD}', 'category': category} for x in ('red', 'blue')]
  write(root / 'MME/llava_mme.jsonl', mme)
  for folder, table in (('mmbench', 'mmbench_dev_20230712.tsv'), ('mmbench_cn', 'mmbench_dev_cn_20231003.tsv')):
    rows = io.StringIO()
    columns = ['index', 'question', 'hint', 'A', 'B', 'C', 'D', 'answer', 'category', 'image', 'source', 'l2-category', 'comment']
    writer = csv.DictWriter(rows, [*columns, 'split'], delimiter='\t', lineterminator='\n')
    writer.writeheader()
    for i in three:
      fixed = {'A': 'x', 'B': 'y', 'C': '' if i else 'z', 'hint': '' if i else 'Look.\nTwice.', 'answer': 'A', 'split': 'dev'}
      writer.writerow({'index': i, 'question': ask(i), 'image': base64.b64encode(picture(i)).decode()} | fixed)
    write(root / folder / table, rows.getvalue())
  letters = [q | {'text': f'{ask(i)}\nA. x\nB. y\n{LETTER}', 'image': f'SEED-Bench-image/{i}.png'} for i, q in enumerate(word)]
  seed = [*letters, letters[2]]  # the id that occurs twice
  write(root / 'seed_bench/llava-seed-bench.jsonl', [q | {'question_id': str(q['question_id'])} for q in seed])
  labels = [
    {
      'question_id': str(q['question_id']),
      'question_type_id': 1,
      'data_type': 'image',
      'data_id': q['image'],
      'answer': 'A',
      'question': ask(q['question_id']),
    }
    for q in seed
  ]
  write(root / 'seed_bench/SEED-Bench.json', {'question_type': {'Scene': 1}, 'questions': labels})
  write(root / 'llava-bench-in-the-wild/questions.jsonl', [q | {'text': 'Describe it.'} for q in word])
  write(root / 'mm-vet/llava-mm-vet.jsonl', [q | {'text': f'What is {q["question_id"]}?'} for q in word])
  single = [{'id': i, 'image': f'{i}.png', 'question': '<image>\nDescribe it.', 'answer': f'A dog {i}.'} for i in three]
  write(root / 'lvis_vqa/lvis_vqa_single_round.json', single)
  write(root / 'sharegpt4v_vqa/sharegpt4v_vqa_single_round.json', single)
  rounds = [
    {'id': i, 'image': f'{i}.png', 'question': ['<image>\nWhat?', 'Why?'], 'answer': ['A dog.', 'It is fast.']} for i in (0, 1)
  ]
  rounds.append(rounds[0] | {'id': 2, 'question': ['<image>\nWho?'], 'answer': ['The man.']})
  write(root / 'lvis_vqa/lvis_vqa_multi_round.json', rounds)
  return root
