"""What an evaluation depends on besides words: the bytes of its pictures, labels with something in them, and files of its own."""

import json
import shutil

import numpy as np
import pytest
from answer_files import answers_for, config, folder_of, scored

from dynllava_jax import sharding
from dynllava_jax.config import ConfigError, EvalRun, MeshConfig
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import layout, report, runner, score, store
from dynllava_jax.evals.benchmarks import suite
from dynllava_jax.evals.benchmarks.base import Question

pytest_plugins = ('tiny_suite',)


def question(image):
  return Question('q', ('What?',), 'What?', image)


def changed(content):
  return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def test_provenance_has_a_digest_of_every_picture(tiny_checkpoint, eval_data, small_machine, tmp_path):
  shutil.copytree(eval_data / 'gqa', tmp_path / 'gqa')
  loaded = layout.load_model('own', EvalRun(), str(tiny_checkpoint))
  mesh = sharding.make_mesh(MeshConfig())

  def known():
    questions = score.questions(suite.get('gqa'), folder_of('gqa', tmp_path))
    return runner.provenance(config('gqa'), loaded, questions, mesh)

  before = known()
  shutil.move(tmp_path / 'gqa', tmp_path / 'moved')  # to where they lie makes no difference
  shutil.copytree(tmp_path / 'moved', tmp_path / 'gqa')
  assert known() == before
  picture = tmp_path / 'gqa' / 'data' / 'images' / '1.png'
  picture.write_bytes(changed(picture.read_bytes()))
  after = known()
  assert {k for k in after if after[k] != before[k]} == {'pictures_sha256'}
  answers = store.AnswerStore(tmp_path / 'answers', 'own', before)
  answers.add([{'question_id': '20', 'text': 'x', 'metadata': {'row': 0}}])
  moved = store.AnswerStore(tmp_path / 'answers', 'own', after)
  assert moved.set_aside and moved.why == 'answers of another checkpoint or config (pictures_sha256)'
  picture.unlink()
  with pytest.raises(DataError, match=r'question 21: .*1.png cannot be read \(No such file'):
    known()


def test_the_digest_is_of_bytes_files_and_arrays_in_their_order(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  array, files = rng.integers(0, 255, (3, 4, 3), np.uint8), [tmp_path / 'a', tmp_path / 'b']
  for file in files:
    file.write_bytes(rng.bytes(50))
  images = [array, b'encoded', *files, None]
  digests = {store.pictures_sha256([question(i) for i in order]) for order in (images, images[::-1], images[1:], images[:2])}
  digests.add(store.pictures_sha256([question(i) for i in (array + 1, *images[1:])]))
  digests.add(store.pictures_sha256([question(i) for i in (array, b'Encoded', *images[2:])]))
  assert len(digests) == 6
  assert store.pictures_sha256([question(i) for i in (array.copy(), *images[1:])]) in digests
  assert store.pictures_sha256([question(None)]) == store.pictures_sha256([])
  monkeypatch.setattr(store, 'READ', 60)  # of many only some are read, but the size of each counts
  part = store.pictures_sha256([question(f) for f in files])
  files[1].write_bytes(rng.bytes(50))
  assert store.pictures_sha256([question(f) for f in files]) == part
  files[1].write_bytes(rng.bytes(49))
  assert store.pictures_sha256([question(f) for f in files]) != part


def edited(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def blank_gqa(root, text):
  edited(root / 'gqa/data/testdev_balanced_questions.json', lambda c: c['21'].update(answer=text))


def blank_vqa(root, text):
  edited(root / 'vqav2/v2_mscoco_val2014_annotations.json', lambda c: c['annotations'][1].update(answers=[{'answer': text}] * 10))


def blank_vizwiz(root, text):
  edited(root / 'vizwiz/val.json', lambda c: c[1].update(answers=[{'answer': text}] * 10))


@pytest.mark.parametrize('text', ['', ' \n'])
@pytest.mark.parametrize(
  'name, blank, where',
  [
    ('gqa', blank_gqa, 'balanced_questions.json, question 21'),
    ('vqav2_val', blank_vqa, 'annotations.json, annotation 2'),
    ('vizwiz_val', blank_vizwiz, 'val.json, row 2'),
  ],
)
def test_labels_without_words_are_named(name, blank, where, text, eval_data, tmp_path):
  shutil.copytree(eval_data / suite.get(name).folders[0], tmp_path / suite.get(name).folders[0])
  answers = answers_for(name, tmp_path, tmp_path / 'answers.jsonl')
  blank(tmp_path, text)
  with pytest.raises(DataError, match=f'{where}: the label is .*, expected an answer; leave the question out'):
    scored(name, tmp_path, answers)


def test_one_silent_annotator_of_ten_is_no_fault(eval_data, tmp_path):
  shutil.copytree(eval_data / 'vqav2', tmp_path / 'vqav2')
  answers = answers_for('vqav2_val', tmp_path, tmp_path / 'answers.jsonl')
  edited(tmp_path / 'vqav2/v2_mscoco_val2014_annotations.json', lambda c: c['annotations'][1]['answers'][0].update(answer=''))
  assert scored('vqav2_val', tmp_path, answers)['score'] == 100


@pytest.mark.parametrize(
  'field, value', [('video', 'clip.mp4'), ('image', 'COCO_val2014_000000000099.jpg'), ('audio_path', 'a.wav')]
)
def test_vqav2_questions_about_something_else_are_refused(field, value, eval_data, tmp_path):
  shutil.copytree(eval_data / 'vqav2', tmp_path / 'vqav2')
  edited(tmp_path / 'vqav2/v2_OpenEnded_mscoco_val2014_questions.json', lambda c: c['questions'][1].update({field: value}))
  with pytest.raises(DataError, match=rf'questions.json, question 2: (has {field}|image is .* and image_id names)'):
    score.questions(suite.get('vqav2_val'), folder_of('vqav2_val', tmp_path))


@pytest.mark.parametrize(
  'name, row, message',
  [
    ('mme', {'question_id': 'artwork/7.png', 'text': 'yes'}, 'has no prompt'),
    ('textvqa', {'question_id': '0', 'text': 'yes'}, 'has no prompt'),
    ('lvis_multi', {'question_id': '0', 'text': ['a']}, ''),
    ('gqa', {'question_id': '20', 'text': 'no', 'metadata': 5}, 'metadata is 5'),
  ],
)
def test_messages_about_answers_name_their_file(name, row, message, eval_data, tmp_path):
  path = answers_for(name, eval_data, tmp_path / 'theirs.jsonl', lambda rows: [*rows[1:], row])
  with pytest.raises(DataError, match=f'theirs.jsonl.*{message}'):
    scored(name, eval_data, path)


@pytest.mark.parametrize('foreign', ['results.json', 'results.csv', 'tokens.png'])
def test_files_of_somebody_else_are_not_replaced(foreign, tmp_path):
  (tmp_path / 'answers').mkdir()
  (tmp_path / foreign).write_text('{"mine": 1}')
  with pytest.raises(ConfigError, match=f'--out: .*{foreign} was not written by an evaluation; move it away'):
    report.check_own(tmp_path)
  assert (tmp_path / foreign).read_text() == '{"mine": 1}'


def test_files_of_an_earlier_evaluation_are_replaced(tmp_path):
  report.check_own(tmp_path)
  (tmp_path / 'results.csv').write_text('run,score')
  (tmp_path / 'results.json').write_text(json.dumps({'benchmark': 'gqa', 'metric': '', 'runs': {}}))
  report.check_own(tmp_path)
  (tmp_path / 'results.json').write_text('{"bench')  # cut off by a disk
  (tmp_path / 'answers').mkdir()
  (tmp_path / 'answers' / 'own.provenance.json').write_text('{}')
  report.check_own(tmp_path)
