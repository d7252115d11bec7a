"""Samples of another kind than the model takes are told apart, and what other tools write is read."""

import codecs
import json
import subprocess
import sys

import llava_files
import pytest
from conftest import ROOT
from PIL import Image
from preparing import SKIP, ids, run, scan

from dynllava_jax.config import ConfigError
from dynllava_jax.data import check, records
from dynllava_jax.data.conversation import TEMPLATES, template
from dynllava_jax.data.marks import other_mark
from dynllava_jax.data.order import Order, Part
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.store import Store

JPEG2000 = ROOT.parent / 'shared' / 'cases' / 'jpeg2000'
GOOD = llava_files.sample(1)
TEXT = {'id': 't', 'conversations': llava_files.turns('Hello?', 'Hi.')}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp('kinds')
  llava_files.write_pictures(folder)
  return folder


def reason(entry, root):
  """Why an entry cannot be used, '' if it can."""
  try:
    record = records.parse(entry, 'mix', 0)
  except DataError as e:
    return e.reason
  return records.examine(record, style=TEMPLATES['vicuna_v1'], tokenizer=None, images=root).reason


@pytest.mark.parametrize(
  'extra',
  [
    {'video': 'a.mp4'},
    {'Videos': ['a.mp4', 'b.mp4']},
    {'audio': {'path': 'a.wav'}},
    {'speech': 'x'},
    {'audio_path': 'x'},
    {'images': ['pictures/1.jpg', 'pictures/2.jpg']},
    {'image2': 'pictures/2.jpg'},
    {'image_1': 'pictures/2.jpg'},
    {'second': 'pictures/2.jpg'},
    {'extra_file': 'scan.pdf'},
    {'point_cloud': 'a'},
    {'clip': 'recording.webm'},
    {'system': 'You are a pirate.'},
    {'tools': [{'name': 'search'}]},
    {'tool_calls': [{'name': 'search'}]},
    {'media': [{'type': 'video'}]},
    {'waveform': [0.1, 0.2]},
    {'image_base64': 'iVBORw0KGgo='},
    {'extra': {'image': 'pictures/2.jpg'}},
    {'extra': {'list': [{'deeper': {'videoPath': 'x'}}]}},
    {'audio_features': [[0.1]]},
    {'pixel_values': [[1, 2]]},
    {'frames_dir': 'frames/1'},
    {'attachment': 'x'},
    {'input': 'data:image/png;base64,iVBORw0KGgo='},
    {'link': 'https://a.org/film.mp4?t=3'},
    *({'other': f'a.{ending}'} for ending in ('avif', 'heic', '3gp', 'gif', 'docx', 'svg')),
    {'tool_calls': [{'name': 'search'}]},
    {'media': [{'type': 'video'}]},
    {'parts': [{'type': 'video_url', 'at': 'x'}]},
    {'extra': {'image': 'x.png'}},
    {'meta': [[{'Video': 'x'}]]},
    {'image_base64': 'abc'},
    {'note': 'data:image/png;base64,iVBO'},
    {'blob': '/9j/4AAQ' + 'A' * 60},
    {'waveform': [0.1]},
    {'audioFeatures': [[0.1]]},
    {'pixel_values': [[1]]},
    {'frames_dir': 'clips/1'},
    {'leftImage': 'pictures/2.jpg'},
    {'multi_modal_data': {'x': 1}},
    {'modality': 'video'},
    *({'second': f'x.{ending}'} for ending in ('avif', 'HEIC', '3gp', 'gif', 'docx', 'mp4?sig=1', 'svg')),
  ],
  ids=str,
)
@pytest.mark.parametrize('base', [GOOD, TEXT], ids=['image', 'text'])
def test_fields_with_other_content_are_refused(root, extra, base):
  assert reason(base, root) == '' and reason(base | extra, root) == 'other_content'


@pytest.mark.parametrize(
  'extra',
  [
    {'video': None},
    {'images': []},
    {'audio': ''},
    {'model': ''},
    {'source': 'coco'},
    {'width': 640, 'video_id': 7, 'image_size': [640, 480]},
    {'file_name': GOOD['image']},
    {'video': float('nan')},
    {'split': 'train', 'score': 0.5, 'ok': True},
    {'info': {'path': GOOD['image'], 'image_width': 3}, 'num_frames': 1, 'image_caption': 'A bus.'},
    {'image_path': GOOD['image'], 'media_type': 'photo', 'videoId': 'x', 'bbox': [[0.5, 1.0]]},
    {'image_path': f'/data/{GOOD["image"]}', 'images': [GOOD['image']]},
    {'num_frames': 8, 'has_video': True, 'video': False, 'image_tokens': 576},
    {'image_caption': 'A bus.', 'text_in_image': 'stop', 'data_type': 'image', 'url': 'http://x.org/a.html'},
    {'meta': {'title': 'What is in report.pdf? Nothing.', 'tags': ['a']}},
  ],
  ids=str,
)
def test_notes_and_empty_fields_do_no_harm(root, extra):
  assert reason(GOOD | extra, root) == ''


@pytest.mark.parametrize('name', ['a.mp4', 'a.WAV', 'a.docx', 'a.npy', 'a.svg'])
def test_a_picture_that_is_named_as_something_else(root, name):
  assert reason(GOOD | {'image': name}, root) == 'other_content'


@pytest.mark.parametrize('name', ['a.gif', 'a.png', 'a.webp', 'a.tiff'])
def test_animations_and_pages_are_no_picture(root, name):
  """A file with one frame in these formats is."""
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
  frames[0].save(root / name, save_all=True, append_images=frames[1:])
  assert reason(GOOD | {'image': name}, root) == 'other_content'
  frames[0].save(root / name)
  assert reason(GOOD | {'image': name}, root) == ''


def test_content_in_a_turn_is_refused(root):
  turns = llava_files.turns('<image>\nWhat?', 'A bus.')
  turns[0] |= {'video': 'a.mp4'}
  assert reason(GOOD | {'conversations': turns}, root) == 'other_content'


# As other projects name them; the grammar of `data.marks` knows them, no list.
OTHERS = """
<IMG_CONTEXT> <VIDEO_CONTEXT> <image_token> <image_soft_token> <audio_soft_token> <start_of_image> <|imgpad|> <im_patch>
<im_start> <vi_start> <__media__> <frame> <vid> <video/> <image/> </image> <AudioHere> <|begin_of_video|> [img-1]
<fake_token_around_image> <global-img> <|media_pad|> <point_patch> <visual_token> [BEGIN_AUDIO] <|IMAGE_PLACEHOLDER|>
""".split()  # noqa: SIM905


@pytest.mark.parametrize(
  'question',
  [
    *OTHERS,
    '<video>\nWhat?',
    'What is in <video>?',
    '<audio> What?',
    '<speech>',
    'See <image_1> and <image_2>.',
    '<Image>\nWhat?',
    '<|video_pad|> What?',
    '<VIDEO>',
    '<point_cloud>\nWhat?',
    '<|vision_start|><|image_pad|>',
    '[IMG] What?',
    '<img>\nWhat?',
    *('<IMG_CONTEXT>', '<VIDEO_CONTEXT>', '<image_token>', '<video_token>', '<image_soft_token>', '<audio_soft_token>'),
    *('<start_of_image>', '<|imgpad|>', '<im_patch>', '<im_start>', '<vi_start>', '<__media__>', '<frame>', '<vid>'),
    *('<video/>', '<image/>', '[image]', '<|image_1|>'),
    *('<video >', '<Audio><AudioHere></Audio>', '<img>x.jpg</img>', '![x](b.jpg)', '![](data:image/png;base64,AA)', '<Img 3>'),
    *('<img>https://a.org/b</img> <image-placeholder>', '<end_of_video>', '[Audio_2]', '<|vision_bos|>', '<image_newline>'),
    '<video >',
    'Look: [image] What?',
    '<Img><ImageHere></Img> What?',
    '<img>x.jpg</img> What?',
    'What is it? ![x](b.jpg)',
    '<img src="b.jpg">\nWhat?',
    '[Image 1] or [Image 2]?',
  ],
)
def test_marks_of_other_content_are_refused(root, question):
  assert reason({'conversations': llava_files.turns(question, 'A bus.')}, root) == 'other_content'
  with_picture = llava_files.turns(f'<image>\n{question}', 'A bus.')
  assert reason(GOOD | {'conversations': with_picture}, root) == 'other_content'


@pytest.mark.parametrize(
  'question',
  [
    'What does the <video> tag do?',
    'Use `<audio>` here.',
    '```\n<video>\n```',
    '<video><source src="a"></video>',
    '<b>Why?</b>',
    'a < b and c > d',
    '<video controls>',
    'see [1]',
    '<table>',
    *('<im>', '<vi>', '<vision>', '<|im_start|>', '<imagine>', '<framework>', '<T>', '[image credit: NASA]', '<image of a dog>'),
    *('[image](https://a.org)', '![badge](https://a.org/status)', '<picture><source></picture>', '<start>', '<end of the text>'),
    '[image credit: NASA] Who?',
    '[the video shows] what?',
    'x = [image]; y = data[image]; f([frame]); [image, label]',
    'see [image](http://x.org) and [image]: below',
    '![IMAGE](https://source.example.com/960x640/?<PUT YOUR QUERY HERE>)',
    '<div><img src="b.jpg"></div>\n<img src="b.jpg">\nWhy?',
    'How do I write <img src="a.jpg"> with a title?',
    'python run.py <image_path> <video_url>',
    'List<Image> images; map<string, Video> b',
    '<document>words</document> <start> <point> <media:content>',
    '<|im_start|>user',
  ],
)
def test_html_and_code_are_text(question):
  assert other_mark(question) == ''


def test_answers_may_hold_anything(root):
  assert reason({'conversations': llava_files.turns('Which element?', 'Use <video>.')}, root) == ''


@pytest.mark.parametrize('name', ['llava-train.array_record-00000-of-00001', '.unfinished/mine.txt', '.unfinished'])
def test_what_a_preparation_did_not_write_is_not_removed(root, tmp_path, name):
  """A shard without a note, a file among those of an interrupted run; other names are left alone."""
  path = llava_files.write_json(tmp_path / 'mix.json', [TEXT])
  for mine in (name, 'work.tmp', '.work.tmp', 'llava-train.array_record-notes'):
    (tmp_path / 'out' / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'out' / mine).write_text('mine')
  with pytest.raises(ConfigError, match=f'{name}.*move it away'):
    run(scan(root, {'mix': path}), tmp_path / 'out')
  assert (tmp_path / 'out' / name).read_text() == 'mine'
  (tmp_path / 'out' / name).unlink()
  assert run(scan(root, {'mix': path}), tmp_path / 'out')
  assert all(
    (tmp_path / 'out' / mine).read_text() == 'mine' for mine in ('work.tmp', '.work.tmp', 'llava-train.array_record-notes')
  )


def test_unused_fields_are_counted(root, tmp_path, capsys):
  turns = llava_files.turns('Hello?', 'Hi.')
  turns[1] |= {'weight': 0}
  samples = [TEXT | {'model': 'x'}, TEXT | {'model': ''}, {'conversations': turns, 'mo\x1bdel': 1}]
  path = llava_files.write_json(tmp_path / 'mix.json', samples)
  assert run(scan(root, {'mix': path}), tmp_path / 'out', only_check=True)
  content = json.loads((tmp_path / 'out' / check.REPORT_FILE).read_text())
  assert content['sources']['mix']['unused_fields'] == {'model': 1, 'mo\x1bdel': 1, 'turn.weight': 1}
  printed = capsys.readouterr().out
  assert 'fields that are not used: ' in printed and 'mo\\x1bdel (1)' in printed


@pytest.mark.parametrize('empty', [None, '', [], float('nan')], ids=str)
def test_an_empty_image_field_is_none(root, empty):
  assert reason(TEXT | {'image': empty, 'id': empty}, root) == ''
  assert reason(GOOD | {'image': empty}, root) == 'placeholder_without_image'


@pytest.mark.parametrize('code', ['utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('name', ['mix.json', 'mix.jsonl', 'mix.ndjson'])
def test_byte_order_marks_are_read(tmp_path, code, name):
  entries = [TEXT | {'id': 'é'}, TEXT]
  text = json.dumps(entries) if name == 'mix.json' else '\r\n'.join(map(json.dumps, entries))
  content = (codecs.BOM_UTF16_BE if code == 'utf-16-be' else b'') + text.encode(code)
  (tmp_path / name).write_bytes(content)
  assert records.read_json(tmp_path / name) == entries


def test_marks_inside_a_joined_file_are_passed_over(tmp_path):
  line = json.dumps(TEXT).encode()
  (tmp_path / 'two.jsonl').write_bytes(codecs.BOM_UTF8 + line + b'\n' + codecs.BOM_UTF8 + line)
  assert records.read_json(tmp_path / 'two.jsonl') == [TEXT, TEXT]


@pytest.mark.parametrize('code', ['utf-8', 'utf-16-le', 'utf-16-be'])
def test_a_list_is_one_whatever_it_is_called(tmp_path, code):
  """Also in UTF-16 without a mark."""
  (tmp_path / 'mix.jsonl').write_bytes(json.dumps([TEXT, TEXT], indent=1).encode(code))
  assert records.read_json(tmp_path / 'mix.jsonl') == [TEXT, TEXT]


def test_lines_called_json_are_told_the_way_on(tmp_path):
  (tmp_path / 'mix.json').write_text('{"id": 1}\n{"id": 2}\n')
  with pytest.raises(DataError, match='mix.json, line 2: .*one object per line is read from a file called .jsonl'):
    records.read_json(tmp_path / 'mix.json')


@pytest.mark.parametrize('alias, name', [('v1', 'vicuna_v1'), ('v0_plain', 'plain'), ('mistral_direct', 'chatml_direct')])
def test_other_names_of_templates(alias, name):
  assert template(alias) == TEMPLATES[name]


@pytest.mark.skipif(not JPEG2000.exists(), reason='needs ../shared/cases')
def test_jpeg_2000_and_avif_are_read(tmp_path):
  assert run(scan(JPEG2000, {'data': JPEG2000 / 'data.json'}), tmp_path / 'out')
  assert ids(Store(str(tmp_path / 'out'))) == ['a.jp2', 'b.avif']


def nested(depth):
  out = 'x'
  for _ in range(depth):
    out = [out]
  return out


@pytest.mark.parametrize('place', ['id', 'image', 'video', 'note', 'turn'])
def test_deep_values_are_findings(root, place):
  """Deep enough for `repr` to give up, not for the JSON reader."""
  deep = nested(900)
  entry = TEXT | ({'conversations': [deep]} if place == 'turn' else {place: deep})
  found = reason(entry, root)
  assert found == {'id': '', 'note': '', 'video': 'other_content', 'image': 'malformed', 'turn': 'malformed'}[place]


def test_ids_are_cleaned_and_short(root, tmp_path):
  path = llava_files.write_json(tmp_path / 'mix.json', [TEXT | {'id': 'a\x1b[2J\nb'}, TEXT | {'id': 'x' * 10**6}])
  assert run(scan(root, {'mix': path}, data=SKIP), tmp_path / 'out')
  first, second = ids(Store(str(tmp_path / 'out')))
  assert first == 'a\\x1b[2J\\nb' and second.endswith('... (mix#1)') and len(second) < 250


@pytest.mark.parametrize('weight', [1e12, 1e300])
def test_absurd_epochs_are_refused_before_they_are_made(root, tmp_path, weight):
  with pytest.raises(ConfigError, match='an epoch would draw .* samples'):
    Order((Part(0, 100, weight),), 8, 0, (10,))
  with pytest.raises(ConfigError, match='an epoch would draw'):
    Order((Part(0, 10**12),), 8, 0, (10,))


def test_absurd_numbers_of_the_command_line_are_one_line(root, tmp_path):
  path = llava_files.write_json(tmp_path / 'mix.json', [TEXT] * 3)
  command = [sys.executable, '-m', 'dynllava_jax.data.prepare', f'--json={path}', f'--images={root}', f'--out={tmp_path / "out"}']
  for flag in ('--weight=1e12', '--processes=1000000', '--text_length=1000000000000', '--image_tokens=1000000000000'):
    done = subprocess.run([*command, flag], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, (flag, done.stderr)
