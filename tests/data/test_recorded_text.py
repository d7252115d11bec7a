"""What LLaVA's own preprocessing gave for the recorded samples, in both tokenizer modes."""

import json

import numpy as np
import pytest
from conftest import GOLDEN

from dynllava_jax.config import IGNORE, IMAGE_ID, VisionConfig
from dynllava_jax.data.batches import encode_turns, make_row
from dynllava_jax.data.conversation import ROLES, TEMPLATES, encode, render
from dynllava_jax.data.samples import DataError, Sample
from dynllava_jax.data.tokenizer import load_tokenizer, read_files

FOLDERS = {'legacy': 'tok', 'nonlegacy': 'tok_nonlegacy'}
RECORDED = json.loads((GOLDEN / 'text' / 'text_cases.json').read_text())
CASES = {case['id']: case for case in RECORDED['cases']}
NAMES = {'v1': 'vicuna_v1'}  # the training code's other names

# Where the original gives nothing usable: masks everything, merges turns, raises, or drops the image without a word.
REFUSED = {
  'a13': 'empty_answer',
  'a14': 'empty_answer',  # merged with the next round
  'a23': 'separator_in_text',
  'a25': 'separator_in_text',
  'a28': 'wrong_roles',
  'a29': 'image_without_placeholder',
  'a31': 'placeholder_in_answer',  # -200 among the labels
  'a32': 'placeholder_without_image',  # tokenized as text
  'a33': 'no_supervised_token',
  'a34': 'separator_in_text',
  'a40': 'wrong_roles',
  'a47': 'separator_in_text',
}
# Other models' switches: start and end tokens around the image, the mmtag template, a text-only run on image data.
NOT_OURS = ('a43', 'a44', 'a45')
# Masked whole by the original, which cannot count them with LLaMA's tokenizer. Ours supervises the answers.
MASKED = ('a41', 'a42')


@pytest.fixture(scope='module', params=FOLDERS)
def mode(request):
  return request.param


@pytest.fixture(scope='module')
def tokenizer(mode):
  return load_tokenizer(read_files(GOLDEN / 'text' / FOLDERS[mode]))


def encoded(case, tokenizer):
  sample = case['sample']
  style = TEMPLATES[NAMES.get(case['conv_version'], case['conv_version'])]
  return encode_turns(sample['id'], sample['conversations'], 'image' in sample, style=style, tokenizer=tokenizer)


@pytest.mark.parametrize('name', [name for name in CASES if name not in {*REFUSED, *NOT_OURS, *MASKED}])
def test_ids_and_labels_are_the_recorded_ones(name, mode, tokenizer):
  want, have = CASES[name]['results'][mode], encoded(CASES[name], tokenizer)
  size = len(want['input_ids'])  # text-only samples were recorded cut to model_max_length
  assert size == len(have.ids) or ('image' not in CASES[name]['sample'] and size == CASES[name]['model_max_length'])
  assert have.ids[:size].tolist() == want['input_ids']
  assert have.labels[:size].tolist() == want['labels']


@pytest.mark.parametrize('name', REFUSED)
def test_what_the_original_spoils_is_refused_by_reason(name, tokenizer):
  case = CASES[name]
  sample = Sample(name, np.zeros((4, 4, 3), np.uint8) if 'image' in case['sample'] else None, case['sample']['conversations'])
  style = TEMPLATES[NAMES.get(case['conv_version'], case['conv_version'])]
  with pytest.raises(DataError, match=f'sample {name}') as caught:
    vision = VisionConfig(image_size=14)
    make_row(sample, 0, style=style, tokenizer=tokenizer, vision=vision, num_image=1, text_length=2048, training=True)
  assert caught.value.reason == REFUSED[name]


@pytest.mark.parametrize('name', MASKED)
def test_chatml_supervises_the_answers(name, mode, tokenizer):
  want, have = CASES[name]['results'][mode], encoded(CASES[name], tokenizer)
  assert have.ids.tolist() == want['input_ids'] and set(want['labels']) == {IGNORE}
  answers = [t['value'] + '<|im_end|>' for t in CASES[name]['sample']['conversations'][1::2]]
  assert tokenizer.decode(have.labels[have.labels != IGNORE]) == ''.join(answers)


def test_every_recorded_case_is_accounted_for():
  assert {*REFUSED, *NOT_OURS, *MASKED} <= CASES.keys() and len(CASES) == 47


def test_collated_batches_are_the_recorded_ones(mode, tokenizer):
  """Rows of a batch, the image one position: right padding, and LLaVA's cut."""
  vision = VisionConfig(image_size=14)  # one patch: the image takes as many positions as the placeholder
  for case in RECORDED['collator']:
    want = case['results'][mode]
    for r, sample in enumerate(case['samples']):
      image = np.zeros((4, 4, 3), np.uint8) if 'image' in sample else None
      if any('<unk>' in t['value'] for t in sample['conversations']):  # a hole in the original's attention mask
        continue
      row = make_row(
        Sample(sample['id'], image, sample['conversations']),
        0,
        style=TEMPLATES['vicuna_v1'],
        tokenizer=tokenizer,
        vision=vision,
        num_image=1,
        text_length=case['model_max_length'] - 1,
        training=True,
        truncate=True,
      )
      tokens = row.tokens.copy()
      if row.image_start >= 0:
        tokens[row.image_start] = IMAGE_ID
      size, length = len(want['input_ids'][r]), int(row.length)
      assert size <= case['model_max_length'] and sum(want['attention_mask'][r]) >= length
      assert tokens[:length].tolist() == want['input_ids'][r][:length]
      assert row.labels[:size].tolist() == want['labels'][r]
      assert set(want['labels'][r][length:]) <= {IGNORE}  # what is left of a question


def test_prompts_are_the_recorded_ones(mode, tokenizer):
  for case in RECORDED['inference_prompts']:
    turns = [{'from': ROLES[i % 2], 'value': m} for i, m in enumerate(case['messages']) if m]
    if 'exception' in case:
      with pytest.raises(DataError):
        render(turns, TEMPLATES[case['conv_mode']], 'x')
      continue
    text, _ = render(turns, TEMPLATES[case['conv_mode']], 'x')
    assert text == case['prompt']
    assert encode(text, [], tokenizer).ids.tolist() == case['results'][mode]['input_ids']
