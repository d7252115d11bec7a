"""Tokens, labels and rows of conversations."""

import json

import numpy as np
import pytest
from conftest import ROOT

from dynllava_jax.config import IGNORE, IMAGE_ID, ConfigError, VisionConfig
from dynllava_jax.data import digits
from dynllava_jax.data.batches import make_row
from dynllava_jax.data.conversation import TEMPLATES, encode, render, template
from dynllava_jax.data.images import preprocess
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.tokenizer import Tokenizer

VISION = VisionConfig(image_size=56, hidden_size=32, num_heads=4)
STYLE = TEMPLATES['plain_turns']
IMAGE = np.zeros((20, 40, 3), np.uint8)
TURNS = (
  {'from': 'human', 'value': '<image>\nWhat is the largest digit?'},
  {'from': 'gpt', 'value': '9'},
  {'from': 'human', 'value': 'How many digits are there?'},
  {'from': 'gpt', 'value': '11'},
)


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(digits.tokenizer_model())


def row(sample, tokenizer, text_length=60):
  return make_row(sample, 5, style=STYLE, tokenizer=tokenizer, vision=VISION, text_length=text_length)


def test_vicuna_text_is_llavas():
  text, spans = render(TURNS, TEMPLATES['vicuna_v1'], 'x')
  assert text.startswith('A chat between a curious user')
  assert text.endswith(
    'questions. USER: <image>\nWhat is the largest digit? ASSISTANT: 9</s>USER: How many digits are there? ASSISTANT: 11</s>'
  )
  assert [text[a:b] for a, b in spans] == [' 9</s>', ' 11</s>']


def test_labels_cover_answers_and_end_tokens_only(tokenizer):
  encoded = encode(*render(TURNS, STYLE, 'x'), tokenizer)
  supervised = encoded.labels[encoded.labels != IGNORE]
  assert tokenizer.decode(supervised) == '9 11'
  assert (supervised == tokenizer.eos_id).sum() == 2
  np.testing.assert_array_equal(encoded.ids[encoded.labels != IGNORE], supervised)
  assert encoded.ids[0] == tokenizer.bos_id and (encoded.ids == IMAGE_ID).sum() == 1


def test_prompt_is_a_prefix_of_the_conversation(tokenizer):
  """What generation is given equals what training saw before the answer."""
  whole = encode(*render(TURNS[:2], STYLE, 'x'), tokenizer)
  prompt = encode(*render(TURNS[:1], STYLE, 'x'), tokenizer)
  np.testing.assert_array_equal(prompt.ids, whole.ids[: len(prompt.ids)])
  assert whole.labels[len(prompt.ids)] != IGNORE


def test_row_layout(tokenizer):
  batch = row(Sample('x', IMAGE, TURNS), tokenizer)
  start, length = int(batch.image_start), int(batch.length)
  assert batch.tokens.shape == (76,) and (batch.tokens[length:] == tokenizer.pad_id).all()
  assert (batch.labels[start : start + 16] == IGNORE).all() and (batch.labels[length:] == IGNORE).all()
  assert tokenizer.decode(batch.labels[int(batch.answer_start) : length]) == '11'
  assert batch.pixels.shape == (56, 56, 3) and batch.seed == 5


def test_row_without_image(tokenizer):
  turns = ({'from': 'human', 'value': 'How many digits are there?'}, TURNS[1])
  batch = row(Sample('x', None, turns), tokenizer)
  assert batch.image_start == -1 and batch.length < 20


@pytest.mark.parametrize(
  'sample, message',
  [
    (Sample('s9', None, TURNS), 'sample s9: has <image> but no image'),
    (Sample('s9', IMAGE, TURNS[2:]), 'sample s9: has an image but no <image>'),
    (Sample('s9', IMAGE, TURNS[1:]), "sample s9, turn 0: role 'gpt', expected 'human'"),
    (Sample('s9', IMAGE, (TURNS[0], {'from': 'gpt', 'value': ' '})), 'sample s9, turn 1: is empty'),
    (Sample('s9', IMAGE, (TURNS[0], {'from': 'gpt', 'value': 'a</s>b'})), 'sample s9, turn 1: holds a separator'),
    (Sample('s9', IMAGE, (TURNS[0], {'from': 'gpt', 'value': '<image>'})), 'sample s9, turn 1: <image> in an answer'),
    (Sample('s9', IMAGE, TURNS[:2] + TURNS[:2]), 'sample s9: 2 image tokens'),
    (Sample('s9', IMAGE, ()), 'sample s9: has no turns'),
    (Sample('s9', IMAGE, TURNS[:3]), 'sample s9: no supervised token'),
  ],
)
def test_bad_samples_are_named(tokenizer, sample, message):
  with pytest.raises(DataError, match=message):
    row(sample, tokenizer)


def test_too_long_sample_is_named(tokenizer):
  with pytest.raises(DataError, match='sample s9: .* text tokens, the bucket has 10'):
    row(Sample('s9', IMAGE, TURNS), tokenizer, text_length=10)


def test_image_is_padded_in_the_mean_colour():
  out = preprocess(np.full((20, 40, 3), 255, np.uint8), VISION)
  assert out.shape == (56, 56, 3)
  np.testing.assert_array_equal(out[0, 28], [int(255 * m) for m in VISION.image_mean])
  np.testing.assert_array_equal(out[28, 28], [255, 255, 255])


def test_unknown_template_names_the_known_ones():
  with pytest.raises(ConfigError, match='plain_turns, vicuna_v1'):
    template('alpaca')


@pytest.mark.skipif(not (ROOT.parent / 'shared' / 'golden' / 'text').is_dir(), reason='recorded text cases are not here')
def test_non_legacy_tokenization_is_the_recorded_one():
  folder = ROOT.parent / 'shared' / 'golden' / 'text'
  tokenizer = Tokenizer((folder / 'tok_nonlegacy' / 'tokenizer.model').read_bytes())
  cases = [
    c
    for c in json.loads((folder / 'text_cases.json').read_text())['inference_prompts']
    if c['conv_mode'] in ('vicuna_v1', 'v1', 'llava_v1') and 'results' in c
  ]
  assert cases
  for case in cases:
    assert encode(case['prompt'], [], tokenizer).ids.tolist() == case['results']['nonlegacy']['input_ids'], case['prompt']
