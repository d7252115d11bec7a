"""Properties that hold for any conversation."""

import string

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dynllava_jax.config import IGNORE, IMAGE_ID
from dynllava_jax.data.batches import cut, encode_turns
from dynllava_jax.data.conversation import IMAGE_TOKEN, TEMPLATES, as_trained, encode, render
from dynllava_jax.data.samples import DataError
from dynllava_jax.data.tokenizer import load_tokenizer, read_files

TOKENIZERS = {mode: load_tokenizer(read_files(GOLDEN / 'text' / mode)) for mode in ('tok', 'tok_nonlegacy')}
CHAT = [name for name, style in TEMPLATES.items() if not style.caption and '<|' not in style.end]
texts = st.text(st.sampled_from(string.ascii_letters + ' .,:\n0123456789é日🦒'), min_size=1, max_size=30)
rounds = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
styles, modes = st.sampled_from(CHAT), st.sampled_from(list(TOKENIZERS))


def turns(pairs, image_at=None):
  out = []
  for i, (question, answer) in enumerate(pairs):
    out.append({'from': 'human', 'value': question + (f'\n{IMAGE_TOKEN}' if i == image_at else '')})
    out.append({'from': 'gpt', 'value': answer})
  return out


@settings(max_examples=60, deadline=None)
@given(rounds, styles, modes)
def test_supervised_tokens_spell_the_answers(pairs, name, mode):
  tokenizer, style = TOKENIZERS[mode], TEMPLATES[name]
  text, spans = render(turns(pairs), style, 'x')
  out = encode(text, spans, tokenizer)
  assert [text[a:b] for a, b in spans] == [style.answer + answer + style.end for _, answer in pairs]
  supervised = out.labels[out.labels != IGNORE]
  assert (supervised == tokenizer.eos_id).sum() == len(pairs) == (out.ids == tokenizer.eos_id).sum()
  groups = np.split(supervised, np.flatnonzero(supervised == tokenizer.eos_id)[:-1] + 1)
  for group, (_, answer) in zip(groups, pairs):
    assert tokenizer.decode(group) == answer.strip()
  assert out.labels[-1] == tokenizer.eos_id and out.labels[0] == IGNORE


@settings(max_examples=60, deadline=None)
@given(rounds, styles, modes, st.data())
def test_the_image_is_one_placeholder_outside_the_answers(pairs, name, mode, data):
  at = data.draw(st.integers(0, len(pairs) - 1))
  out = encode_turns('x', turns(pairs, at), True, style=TEMPLATES[name], tokenizer=TOKENIZERS[mode])
  (where,) = np.flatnonzero(out.ids == IMAGE_ID)
  assert out.labels[where] == IGNORE
  question = as_trained(turns(pairs, at), 'x')[2 * at]['value']
  assert question.startswith(IMAGE_TOKEN) and question.count(IMAGE_TOKEN) == 1


@settings(max_examples=60, deadline=None)
@given(rounds, styles, modes)
def test_a_prompt_is_the_beginning_of_its_conversation(pairs, name, mode):
  """An answer that starts with a blank may merge with the template's blank, so such are left out."""
  pairs = [(q, 'x' + a) for q, a in pairs]
  whole = encode(*render(turns(pairs), TEMPLATES[name], 'x'), TOKENIZERS[mode])
  prompt = encode(*render(turns(pairs)[:-1], TEMPLATES[name], 'x'), TOKENIZERS[mode])
  np.testing.assert_array_equal(whole.ids[: len(prompt.ids)], prompt.ids)
  assert (whole.labels[len(prompt.ids) :] != IGNORE).all()


@settings(max_examples=60, deadline=None)
@given(rounds, st.integers(1, 200), modes)
def test_cutting_keeps_a_prefix_that_ends_supervised(pairs, size, mode):
  whole = encode(*render(turns(pairs), TEMPLATES['vicuna_v1'], 'x'), TOKENIZERS[mode])
  short = cut(whole, size)
  assert len(short.ids) <= size
  np.testing.assert_array_equal(short.ids, whole.ids[: len(short.ids)])
  assert not len(short.ids) or short.labels[-1] != IGNORE


@settings(max_examples=40, deadline=None)
@given(rounds, styles, st.data())
def test_a_separator_anywhere_is_refused(pairs, name, data):
  spoilt = turns(pairs)
  turn = spoilt[data.draw(st.integers(0, len(spoilt) - 1))]
  at = data.draw(st.integers(0, len(turn['value'])))
  separator = data.draw(st.sampled_from(TEMPLATES[name].separators))
  turn['value'] = turn['value'][:at] + separator + turn['value'][at:]
  with pytest.raises(DataError) as caught:
    render(spoilt, TEMPLATES[name], 'x')
  assert caught.value.reason == 'separator_in_text'
