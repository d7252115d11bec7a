"""Tokenizers: LLaMA's SentencePiece models by the rules of transformers' slow tokenizer, all others through `AutoTokenizer`.

A tokenizer is a bundle of files (`config.TOKENIZER_FILES`), as they lie beside a Hugging Face model; a checkpoint keeps
the bundle unchanged, so what decides how text is cut travels with the weights.

Where SentencePiece puts its word mark is decided by the key `legacy` of `tokenizer_config.json`:

    legacy      every stretch of text between special tokens gets a mark     USER -> ▁US ER  after </s>
    non-legacy  only the text as a whole gets one                            USER -> USER    after </s>

LLaVA's released checkpoints are non-legacy. transformers 4 takes a missing key for true, transformers 5 for false; here
it is refused. Only a model whose own normaliser puts no mark (`train_tokenizer` makes such) needs no key: it has no legacy form.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from dynllava_jax import paths
from dynllava_jax.config import TOKENIZER_FILES, ConfigError
from dynllava_jax.files import read_regular

BOS, EOS, UNK = '<s>', '</s>', '<unk>'
MODEL_FILE, CONFIG_FILE, MAP_FILE, OLDER_FILE = (
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
DECIDING = ('bos_token', 'eos_token', 'unk_token')  # how texts begin, end, and what has no token
MAX_ID = 10**7  # no vocabulary is larger: what is above is no token id
# Round trips of the self-check: words, figures, line breaks, and characters outside any vocabulary.
PROBES = ('What is in the picture?', 'Row 12: 3.5, (x)\n  indented', 'naïve 日本語 🦒')


class Tokenizer(Protocol):
  """Text to token ids and back. Rows are padded on the right with `pad_id`, whatever a tokenizer's own configuration says.

  Attributes:
    bos_id: starts every sequence; None if the tokenizer has none.
    eos_id, pad_id: token ids.
    special: strings that become one special token wherever they occur.
  """

  bos_id: int | None
  eos_id: int
  pad_id: int
  special: tuple[str, ...]

  def __len__(self) -> int:
    """1 + the largest token id."""

  def encode(self, text: str) -> list[tuple[int, int]]:
    """(token id, character offset) pairs of a text, special tokens in it recognised, nothing added around it."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids without special tokens and without rows that a model has beyond the vocabulary, stripped."""

  def piece(self, token: int) -> str:
    """One token as it stands in the vocabulary, the word mark as a space; '' for one beyond it."""


def read_files(folder: str | pathlib.Path) -> dict[str, bytes]:
  """The tokenizer's files in a folder; ConfigError if there are none."""
  folder = paths.given(folder, 'tokenizer') if isinstance(folder, str) else folder
  files = {name: content for name in TOKENIZER_FILES if (content := _content(folder / name)) is not None}
  if not files.keys() & {MODEL_FILE, 'tokenizer.json', 'vocab.json'}:
    raise ConfigError(f'{folder}: holds no tokenizer ({MODEL_FILE} or tokenizer.json); give the folder of a Hugging Face model')
  return files


def _content(path: paths.Given) -> bytes | None:
  """None if there is no such file; ConfigError if there is something that cannot be read."""
  if not paths.is_local(path):
    return path.read_bytes() if path.is_file() else None
  if not os.path.lexists(path):
    return None
  try:
    return read_regular(path)
  except OSError as e:
    raise ConfigError(f'{path}: cannot be read ({e.strerror}); copy it again') from None


def load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
  """The tokenizer that a bundle of files describes, after a self-check.

  Raises:
    ConfigError: unreadable, no vocabulary, special tokens missing, `legacy` missing, or texts do not survive it.
  """
  tokenizer = SentencePieceTokenizer(files) if MODEL_FILE in files else FastTokenizer(files)
  _self_check(tokenizer)
  return tokenizer


def _self_check(tokenizer: Tokenizer) -> None:
  for token in tokenizer.special:
    if len(tokenizer.encode(token)) != 1:
      raise ConfigError(f'tokenizer: {token} is split into {len(tokenizer.encode(token))} tokens, expected one')
  if tokenizer.encode(EOS) != [(tokenizer.eos_id, 0)] and EOS in tokenizer.special:
    raise ConfigError(f'tokenizer: {EOS} becomes {tokenizer.encode(EOS)}, expected its id {tokenizer.eos_id}')
  for text in PROBES:
    ids = [i for i, _ in tokenizer.encode(text)]
    if max(ids, default=0) >= len(tokenizer) or tokenizer.decode(ids) != text:
      raise ConfigError(f'tokenizer: {text!r} comes back as {tokenizer.decode(ids)!r}; is its vocabulary empty or incomplete?')


def read_table(files: Mapping[str, bytes], name: str) -> dict:
  """The object in a JSON file of a bundle, empty if there is no such file; ConfigError if it holds something else."""
  try:
    table = json.loads(files.get(name, b'{}'))
  except (ValueError, RecursionError) as e:
    raise ConfigError(f'{name}: unreadable ({e})') from None
  if not isinstance(table, dict):
    raise ConfigError(f'{name}: holds {reprlib.repr(table)}, expected an object of names and values')
  return table


def _added(files: Mapping[str, bytes], pieces: Sequence[str]) -> dict[str, int]:
  """Ids of the tokens that the configuration adds to `pieces` or names among them: those of `added_tokens_decoder`, or of
  `added_tokens.json` where the configuration has none (as transformers before 4.34 wrote it).

  Raises:
    ConfigError: an entry is no token, or says another thing than the model or than another entry.
  """
  decoder = read_table(files, CONFIG_FILE).get('added_tokens_decoder')
  if decoder is None or decoder == {}:
    named = [(f'{OLDER_FILE}: {token!r}', token, i) for token, i in read_table(files, OLDER_FILE).items()]
  elif isinstance(decoder, dict):
    where = f'{CONFIG_FILE}: added_tokens_decoder'
    texts = {key: entry.get('content') if isinstance(entry, dict) else None for key, entry in decoder.items()}
    named = [(f'{where}[{key!r}]', text, int(key) if key.isdecimal() else key) for key, text in texts.items()]
  else:
    raise ConfigError(f'{CONFIG_FILE}: added_tokens_decoder is {reprlib.repr(decoder)}, expected an object of ids and tokens')
  ids, tokens = {piece: i for i, piece in enumerate(pieces)}, dict(enumerate(pieces))
  for where, token, i in named:
    if type(i) is not int or not 0 <= i < MAX_ID or not isinstance(token, str) or not token:
      raise ConfigError(f'{where}: the token {reprlib.repr(token)} with the id {reprlib.repr(i)}, expected a text and a token id')
    if ids.setdefault(token, i) != i or tokens.setdefault(i, token) != token:
      there = f'{token!r} has the id {ids[token]}' if ids[token] != i else f'the id {i} is that of {tokens[i]!r}'
      raise ConfigError(f'{where}: {token!r} with the id {i}, but {there}; take the files that lie beside the weights')
  return {token: i for _, token, i in named}


def _named(files: Mapping[str, bytes]) -> dict[str, tuple[str, str]]:
  """(token, file that names it) of each special token that the configuration names.

  Raises:
    ConfigError: a name, or that of the class, is no text, with which transformers would go on for a while; or two files name two.
  """
  found: dict[str, tuple[str, str]] = {}
  for file in (CONFIG_FILE, MAP_FILE):
    table = read_table(files, file)
    for name in ('tokenizer_class', *(f'{which}_token' for which in ('bos', 'eos', 'unk', 'pad', 'sep', 'cls', 'mask'))):
      value = table.get(name)
      text = value.get('content') if isinstance(value, dict) else value
      if value is None:
        continue
      if not isinstance(text, str) or not text:
        raise ConfigError(f'{file}: {name} is {reprlib.repr(value)}, expected a text, or null')
      token, whose = found.setdefault(name, (text, file))
      if token != text and name in DECIDING:
        raise ConfigError(f'{file}: {name} is {text!r}, but {token!r} in {whose}; take the files that lie beside the weights')
  return found


class SentencePieceTokenizer:
  """A `tokenizer.model`, cut as transformers 4.37's slow LLaMA tokenizer does. Padding is `<unk>`, as in LLaVA."""

  def __init__(self, files: Mapping[str, bytes]):
    """ConfigError if it is no SentencePiece model, lacks a special token, or does not say whether it is legacy."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
      proto.ParseFromString(files[MODEL_FILE])
    except Exception as e:  # protobuf's DecodeError is not public
      raise ConfigError(f'{MODEL_FILE}: not a SentencePiece model ({e})') from None
    if not proto.pieces:
      raise ConfigError(f'{MODEL_FILE}: its vocabulary is empty')
    if proto.normalizer_spec.remove_extra_whitespaces:
      raise ConfigError(f"{MODEL_FILE}: removes whitespace, which LLaMA's tokenizers do not; give a tokenizer.json instead")
    config = read_table(files, CONFIG_FILE)
    self.legacy = config.get('legacy') if proto.normalizer_spec.add_dummy_prefix else False
    if not isinstance(self.legacy, bool):
      raise ConfigError(
        f'{CONFIG_FILE}: the key "legacy" is missing or no true/false, and it decides how text after {EOS} is cut; '
        "take the file that lies beside the model's weights (LLaVA-1.5: false)"
      )
    proto.normalizer_spec.add_dummy_prefix = False  # marks are put by `encode`
    self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids = {BOS: self._pieces.bos_id(), EOS: self._pieces.eos_id(), UNK: self._pieces.unk_id()}
    missing = [token for token, i in ids.items() if i < 0 or self._pieces.id_to_piece(i) != token]
    if missing:
      raise ConfigError(f'{MODEL_FILE}: has no {", ".join(missing)}')
    for name, own in zip(DECIDING, ids):
      token, file = _named(files).get(name, (own, ''))
      if token != own:
        raise ConfigError(f'{file}: {name} is {token!r}, but that of {MODEL_FILE} is {own!r}; take the files beside the weights')
    self.bos_id, self.eos_id, self.pad_id = ids.values()
    self._ids = ids | _added(files, [p.piece for p in proto.pieces])
    self._added = {i: token for token, i in self._ids.items()}
    self._split = re.compile('(' + '|'.join(map(re.escape, sorted(self._ids, key=len, reverse=True))) + ')')
    self.special = tuple(self._ids)

  def __len__(self) -> int:
    return max(len(self._pieces), 1 + max(self._added))

  def encode(self, text: str) -> list[tuple[int, int]]:
    """See `Tokenizer`."""
    out, offset = [], 0
    for stretch in self._split.split(text):
      if stretch in self._ids:
        out.append((self._ids[stretch], offset))
      elif stretch:
        mark = self.legacy or offset == 0
        proto = self._pieces.encode(' ' + stretch if mark else stretch, return_type='proto')
        begins = [max(p.begin - mark, 0) for p in proto.pieces]  # in bytes
        if not stretch.isascii():
          content = stretch.encode()
          begins = [len(content[:at].decode(errors='ignore')) for at in begins]
        out += [(p.id, offset + at) for p, at in zip(proto.pieces, begins)]
      offset += len(stretch)
    return out

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`."""
    return self._pieces.decode([int(i) for i in ids if int(i) not in self._added and int(i) < len(self._pieces)]).strip()

  def piece(self, token: int) -> str:
    """See `Tokenizer`."""
    token = int(token)
    if token not in self._added and token >= len(self._pieces):
      return ''
    return self._added[token] if token in self._added else self._pieces.id_to_piece(token).replace('▁', ' ')


class FastTokenizer:
  """Any other tokenizer, through transformers' `AutoTokenizer` (the Rust ones, which know character offsets)."""

  def __init__(self, files: Mapping[str, bytes]):
    """ConfigError if it cannot be read, is not fast, has no end token or an empty vocabulary."""
    _named(files)
    with tempfile.TemporaryDirectory() as folder, _readable(files):
      from transformers import AutoTokenizer  # here, because it takes seconds and most runs do not need it

      for name, content in files.items():
        (pathlib.Path(folder) / name).write_bytes(content)
      self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not self._tokenizer.is_fast:
      raise ConfigError('tokenizer: there is no fast version of it, and only that tells where a token begins')
    if self._tokenizer.eos_token_id is None:
      raise ConfigError(f'{CONFIG_FILE}: names no eos_token, so an answer could not end')
    vocabulary = self._tokenizer.get_vocab()
    if len(vocabulary) <= len(self._tokenizer.all_special_tokens):
      raise ConfigError(f'tokenizer: its vocabulary is empty ({len(vocabulary)} entries)')
    self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
    pads = (self._tokenizer.pad_token_id, self._tokenizer.unk_token_id, self.eos_id)
    self.pad_id = next(i for i in pads if i is not None)
    self.special = tuple(self._tokenizer.all_special_tokens)
    self._size = 1 + max(vocabulary.values())

  def __len__(self) -> int:
    return self._size

  def encode(self, text: str) -> list[tuple[int, int]]:
    """See `Tokenizer`."""
    out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(i, start) for i, (start, _) in zip(out['input_ids'], out['offset_mapping'])]

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

  def piece(self, token: int) -> str:
    """See `Tokenizer`."""
    return (self._tokenizer.convert_ids_to_tokens(int(token)) or '').replace('▁', ' ').replace('Ġ', ' ')


@contextlib.contextmanager
def _readable(files: Mapping[str, bytes]) -> Iterator[None]:
  """What transformers makes of broken files is of many types; here it is one message."""
  try:
    yield
  except ImportError as e:
    raise ConfigError(f'tokenizer: {", ".join(files)} need transformers ({e}); pip install transformers') from None
  except Exception as e:
    raise ConfigError(f'tokenizer: transformers cannot read {", ".join(files)} ({e})') from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a SentencePiece model (BPE, bytes as fallback, whitespace kept, punctuation on its own).

  Args:
    texts: pieces of text as they occur between special tokens; a word at the very start is learned without mark.
    vocab_size: exact number of pieces, 256 bytes and 3 special tokens included.
  """
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    vocab_size=vocab_size,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    user_defined_symbols=['\n', ',', '.', ':', '?'],
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()
