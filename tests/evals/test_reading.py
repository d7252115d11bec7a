"""Files as other tools write them, and files that are none."""

import base64
import csv
import io
import json
import os
import shutil

import pytest
from answer_files import answers_for, folder_of, scored

from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import reading, score
from dynllava_jax.evals.answers import digest, sealed
from dynllava_jax.evals.benchmarks import suite

pytest_plugins = ('tiny_suite',)

ENCODINGS = ('utf-8-sig', 'utf-16', 'utf-32', 'utf-16-le', 'utf-16-be')  # the last two without a mark


def rewritten(path, change):
  """The text of a file after `change`, as text or as bytes."""
  content = change(path.read_text())
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_byte_order_marks(encoding, eval_data, tmp_path):
  """Of a table, of JSON, of lines and of answers; each line of a joined file may have one of its own."""
  data = tmp_path / 'data'
  for name in ('mmbench', 'scienceqa', 'gqa', 'MME'):
    shutil.copytree(eval_data / name, data / name)
  files = [*data.rglob('*.tsv'), *data.rglob('*.json'), *data.rglob('*.jsonl'), *data.rglob('*.txt')]
  for file in files:
    rewritten(file, lambda text: text.encode(encoding))
  assert len(files) > 17
  for name in ('mmbench', 'scienceqa', 'gqa', 'mme'):
    answers = answers_for(name, data, tmp_path / 'a.jsonl')
    rewritten(answers, lambda text: text.encode(encoding))
    result = scored(name, data, answers)
    assert result['n'] == result['total'] and result['figures'] == scored(name, eval_data, answers)['figures']
  rewritten(answers_for('gqa', eval_data, tmp_path / 'b.jsonl'), lambda text: text.replace('\n{', '\r\n\ufeff{'))
  assert scored('gqa', eval_data, tmp_path / 'b.jsonl')['n'] == 3


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.splitlines()[0] + '\n', 'has no row below its header'),
    (lambda t: t.replace('\tdev\n', '\tdev\tmore\n', 1), 'row 1: has more cells than the header'),
    (lambda t: t.replace('\tsplit\n', '\tvideo\n'), 'row 1: has video, expected one image or none'),
    (lambda t: '\x00' + t, 'get it again|get the table again'),
  ],
)
def test_tables_that_are_none_are_named(change, message, eval_data, tmp_path):
  shutil.copytree(eval_data / 'mmbench', tmp_path / 'mmbench')
  rewritten(tmp_path / 'mmbench/mmbench_dev_20230712.tsv', change)
  with pytest.raises(DataError, match=message) as error:
    score.questions(suite.get('mmbench'), folder_of('mmbench', tmp_path))
  assert 'mmbench_dev_20230712.tsv' in str(error.value)


def test_label_files_without_a_label_are_none(eval_data, tmp_path):
  answers = answers_for('gqa', eval_data, tmp_path / 'a.jsonl')
  (tmp_path / 'none.json').write_text('{}')
  with pytest.raises(DataError, match='gqa: there is no label in its files'):
    scored('gqa', eval_data, answers, labels=str(tmp_path / 'none.json'))


def test_pictures_with_line_breaks_in_the_table(eval_data, tmp_path):
  """As `base64` and Python's `encodebytes` write them; the picture, and what it is drawn with, stay the same."""
  data = tmp_path / 'data'
  shutil.copytree(eval_data / 'mmbench', data / 'mmbench')
  table = data / 'mmbench/mmbench_dev_20230712.tsv'
  rows = list(csv.DictReader(io.StringIO(table.read_text()), delimiter='\t'))
  for row, ending in zip(rows, ('\n', '\r\n', ' ')):
    row['image'] = base64.encodebytes(base64.b64decode(row['image'])).decode().replace('\n', ending)
  with open(table, 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], delimiter='\t')
    writer.writeheader()
    writer.writerows(rows)
  benchmark = suite.get('mmbench')
  there, here = (score.questions(benchmark, folder_of('mmbench', root)) for root in (eval_data, data))
  assert [q.image for q in there] == [q.image for q in here]
  rewritten(table, lambda text: text.replace('iVBOR', 'i*BOR', 1))
  with pytest.raises(DataError, match='index 0: the image is not base64'):
    score.questions(benchmark, folder_of('mmbench', data))


@pytest.mark.parametrize(
  'name, file, change',
  [
    ('gqa', 'gqa/data/testdev_balanced_questions.json', lambda t: t.replace('{"structural": "verify"}', 'null')),
    ('gqa', 'gqa/data/testdev_balanced_questions.json', lambda t: t.replace('"imageId": "0"', '"imageId": null')),
    (
      'vqav2_val',
      'vqav2/v2_mscoco_val2014_annotations.json',
      lambda t: t.replace('"yes/no"', 'null'),
    ),
    ('scienceqa', 'scienceqa/llava_test_CQM-A.json', lambda t: t.replace('{"id": "0"', '{"image": null, "id": "0"')),
    ('seed', 'seed_bench/SEED-Bench.json', lambda t: t.replace('"question": "Is there a dog 0?"', '"question": null')),
    ('mmbench', 'mmbench/mmbench_dev_20230712.tsv', lambda t: t.replace('"Look.\nTwice."', 'NULL')),
  ],
)
def test_null_and_absent_fields_that_nobody_needs(name, file, change, eval_data, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / file.split('/')[0], data / file.split('/')[0])
  before = (data / file).read_text()
  rewritten(data / file, change)
  assert (data / file).read_text() != before
  answers = answers_for(name, data, tmp_path / 'a.jsonl', lambda rows: [r | {'metadata': None, 'model_id': None} for r in rows])
  result = scored(name, data, answers)
  assert result['n'] == result['total'] and 'None' not in result['figures']


@pytest.mark.parametrize(
  'row, message',
  [
    ({'question_id': ['1'], 'text': 'a'}, r"question_id is \['1'\], expected a text or a whole number"),
    ({'question_id': True, 'text': 'a'}, 'question_id is True'),
    ({'question_id': None, 'text': 'a'}, 'answer 1: lacks question_id'),
    ({'question_id': '20', 'text': None}, 'answer 1: lacks text'),
    ({'question_id': '20', 'text': 3}, 'text is 3, expected a text or a list of texts'),
    ({'question_id': '20', 'text': 'a', 'prompt': ['x']}, 'prompt is'),
    ({'question_id': '20', 'text': 'a', 'metadata': 'x'}, "metadata is 'x', expected dict"),
  ],
)
def test_rows_of_another_form_are_refused(row, message, eval_data, tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps(row))
  with pytest.raises(DataError, match=message):
    scored('gqa', eval_data, tmp_path / 'a.jsonl')


def test_a_row_that_was_changed_is_named(eval_data, tmp_path):
  """One letter of an answer, of its prompt or of what was counted; a row without a digest is taken as it is."""
  rows = [sealed(r | {'metadata': {'row': i, 'kept': '1'}}) for i, r in enumerate(given(eval_data, tmp_path))]
  assert all(r['metadata']['row_sha256'] == digest(r) for r in rows)
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  assert scored('gqa', eval_data, tmp_path / 'a.jsonl')['n'] == 3
  for change in ({'text': 'Yes'}, {'prompt': rows[1]['prompt'] + ' '}, {'metadata': rows[1]['metadata'] | {'kept': '0'}}):
    changed = [rows[0], rows[1] | change, rows[2]]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in changed))
    with pytest.raises(DataError, match='answer 2: was changed since it was made'):
      scored('gqa', eval_data, tmp_path / 'a.jsonl')


def given(eval_data, tmp_path):
  return reading.read_lines(answers_for('gqa', eval_data, tmp_path / 'given.jsonl'))


@pytest.mark.parametrize('place', ['answers', 'labels'])
@pytest.mark.parametrize(
  'content, message',
  [
    (b'[' * 10**6, 'without end|expected an object'),
    (b'{"question_id": ' + b'1' * 5000 + b'}', 'Exceeds the limit'),
    (b'{"question_id": NaN}', 'NaN is no number'),
    (b'{"question_id": 1e999}', '1e999 is too large'),
    (b'\xff\xfa', 'not UTF-8'),
    (b'\x00' * 100, 'not JSON|not a JSON object'),
  ],
)
def test_content_that_is_no_json(place, content, message, eval_data, tmp_path):
  answers = answers_for('gqa', eval_data, tmp_path / 'a.jsonl')
  (tmp_path / 'bad').write_bytes(content)
  with pytest.raises(DataError, match=message) as error:
    if place == 'labels':
      scored('gqa', eval_data, answers, labels=str(tmp_path / 'bad'))
    else:
      scored('gqa', eval_data, tmp_path / 'bad')
  assert str(tmp_path / 'bad') in str(error.value)


def test_what_is_no_file_is_not_opened(eval_data, tmp_path, monkeypatch):
  """A pipe nobody writes to, a device without end, a folder, and a file of 10^12 bytes that are not there."""
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'large').touch()
  os.truncate(tmp_path / 'large', 10**12)
  answers = answers_for('gqa', eval_data, tmp_path / 'a.jsonl')
  for path, message in (
    (tmp_path / 'pipe', 'it is no regular file'),
    ('/dev/zero', 'it is no regular file'),
    (tmp_path, 'is a folder'),
    (tmp_path / 'large', 'it has 1,000,000,000,000 bytes'),
  ):
    for call in (lambda: scored('gqa', eval_data, tmp_path / path), lambda: scored('gqa', eval_data, answers, labels=str(path))):
      with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
  'name, file, old, new, message',
  [
    ('gqa', 'gqa/data/testdev_balanced_questions.json', '"answer": "yes"', '"answer": 1', 'answer is 1, expected a text'),
    ('pope', 'pope/coco/coco_pope_random.json', '"label": "no"', '"label": "No"', "label is 'No', expected yes or no"),
    ('seed', 'seed_bench/SEED-Bench.json', '"answer": "A"', '"answer": "E"', "answer 'E', expected one of"),
    ('mmbench', 'mmbench/mmbench_dev_20230712.tsv', '\tA\t\t', '\tAB\t\t', "answer is 'AB', expected one of ABCD"),
    ('textvqa', 'textvqa/TextVQA_0.5.1_val.json', '["yes", ', '[', 'has answers of 9 annotators'),
    ('vizwiz_val', 'vizwiz/val.json', '{"answer": "no"}', '{"answer": 3}', 'annotator 1 answers 3, expected a text'),
    ('mme', 'MME/MME_Benchmark_release_version/existence/7.txt', 'Yes', 'Maybe', 'no yes-or-no label'),
    ('gqa', 'gqa/data/testdev_balanced_questions.json', '{"20"', '[{"20"', 'not JSON'),
    (
      'vqav2_val',
      'vqav2/v2_mscoco_val2014_annotations.json',
      '{"annotations"',
      '{"annotation"',
      'lacks annotations; ',
    ),
  ],
)
def test_labels_that_are_none_are_named(name, file, old, new, message, eval_data, tmp_path):
  data = tmp_path / 'data'
  shutil.copytree(eval_data / file.split('/')[0], data / file.split('/')[0])
  answers = answers_for(name, data, tmp_path / 'a.jsonl')
  rewritten(data / file, lambda text: text.replace(old, new))
  with pytest.raises(DataError, match=message) as error:
    scored(name, data, answers)
  assert ';' in str(error.value), 'and says what to do'
