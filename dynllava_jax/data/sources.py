"""Data sources by name.

`digits` teaches a model from nothing (captions first, then questions), `digits_instruct` is questions alone.
"""

from typing import Any

from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import digits
from dynllava_jax.data.tokenizer import MODEL_FILE, load_tokenizer

MIXES = {'digits': digits.FROM_NOTHING, 'digits_instruct': digits.INSTRUCT}


def _check(data: DataConfig) -> None:
  if data.source not in MIXES:
    raise ConfigError(f'config.data.source: {data.source!r} is unknown; expected one of {", ".join(MIXES)}')


def training_source(data: DataConfig, seed: int) -> Any:
  """Random-access source of training conversations; ConfigError for an unknown name."""
  _check(data)
  return digits.TrainingScenes('train', seed, MIXES[data.source])


def new_tokenizer(data: DataConfig, vocab_size: int) -> dict[str, bytes]:
  """The tokenizer of a model trained from nothing on this source.

  Raises:
    ConfigError: unknown source, or its tokenizer has more tokens than the model.
  """
  _check(data)
  tokenizer = {MODEL_FILE: digits.tokenizer_model()}
  size = len(load_tokenizer(tokenizer))
  if size > vocab_size:
    raise ConfigError(f'config.model.llama.vocab_size: {vocab_size}, but the tokenizer has {size} tokens')
  return tokenizer


def questions(data: DataConfig, seed: int, count: int) -> digits.Questions:
  """`count` questions of the test split with their answers; ConfigError for an unknown source."""
  _check(data)
  return digits.Questions('test', seed, count)
