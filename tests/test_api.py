"""What `import dynllava_jax` offers: three lines from a checkpoint to answers, and errors of one line."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import dynllava_jax as dl
from dynllava_jax import api, checkpoint
from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError

pytest_plugins = ('tiny_suite',)

QUESTIONS = ['What is it?', 'Is there a dog, and where is it?', 'How many?', 'Why? ' * 12]


@pytest.fixture(scope='module')
def model(tiny_checkpoint):
  return dl.load(tiny_checkpoint, max_new_tokens=6, batch_size=2, text_lengths=(64, 128))


def pictures():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (30 + 5 * i, 40, 3), np.uint8) for i in range(3)] + [None]


@pytest.fixture(scope='module')
def replies(model):
  return model.reply(pictures(), QUESTIONS, temperature=1.0, seed=[3, 4, 5, 6], repetition_penalty=1.3)


def test_a_reply_depends_on_its_question_alone(model, replies):
  for order in ([2, 0, 3, 1], [1]):
    asked = [pictures()[i] for i in order], [QUESTIONS[i] for i in order]
    again = model.reply(*asked, temperature=1.0, seed=[3 + i for i in order], repetition_penalty=1.3)
    for i, reply in zip(order, again):
      assert (reply.tokens, reply.kept, reply.kept_image) == (replies[i].tokens, replies[i].kept, replies[i].kept_image)
  assert [len(r.kept_image) for r in replies] == [4, 4, 4, 0]
  assert all(len(r.tokens) == len(r.log_probs) == len(r.kept) + 1 and max(r.log_probs) < 0 for r in replies)
  assert len({r.tokens for r in replies}) == 4


def test_pictures_in_every_form_are_the_same(model, tmp_path):
  image, content = Image.fromarray(pictures()[0]), io.BytesIO()
  image.save(content, 'PNG')
  (tmp_path / 'a.png').write_bytes(content.getvalue())
  forms = [pictures()[0], image, image.convert('RGBA'), content.getvalue(), tmp_path / 'a.png', str(tmp_path / 'a.png')]
  assert len(set(model.answer(forms, [QUESTIONS[0]] * len(forms)))) == 1


@pytest.mark.slow
def test_int8_answers_and_its_cache_is_smaller(model, tiny_checkpoint):
  small = dl.load(tiny_checkpoint, quantization='int8_all', max_new_tokens=6, batch_size=2, text_lengths=(64, 128))
  assert len(small.answer(pictures(), QUESTIONS)) == 4
  sizes = []
  for one in (model, small):
    chat = one.chat(pictures()[0], max_new_tokens=6, later_tokens=8)
    chat.send(QUESTIONS[0], max_tokens=2)
    sizes.append(chat.cache_bytes)
  assert sizes[1] < 0.5 * sizes[0]
  assert small.run_as('dense').loaded.int8_cache
  with pytest.raises(ValueError, match="quantization: 'int4', expected int8, int8_cache, int8_all, or None"):
    dl.load(tiny_checkpoint, quantization='int4')


@pytest.mark.slow
def test_a_conversation_goes_on_where_it_was(model, monkeypatch):
  chat = model.chat(pictures()[0], max_new_tokens=12, later_tokens=80)
  generator, chunks = chat._stepper.generator, []
  append = generator.append
  monkeypatch.setattr(
    generator, 'append', lambda turn, chunk, count: chunks.append(chunk[0, : count[0]]) or append(turn, chunk, count)
  )
  first = chat.send(QUESTIONS[0], max_tokens=4)
  pieces = list(chat.stream(QUESTIONS[2], max_tokens=4))
  assert first.tokens == model.reply(pictures()[0], QUESTIONS[0], max_tokens=4).tokens
  assert [t['from'] for t in chat.turns] == ['human', 'gpt'] * 2
  assert chat.turns[1]['value'] == first.text and chat.turns[3]['value'] == ''.join(pieces)
  tokenizer = model.loaded.tokenizer
  later = [i for i, _ in tokenizer.encode(f'</s>USER: {QUESTIONS[2]} ASSISTANT:')]  # as training has it
  assert chunks[0].tolist() == ([] if first.finish == 'end' else [first.tokens[-1]]) + later
  with pytest.raises(DataError, match='the conversation is full: this turn has .* tokens, and there is room for'):
    chat.send('and then? ' * 30)
  chat.turns[1]['value'] = ''  # as of an answer that was but its end
  assert len(chat.send('so?').tokens) == 4  # of 12, 8 were used
  with pytest.raises(DataError, match='the conversation is full: all 12 tokens of its answers are used'):
    chat.send('so?')


WRONG = {
  'several images': (lambda m: m.answer([None, None], 'a?'), DataError, '2 images, expected one or none; to ask the same'),
  'images in a row': (lambda m: m.answer([[1, 2]], ['a?']), DataError, 'question 1: 2 images, expected one or none'),
  'numbers': (lambda m: m.answer([None], ['a?', 'b?']), DataError, '1 images and 2 questions'),
  'no picture': (lambda m: m.answer(b'no', 'a?'), DataError, 'question 1: no picture'),
  'no file': (lambda m: m.answer('/there/is/none.png', 'a?'), DataError, 'question 1: /there/is/none.png cannot be read'),
  'array': (lambda m: m.answer(np.zeros((3, 3)), 'a?'), DataError, 'question 1: float64 of shape 3x3, expected uint8'),
  'mode': (lambda m: m.answer(Image.new('F', (3, 3)), 'a?'), DataError, 'question 1: picture of mode F'),
  'other': (lambda m: m.answer(3, 'a?'), DataError, 'question 1: image is int'),
  'empty': (lambda m: m.answer(None, ' '), DataError, 'question 1: the question is'),
  'image in text': (lambda m: m.answer(None, 'a <image>'), DataError, 'question 1: the text names the image itself'),
  'long': (lambda m: m.answer(None, 'word ' * 200), DataError, 'question 1: .* text tokens, the largest of text_lengths is 128'),
  'seeds': (lambda m: m.answer(None, ['a?', 'b?'], seed=[1]), ValueError, '1 seeds for 2 questions'),
  'temperature': (lambda m: m.answer(None, 'a?', temperature=-1), ValueError, 'temperature: -1, expected'),
  'penalty': (lambda m: m.answer(None, 'a?', repetition_penalty=0), ValueError, 'repetition_penalty: 0, expected'),
  'stop': (lambda m: m.answer(None, 'a?', stop=['']), ValueError, 'stop: .* not empty'),
  'room': (lambda m: m.answer(None, 'a?', max_tokens=7), DataError, 'max_tokens: 7, and there is room for 6; raise max_new_tokens'),
  'chat': (lambda m: m.chat([None]), DataError, 'chat: 1 images, expected one or none'),
}


@pytest.mark.parametrize('name', WRONG)
def test_mistakes_are_one_line(name, model):
  call, kind, words = WRONG[name]
  with pytest.raises(kind, match=words) as error:
    call(model)
  assert '\n' not in str(error.value)


def test_stages_by_name(tiny_checkpoint):
  info = checkpoint.read_info(tiny_checkpoint)
  cuts = lambda stages: [(s.selector, s.start, s.image_tokens) for s in api.run_of(info, stages).stages]
  assert cuts('dense') == [('all', 0, 0)] and cuts(None) == []
  assert api.run_of(info, 'dynamic').stages == info.stages
  assert cuts('fastv') == [('all', 0, 0), ('fastv', 1, 3)] and cuts('fastv_5')[1] == ('fastv', 1, 5)
  assert api.run_of(info, 'visionzip_8').reducer.name == 'visionzip'
  assert cuts([dict(start=0), dl.Stage(start=1, selector='uniform', image_tokens=4)])[1] == ('uniform', 1, 4)
  for stages, words in (('fast', 'is unknown'), ('fastv_99', 'keeps 99 image tokens'), ([], 'empty'), ([dict(begin=1)], 'begin')):
    with pytest.raises(ConfigError, match=words):
      api.run_of(info, stages)


def test_importing_the_package_is_quick_and_brings_no_jax():
  code = (
    'import sys, time; start = time.perf_counter(); import dynllava_jax as dl; took = time.perf_counter() - start\n'
    'assert "jax" not in sys.modules and took < 0.3, took\n'
    'dl.Stage; assert "jax" not in sys.modules and set(dl.__all__) <= set(dir(dl))\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})


def test_what_is_exported_is_documented():
  text = pathlib.Path(ROOT, 'docs/inference.md').read_text()
  assert all(f'`{name}`' in text for name in dl.__all__) and all(getattr(dl, name).__doc__ for name in dl.__all__)
