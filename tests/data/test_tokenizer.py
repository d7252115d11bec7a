"""Tokenizers: recorded ids, offsets, and the traps that are refused."""

import json

import pytest
from conftest import GOLDEN

from dynllava_jax.config import IMAGE_ID, ConfigError
from dynllava_jax.data import digits
from dynllava_jax.data.conversation import encode
from dynllava_jax.data.tokenizer import CONFIG_FILE, MAP_FILE, MODEL_FILE, load_tokenizer, read_files

FOLDERS = {'legacy': 'tok', 'nonlegacy': 'tok_nonlegacy'}
TEXT = GOLDEN / 'text'


@pytest.fixture(scope='module', params=FOLDERS)
def mode(request):
  return request.param


@pytest.fixture(scope='module')
def tokenizer(mode):
  return load_tokenizer(read_files(TEXT / FOLDERS[mode]))


def ids(tokenizer, text):
  return [tokenizer.bos_id] + [i for i, _ in tokenizer.encode(text)]


def test_ids_are_the_recorded_ones(mode, tokenizer):
  for case in json.loads((TEXT / 'text_cases.json').read_text())['raw_tokenization']:
    assert ids(tokenizer, case['text']) == case[mode]['ids'], case['text']
    assert tokenizer.decode(case[mode]['ids']) == case[mode]['decode_skip_special'].strip(), case['text']


def test_ids_are_transformers_4s_where_5_differs(mode, tokenizer):
  cases = json.loads((TEXT / 'tokenizer_compat.json').read_text())['differences']
  cases = [c for c in cases if c['tokenizer'] == mode]
  assert len(cases) > 5
  for case in cases:
    assert ids(tokenizer, case['text']) == case['ids_4_37_2_slow'], case['text']


def test_later_rounds_of_evaluation_scripts_are_the_recorded_ones(mode, tokenizer):
  for case in json.loads((TEXT / 'text_cases.json').read_text())['lvis_eval_text']:
    if case['tokenizer'] == mode:
      assert ids(tokenizer, case['later_round_text'])[1:] == case['later_round_ids'] or '<image>' in case['later_round_text']
      assert ids(tokenizer, case['answer'] + '</s>')[1:] == case['answer_ids_single_round_script']


def test_rows_of_a_model_beyond_the_vocabulary_stand_for_nothing(tokenizer):
  """Published models have some (padding to a multiple of 64), and a model may answer with them."""
  beyond = [len(tokenizer) + 3, 10**6]
  written = ids(tokenizer, 'a dog')
  assert tokenizer.decode([*written, *beyond]) == tokenizer.decode(written) == 'a dog'
  assert [tokenizer.piece(i) for i in beyond] == ['', '']


def test_offsets_count_characters(tokenizer):
  """SentencePiece counts bytes; a question in Chinese must not move the mask of its answer."""
  text = '日本語 🦒</s>naïve answer'
  pairs = tokenizer.encode(text)
  (end,) = (at for i, at in pairs if i == tokenizer.eos_id)
  assert text[end:].startswith('</s>')
  assert tokenizer.decode(i for i, at in pairs if at > end) == 'naïve answer'


def test_image_is_never_split(tokenizer):
  assert (encode('a<image>b <image>', [], tokenizer).ids == IMAGE_ID).sum() == 2


def files(**changes):
  found = read_files(TEXT / 'tok_nonlegacy')
  config = json.loads(found[CONFIG_FILE]) | changes
  return found | {CONFIG_FILE: json.dumps({k: v for k, v in config.items() if v is not None}).encode()}


def test_missing_legacy_key_is_refused():
  with pytest.raises(ConfigError, match='"legacy" is missing'):
    load_tokenizer(files(legacy=None))
  with pytest.raises(ConfigError, match='"legacy" is missing'):
    load_tokenizer({MODEL_FILE: files()[MODEL_FILE]})


def test_a_model_without_marks_of_its_own_needs_no_key():
  assert load_tokenizer({MODEL_FILE: digits.tokenizer_model()}).legacy is False


def test_padding_side_of_the_configuration_changes_nothing():
  """transformers 5 pads left where nothing is said; rows here are padded on the right, so nothing is asked."""
  assert vars(load_tokenizer(files(padding_side='left'))).keys() == vars(load_tokenizer(files())).keys()
  assert ids(load_tokenizer(files(padding_side='left')), 'Hello') == ids(load_tokenizer(files(padding_side=None)), 'Hello')


def test_added_tokens_are_one_token():
  added = json.loads(files()[CONFIG_FILE])['added_tokens_decoder'] | {'1800': {'content': '<pad>'}}
  tokenizer = load_tokenizer(files(added_tokens_decoder=added))
  assert ids(tokenizer, 'a<pad>') == [*ids(tokenizer, 'a'), 1800] and len(tokenizer) == 1801
  assert tokenizer.decode([1800]) == '' and tokenizer.piece(1800) == '<pad>'


@pytest.mark.parametrize(
  'decoder, message',
  [
    ([], 'added_tokens_decoder is .., expected an object'),
    ('x', "added_tokens_decoder is 'x'"),
    ({'1': {}}, r"added_tokens_decoder\['1'\]: the token None with the id 1"),
    ({'1': '<s>'}, 'the token None'),
    ({'x': {'content': '<s>'}}, "with the id 'x'"),
    ({'-5': {'content': '<x>'}}, "with the id '-5'"),
    ({'1': {'content': 5}}, 'the token 5'),
    ({'1': {'content': ''}}, "the token ''"),
    ({'5': {'content': '<s>'}}, "'<s>' with the id 5, but '<s>' has the id 1"),
    ({'2': {'content': '<x>'}}, "'<x>' with the id 2, but the id 2 is that of '</s>'"),
    ({'1800': {'content': '<x>'}, '1801': {'content': '<x>'}}, "'<x>' has the id 1800"),
    ({str(10**30): {'content': '<x>'}}, 'expected a text and a token id'),
  ],
  ids=str,
)
def test_added_tokens_that_are_none_or_contradict_the_model_are_refused(decoder, message):
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(files(added_tokens_decoder=decoder))


@pytest.mark.parametrize('decoder', [None, {}], ids=str)
def test_added_tokens_of_older_files(decoder):
  older = files(added_tokens_decoder=decoder) | {'added_tokens.json': b'{"<pad>": 1800}'}
  assert ids(load_tokenizer(older), 'a<pad>')[-1] == 1800
  with pytest.raises(ConfigError, match="added_tokens.json: '<pad>': .* is that of '</s>'"):
    load_tokenizer(older | {'added_tokens.json': b'{"<pad>": 2}'})
  with pytest.raises(ConfigError, match='added_tokens.json: holds .*, expected an object'):
    load_tokenizer(older | {'added_tokens.json': b'[1]'})


@pytest.mark.parametrize('content', [b'[]', b'null', b'"x"'])
def test_a_configuration_that_is_no_object_is_refused(content):
  with pytest.raises(ConfigError, match='tokenizer_config.json: holds .*, expected an object'):
    load_tokenizer(files() | {CONFIG_FILE: content})


@pytest.mark.parametrize('content, message', [(b'', 'vocabulary is empty'), (b'no model', 'not a SentencePiece model')])
def test_broken_model_is_refused(content, message):
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(files() | {MODEL_FILE: content})


def test_folder_without_tokenizer_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='holds no tokenizer'):
    read_files(tmp_path)


@pytest.fixture(scope='module')
def fast():
  """The files of a tiny byte-level BPE with chatml's markers, as Qwen's have."""
  tokenizers = pytest.importorskip('tokenizers')
  pytest.importorskip('transformers')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  bpe.train_from_iterator(['What is in the picture? A cat on a mat.'], trainer)
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'additional_special_tokens': ['<|im_start|>'],
    'padding_side': 'left',
  }
  return {'tokenizer.json': bpe.to_str().encode(), CONFIG_FILE: json.dumps(config).encode()}


def test_other_tokenizers_label_answers(fast):
  from dynllava_jax.config import IGNORE
  from dynllava_jax.data.conversation import TEMPLATES, check_template, render

  tokenizer = load_tokenizer(fast)
  check_template(TEMPLATES['chatml_direct'], tokenizer)
  assert tokenizer.bos_id is None and tokenizer.pad_id == 0
  turns = [{'from': 'human', 'value': '<image>\n日本 what?'}, {'from': 'gpt', 'value': 'A cat, naïve 🦒.'}]
  out = encode(*render(turns, TEMPLATES['chatml_direct'], 'x'), tokenizer)
  supervised = out.labels[out.labels != IGNORE]
  assert tokenizer.decode(supervised) == 'A cat, naïve 🦒.' and supervised[-1] == tokenizer.eos_id
  assert (out.ids == IMAGE_ID).sum() == 1


@pytest.mark.parametrize(
  'odd', [{'unk_token': ''}, {'tokenizer_class': 5}, {'eos_token': {'content': None}}, {'pad_token': ['x']}], ids=str
)
def test_names_that_are_no_texts_are_refused(odd, fast):
  changed = json.loads(fast[CONFIG_FILE]) | odd
  with pytest.raises(ConfigError, match=f'tokenizer_config.json: {next(iter(odd))} is .*, expected a text'):
    load_tokenizer(fast | {CONFIG_FILE: json.dumps(changed).encode()})


def test_other_tokenizers_with_an_empty_vocabulary_are_refused(fast):
  content = json.loads(fast['tokenizer.json'])
  content['model'] |= {'vocab': {}, 'merges': []}
  with pytest.raises(ConfigError, match='vocabulary is empty|cannot read'):
    load_tokenizer(fast | {'tokenizer.json': json.dumps(content).encode()})


@pytest.mark.parametrize('file', [CONFIG_FILE, MAP_FILE])
@pytest.mark.parametrize('name, own', [('bos_token', '<s>'), ('eos_token', '</s>'), ('unk_token', '<unk>')])
def test_special_tokens_of_other_files_are_those_of_the_model(file, name, own):
  given = files()
  table = json.loads(given[file])
  for value in (own, {'content': own}, None):
    load_tokenizer(given | {file: json.dumps(table | {name: value}).encode()})
  other = {f: json.dumps(json.loads(given[f]) | {name: None}).encode() for f in (CONFIG_FILE, MAP_FILE)}
  for value in ('<|im_end|>', {'content': '<|im_end|>'}):
    changed = {file: json.dumps(table | {name: value}).encode()}
    with pytest.raises(ConfigError, match=rf"{name} is .*, but '.*' in {CONFIG_FILE}; take the files"):
      load_tokenizer(given | changed)
    with pytest.raises(ConfigError, match=rf"{file}: {name} is '<.im_end.>', but that of {MODEL_FILE} is '{own}'"):
      load_tokenizer(given | other | changed)


@pytest.mark.parametrize('value', ['', 5, [], {'content': None}, True])
def test_special_tokens_that_are_no_text(value):
  for file in (CONFIG_FILE, MAP_FILE):
    table = json.loads(files()[file]) | {'eos_token': value}
    with pytest.raises(ConfigError, match=f'{file}: eos_token is .*, expected a text, or null'):
      load_tokenizer(files() | {file: json.dumps(table).encode()})
