"""How often the answers of a corpus hold each token id: `token_counts.npy`, which data preparation writes beside the shards.

The gate `frequency` ranks generated tokens by it (`methods/frequency.py`).
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dynllava_jax.data.records import Record
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer


def count_answers(conversations: Iterable[Sequence[Mapping[str, str]]], tokenizer: Tokenizer) -> np.ndarray:
  """int64[V'] of all answers in conversations of LLaVA's form, V' as large as the largest id there needs."""
  ids = [i for turns in conversations for turn in turns if turn['from'] == 'gpt' for i, _ in tokenizer.encode(turn['value'])]
  return np.bincount(np.asarray(ids, np.int64), minlength=1)


def count_records(job: tuple[Sequence[Record], Mapping[str, bytes]]) -> np.ndarray:
  """`count_answers` of some records, with a tokenizer by the content of its files: for worker processes."""
  records, files = job
  return count_answers((r.conversations for r in records), load_tokenizer(files))


def as_file(parts: Iterable[np.ndarray]) -> bytes:
  """The sum of counts, int64[V'], as it stands in the file; ids beyond it were never seen."""
  total = np.zeros(1, np.int64)
  for part in parts:
    size = max(len(total), len(part))
    total = np.pad(total, (0, size - len(total))) + np.pad(part, (0, size - len(part)))
  out = io.BytesIO()
  np.save(out, total)
  return out.getvalue()
