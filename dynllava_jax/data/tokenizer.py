"""SentencePiece tokenizer with LLaMA's special tokens, in its non-legacy form.

Non-legacy rule (transformers `legacy: false`, which the released LLaVA checkpoints imply): one word mark is put
before the whole text; what follows a special token has none.
"""

import io
from collections.abc import Iterable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

BOS, EOS = '<s>', '</s>'


class Tokenizer:
  """A SentencePiece model. `bos_id`, `eos_id` and `pad_id` are token ids; padding is `<unk>`, as in LLaVA."""

  def __init__(self, model: bytes):
    """Reads a serialised SentencePiece model; ValueError if it is none or lacks `<unk>`, `<s>`, `</s>`."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
      proto.ParseFromString(model)
    except Exception as e:  # protobuf's DecodeError is not public
      raise ValueError(f'tokenizer: not a SentencePiece model ({e})') from None
    proto.normalizer_spec.add_dummy_prefix = False  # marks are put by `encode_chunk`
    self.model = model
    self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    self.bos_id, self.eos_id, self.pad_id = self._pieces.bos_id(), self._pieces.eos_id(), self._pieces.unk_id()
    if min(self.bos_id, self.eos_id, self.pad_id) < 0:
      raise ValueError('tokenizer: the model lacks one of <unk>, <s>, </s>')

  def __len__(self) -> int:
    return len(self._pieces)

  def encode_chunk(self, text: str, mark: bool) -> list[tuple[int, int]]:
    """(token id, character offset) pairs of text without special tokens; `mark` puts a word mark in front."""
    proto = self._pieces.encode(' ' + text if mark else text, return_type='proto')
    return [(p.id, max(p.begin - mark, 0)) for p in proto.pieces]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids without special tokens, stripped."""
    special = (self.bos_id, self.eos_id, self.pad_id)
    return self._pieces.decode([int(i) for i in ids if int(i) not in special]).strip()

  def piece(self, token: int) -> str:
    """One token as it stands in the vocabulary, the word mark as a space."""
    return self._pieces.id_to_piece(int(token)).replace('▁', ' ')


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
