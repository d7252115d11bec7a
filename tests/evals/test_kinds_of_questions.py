"""Questions that the product cannot be asked are refused by name, in every benchmark; a file of one's own is answered."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from answer_files import config, folder_of
from PIL import Image

from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import check, layout, report, score
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Question

pytest_plugins = ('tiny_suite',)


def changed(eval_data, tmp_path, file, change):
  """A copy of one benchmark's folder whose first question `change` was applied to."""
  top = file.split('/')[0]
  shutil.copytree(eval_data / top, tmp_path / top, dirs_exist_ok=True)
  path = tmp_path / file
  rows = (
    [json.loads(line) for line in path.read_text().split('\n') if line] if path.suffix == '.jsonl' else json.loads(path.read_text())
  )
  rows[0] = rows[0] | change
  path.write_text('\n'.join(map(json.dumps, rows)) if path.suffix == '.jsonl' else json.dumps(rows))
  return tmp_path


FILES = {
  'gqa': 'gqa/llava_gqa_testdev_balanced.jsonl',
  'mmvet': 'mm-vet/llava-mm-vet.jsonl',
  'seed': 'seed_bench/llava-seed-bench.jsonl',
  'scienceqa': 'scienceqa/llava_test_CQM-A.json',
  'lvis_multi': 'lvis_vqa/lvis_vqa_multi_round.json',
  'vizwiz_val': 'vizwiz/val.json',
}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize(
  'change, message',
  [
    ({'video': 'a.mp4'}, 'has video, expected one image or none'),
    ({'images': ['a.png', 'b.png']}, 'has images, expected one image or none'),
    ({'audio_path': 'a.wav'}, 'has audio_path'),
    ({'image': ['0.png', '1.png']}, 'has 2 images, expected one or none'),
    ({'image': 'clip.MP4'}, "image is 'clip.MP4', which is no picture"),
    ({'image': 7}, 'image is 7'),
    ({'image': '../0.png'}, "image '../0.png': it lies outside of"),
    ({'image': '/etc/hostname'}, "image '/etc/hostname': it lies outside of"),
  ],
)
def test_what_is_not_one_picture_is_refused(name, change, message, eval_data, tmp_path):
  data = changed(eval_data, tmp_path, FILES[name], change)
  with pytest.raises(DataError, match=message) as error:
    score.questions(suite.get(name), folder_of(name, data))
  assert ';' in str(error.value), 'and says what to do'
  states = [state for _, state, _ in check.inspect(suite.get(name), folder_of(name, data))]
  assert any('unreadable' in state for state in states), '--check_data knows it too'


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('gqa', {'text': 'What is in <image>?'}, 'question 20: the text names the image itself, by <image>'),
    ('mmvet', {'text': '<video>\nWhat happens?'}, 'question 0: the text stands for more than a picture, by <video>'),
    ('seed', {'text': 'Compare <image 1> and <image 2>.'}, 'by <image 1>'),
    ('lvis_multi', {'question': ['<image>\nWhat?', 'And <image>?']}, 'the text names the image itself'),
    ('mmvet', {'text': ' \n'}, 'the question is '),
    ('gqa', {'text': 'half \ud83d'}, 'no Unicode text'),
    ('gqa', {'question_id': {'a': 1}}, 'question_id is {.a.: 1}'),
    ('lvis_multi', {'question': ['What?', 3]}, 'expected texts'),
  ],
)
def test_texts_that_stand_for_more_than_words(name, change, message, eval_data, tmp_path):
  data = changed(eval_data, tmp_path, FILES[name], change)
  with pytest.raises(DataError, match=message):
    score.questions(suite.get(name), folder_of(name, data))


def test_a_list_of_one_picture_is_a_picture(eval_data, tmp_path):
  data = changed(eval_data, tmp_path, FILES['gqa'], {'image': ['0.png'], 'video': None, 'audio': ''})
  (first, *_) = score.questions(suite.get('gqa'), folder_of('gqa', data))
  assert first.image.name == '0.png'


def test_links_stay_in_their_folder_unless_allowed(eval_data, tmp_path):
  """Of a file and of a folder; the image folder itself may be a link."""
  secret = tmp_path / 'secret.png'
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(secret)
  data = changed(eval_data, tmp_path / 'data', FILES['gqa'], {'image': 'link.png'})
  images = data / 'gqa/data/images'
  (images / 'link.png').symlink_to(secret)
  folder = folder_of('gqa', data)
  with pytest.raises(DataError, match="image 'link.png': it lies outside of .*--config.allow_outside=True"):
    score.questions(suite.get('gqa'), folder)
  (first, *_) = score.questions(suite.get('gqa'), dataclasses.replace(folder, allow_outside=True))
  assert layout.load_image(first).size == (8, 8)
  (images / 'link.png').unlink()
  (images / 'link.png').symlink_to(images / '1.png')
  images.rename(tmp_path / 'elsewhere')
  images.symlink_to(tmp_path / 'elsewhere')
  (images / 'link.png').unlink()
  (images / 'link.png').symlink_to('1.png')
  assert len(score.questions(suite.get('gqa'), folder)) == 3


def test_a_pipe_is_no_picture(tmp_path):
  os.mkfifo(tmp_path / 'pipe.png')
  with pytest.raises(DataError, match='question 1: .*pipe.png cannot be read'):
    layout.load_image(Question(1, ('a',), 'a', tmp_path / 'pipe.png'))


OWN = [
  {'question_id': 7, 'image': '0.png', 'text': '<image>\nIs it a dog?', 'answer': 'yes', 'category': None},
  {'question_id': 8, 'text': 'What is 1 + 1?', 'answer': 2},
  {'question_id': 'c', 'image': None, 'text': 'Say A.', 'answer': 'A', 'category': 'letters'},
]


def own(tmp_path, rows, name='own.jsonl'):
  """A question file, and the config that names it."""
  (tmp_path / name).write_text('\n'.join(map(json.dumps, rows)) if name.endswith('l') else json.dumps(rows))
  return config('questions', labels=str(tmp_path / name))


def without(rows, *names):
  return [{k: v for k, v in row.items() if k not in names} for row in rows]


def test_own_questions_are_answered(tiny_checkpoint, eval_data, small_machine, tmp_path):
  """Unscored, or by exact match where all have an answer; started again nothing is asked twice."""
  images = eval_data / 'gqa/data/images'
  report.run(own(tmp_path, without(OWN, 'answer')), str(tiny_checkpoint), tmp_path / 'a', images)
  rows = [json.loads(line) for line in (tmp_path / 'a/answers/own.jsonl').read_text().splitlines()]
  assert [r['question_id'] for r in rows] == [7, 8, 'c'] and rows[0]['prompt'] == 'Is it a dog?'
  assert ['<image>' in r['metadata']['rendered_prompt'] for r in rows] == [True, False, False]
  results = json.loads((tmp_path / 'a/results.json').read_text())
  assert 'score' not in results['runs']['own'] and results['metric'].startswith('none: the questions have no answers')
  report.run(own(tmp_path, OWN, 'own.json'), str(tiny_checkpoint), tmp_path / 'b', images)
  results = json.loads((tmp_path / 'b/results.json').read_text())
  assert results['runs']['own']['score'] == 0 and results['metric'] == 'accuracy in %, exact match'


def test_answers_to_own_questions_are_scored(tmp_path):
  cfg = own(tmp_path, OWN)
  rows = [{'question_id': 7, 'text': ' yes\n'}, {'question_id': '8', 'text': '2'}, {'question_id': 'c', 'text': 'a'}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  result = score.run(cfg, tmp_path / 'a.jsonl', tmp_path, False, None)
  assert result['score'] == pytest.approx(200 / 3) and result['figures']['letters'] == 0
  with pytest.raises(DataError, match='--data=DIR is missing'):
    score.run(cfg, tmp_path / 'a.jsonl', None, False, None)
  words = own(tmp_path, without(OWN, 'image')[1:], 'words.jsonl')
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows[1:])))
  assert score.run(words, tmp_path / 'a.jsonl', None, False, None)['answered'] == '2/2'


def test_ids_of_own_questions_may_repeat(tmp_path):
  """As in TextVQA's file; then the question tells them apart, whatever the order of the answers."""
  asked = [{'question_id': 1, 'text': f'Say {x}.\nBriefly.', 'answer': x} for x in 'abc']
  rows = [{'question_id': 1, 'prompt': q['text'], 'text': q['answer']} for q in asked[::-1]]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  cfg = own(tmp_path, asked)
  assert score.run(cfg, tmp_path / 'a.jsonl', None, False, None)['score'] == 100
  (tmp_path / 'a.jsonl').write_text(json.dumps({'question_id': 1, 'text': 'a'}))
  with pytest.raises(DataError, match='has no prompt; ids repeat'):
    score.run(cfg, tmp_path / 'a.jsonl', None, False, None)


@pytest.mark.parametrize(
  'rows, message',
  [
    ([OWN[0], *without(OWN[1:], 'answer')], '1 of 3 questions have an answer; give one to all'),
    ([OWN[1] | {'answer': ['2', 'two']}], r"answer is \['2', 'two'\], expected a text"),
    ([{'question_id': 1}], 'question 1: lacks text'),
    ([{'text': 'a'}], 'question 1: lacks question_id'),
    ([OWN[0] | {'video': 'a.mp4'}], 'has video'),
    ([OWN[0] | {'image': '../0.png'}], 'it lies outside of'),
    ([], 'there is no question in its files'),
  ],
)
def test_own_files_that_cannot_be_asked_are_named(rows, message, tmp_path):
  cfg = own(tmp_path, rows)
  with pytest.raises(DataError, match=message):
    report.run(cfg, 'nowhere', tmp_path / 'out', tmp_path)


def test_own_questions_need_their_file():
  with pytest.raises(ConfigError, match='name the question file with --config.labels=FILE'):
    suite.get('questions').configured(config('questions'))
