"""Gate: rare tokens stay, as counted in what was generated so far, or in a corpus (`data.frequencies` writes the table)."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np

from dynllava_jax import paths, remote
from dynllava_jax.config import ConfigError
from dynllava_jax.config.parsing import require
from dynllava_jax.files import read_regular
from dynllava_jax.methods.gate import Fed, Gate, GateOptions, GateState

LARGEST = 2**26  # bytes of a table, of vocabularies a hundred times as large as any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
  """`table`: file with how often a corpus holds each token id, int64[V] as numpy saves it; '' counts in the context."""

  table: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.table:
      read(self.table)


@functools.cache
def read(path: str) -> np.ndarray:
  """int64[V] counts; ConfigError for a file that has none."""
  try:
    content = io.BytesIO(read_regular(remote.fetched(paths.given(path, 'table')), LARGEST))
    counts = np.lib.format.read_array(content, allow_pickle=False)
  except Exception as e:  # numpy and tokenize each have their own
    raise ConfigError(f'table: {path}: {e}; data preparation writes one, token_counts.npy') from None
  require(
    counts.ndim == 1 and np.issubdtype(counts.dtype, np.integer) and counts.size and counts.min() >= 0 and counts.sum() > 0,
    f'table: {path} holds {counts.dtype} of shape {counts.shape}, expected a count for each token id',
  )
  return counts


def score(fed: Fed, state: GateState, options: Options) -> jax.Array:
  """-log of the token's share of the corpus (each token once more than counted), or how rarely it was fed before."""
  if not options.table:
    return -(state.before & (state.memory['tokens'] == fed.token[:, None])).sum(-1).astype(jnp.float32)
  counts = np.append(read(options.table) + 1, 1)  # the last for all ids beyond the table
  rarity = jnp.asarray(-np.log(counts / counts[:-1].sum()), jnp.float32)
  return rarity[jnp.minimum(fed.token, len(counts) - 1)]


GATE = Gate(
  score=score,
  options=Options,
  memory=lambda rows, size, width, options: {} if options.table else {'tokens': jnp.zeros((rows, size), jnp.int32)},
  remember=lambda fed, options: {} if options.table else {'tokens': fed.token},
)
