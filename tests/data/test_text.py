"""Tokens, labels and rows of conversations."""

import numpy as np
import pytest

from dynllava_jax.config import IGNORE, IMAGE_ID, ConfigError, VisionConfig
from dynllava_jax.data import digits
from dynllava_jax.data.batches import cut, make_row
from dynllava_jax.data.conversation import TEMPLATES, check_template, encode, render, template
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.tokenizer import MODEL_FILE, load_tokenizer

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
  return load_tokenizer({MODEL_FILE: digits.tokenizer_model()})


def row(sample, tokenizer, text_length=60, **options):
  options = {'training': True} | options
  how = dict(style=STYLE, tokenizer=tokenizer, vision=VISION, num_image=VISION.num_patches)
  return make_row(sample, 5, **how, text_length=text_length, **options)


def answer(text):
  return {'from': 'gpt', 'value': text}


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


def test_prompt_of_a_second_turn(tokenizer):
  batch = row(Sample('x', IMAGE, TURNS[:3]), tokenizer, training=False)
  assert batch.answer_start == batch.length


@pytest.mark.parametrize(
  'sample, reason, message',
  [
    (Sample('s9', None, TURNS), 'placeholder_without_image', 'sample s9: has <image> but no image'),
    (Sample('s9', IMAGE, TURNS[2:]), 'image_without_placeholder', 'sample s9: has an image but no <image>'),
    (Sample('s9', None, TURNS[2:3] * 2), 'wrong_roles', "sample s9, turn 1: role 'human', expected 'gpt'"),
    (Sample('s9', IMAGE, (TURNS[0], answer(''))), 'empty_answer', 'sample s9, turn 1: is empty'),
    (Sample('s9', IMAGE, (TURNS[0], answer('a</s>b'))), 'separator_in_text', 'sample s9, turn 1: holds a separator'),
    (Sample('s9', IMAGE, (TURNS[0], answer('a <unk>'))), 'separator_in_text', "turn 1: holds the tokenizer's special token <unk>"),
    (Sample('s9', IMAGE, (TURNS[0], answer('<image>'))), 'placeholder_in_answer', 'sample s9, turn 1: <image> in an answer'),
    (Sample('s9', IMAGE, TURNS[:2] + TURNS[:2]), 'several_images', 'sample s9: 2 image tokens'),
    (Sample('s9', IMAGE, ()), 'malformed', 'sample s9: has no turns'),
    (Sample('s9', IMAGE, TURNS[:3]), 'no_supervised_token', 'sample s9: no supervised token'),
    (Sample('s9', IMAGE, (*TURNS[:1], answer('9 ' * 60))), 'too_long', 'sample s9: .* text tokens, the bucket has 60'),
  ],
)
def test_bad_samples_are_named(tokenizer, sample, reason, message):
  with pytest.raises(DataError, match=message) as caught:
    row(sample, tokenizer)
  assert caught.value.reason == reason


def test_text_may_fill_the_place_of_an_absent_image_in_training_only(tokenizer):
  sample = Sample('s9', None, (TURNS[2], answer('9 ' * 53)))
  assert row(sample, tokenizer).length > 60
  with pytest.raises(DataError, match='the bucket has 60'):
    row(sample, tokenizer, training=False)


def test_truncation_cuts_within_the_last_answer(tokenizer):
  sample = Sample('s9', IMAGE, (*TURNS[:1], answer('9 ' * 60)))
  batch = row(sample, tokenizer, truncate=True)
  assert batch.length == 76 == batch.labels.size and batch.labels[-1] == batch.tokens[-1] != IGNORE


def test_truncation_leaves_no_half_question(tokenizer):
  """Nothing after the last supervised token changes the loss, and the last answer must be one."""
  encoded = encode(*render(TURNS, STYLE, 'x'), tokenizer)
  first_end = int(np.flatnonzero(encoded.ids == tokenizer.eos_id)[0]) + 1
  short = cut(encoded, first_end + 3)
  assert len(short.ids) == first_end and short.labels[-1] == tokenizer.eos_id
  with pytest.raises(DataError, match='first answer lies beyond'):
    row(Sample('s9', IMAGE, TURNS), tokenizer, text_length=10, truncate=True)


def test_unknown_template_names_the_known_ones():
  with pytest.raises(ConfigError, match='plain_turns, vicuna_v1'):
    template('alpaca')


def test_a_template_whose_end_is_no_token_is_refused(tokenizer):
  check_template(TEMPLATES['vicuna_v1'], tokenizer)
  check_template(TEMPLATES['plain'], tokenizer)
  with pytest.raises(ConfigError, match=r'answers end in <\|im_end\|>'):
    check_template(TEMPLATES['chatml_direct'], tokenizer)
