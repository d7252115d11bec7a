"""Given answers read by a model token by token: perplexity of reference answers, agreement with another run's answers.

Every token passes the gate as in generation, so the cost of dropping generated tokens is seen, which short answers hide.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from dynllava_jax import sharding
from dynllava_jax.config import EvalConfig
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.data.tokenizer import EOS, Tokenizer
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.benchmarks.perplexity import perplexity
from dynllava_jax.evals.hosts import own_part
from dynllava_jax.evals.layout import Layout, Loaded, load_weights, pad_rows
from dynllava_jax.evals.runner import check_numbers, on_host, provenance
from dynllava_jax.evals.store import AnswerStore
from dynllava_jax.generate import Generator
from dynllava_jax.generated import Forced
from dynllava_jax.progress import progress

LENGTHS = 32  # answers are padded to a multiple of this


def reference_ids(question: Question, tokenizer: Tokenizer) -> list[list[int]]:
  """Token ids of a question's reference answers, one list per round, the end token included."""
  return [[i for i, _ in tokenizer.encode(f'{answer}{EOS}')] for answer in question.reference]


def read_answers(
  cfg: EvalConfig,
  loaded: Loaded,
  questions: Sequence[Question],
  answers: Sequence[Sequence[Sequence[int]]],
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  console: Console,
) -> list[dict[str, Any]]:
  """Reads `answers[i][round]` (token ids) after the prompts of question i; resumable, as `runner.answer_all`.

  The gate has the room that generation gives it, `config.max_new_tokens`, however long the answers are.

  Returns:
    On host 0, per question: `log_probs`, `best` and `kept` with a list or string per round, and how many kept ones were `evicted`.
  """
  used = [dataclasses.replace(q, text=q.text[: len(a)]) for q, a in zip(questions, answers)]
  layout = Layout(loaded, used, cfg.text_lengths, cfg.seed)
  what = provenance(cfg, loaded, used, mesh) | {'answers_sha256': hashlib.sha256(json.dumps(answers).encode()).hexdigest()}
  store = AnswerStore(folder, loaded.name, what) if jax.process_index() == 0 else None
  done = np.zeros(len(questions), bool)
  if store:
    done[list(store.rows)] = True
  if jax.process_count() > 1:
    done = multihost_utils.broadcast_one_to_all(done)
  if done.all():
    return store.finish() if store else []
  length = -(-max(len(r) for a in answers for r in a) // LENGTHS) * LENGTHS
  generator = Generator(
    loaded.model,
    loaded.stages,
    load_weights(loaded, mesh),
    max_new_tokens=cfg.max_new_tokens,
    eos_id=None,
    later_tokens=layout.later_tokens(),
    given_tokens=length * max(map(len, answers)),
    dtype=jnp.dtype(cfg.dtype),
    reducer=loaded.reducer,
    int8_cache=loaded.int8_cache,
  )
  with progress(console, f'{loaded.name} reading', int((~done).sum())) as advance:
    for chunk in layout.batches(np.flatnonzero(~done).tolist(), cfg.batch_size):
      own = own_part(chunk, cfg.batch_size, mesh)
      given = np.stack([pad_rows(answers[i], length, 0) for i in own])
      lengths = np.asarray([[len(r) for r in answers[i]] for i in own], np.int32)
      rounds, _ = force(generator, (layout.rows(own), given, lengths), mesh)
      check_numbers([np.isfinite(r.log_prob).all(-1) for r in rounds], [used[i].id for i in chunk], loaded)
      if store:
        store.add(_row(used[i], i, rounds, row, answers[i]) for row, i in enumerate(chunk))
      advance(len(chunk))
  return store.finish() if store else []


def force(generator: Generator, batch: Any, mesh: jax.sharding.Mesh) -> tuple[list[Forced], tuple[np.ndarray, ...]]:
  """(one result per round, `Generated.kept_image`). `batch`: (rows, answers int32[B, L + 1, T], lengths int32[B, L + 1])."""
  rows, given, lengths = to_mesh(batch, sharding.batch_sharding(mesh))
  turn, kept_image = generator.start(rows.prompt, rows.pixels)
  results = []
  for i in range(given.shape[1]):
    if i:
      turn, _ = generator.append(turn, rows.later[:, i - 1], rows.counts[:, i - 1])
    result, turn = generator.force(turn, given[:, i], lengths[:, i])
    results.append(on_host(result))
  return results, on_host(kept_image)


def _row(question: Question, i: int, rounds: Sequence[Forced], row: int, answer: Sequence[Sequence[int]]) -> dict[str, Any]:
  bits = lambda values: ''.join('01'[int(v)] for v in values)
  return {
    'question_id': question.id,
    'log_probs': [[round(float(x), 6) for x in r.log_prob[row, : len(a)]] for r, a in zip(rounds, answer)],
    'best': [bits(r.best[row, : len(a)]) for r, a in zip(rounds, answer)],
    'kept': [bits(r.kept[row, : len(a) - 1]) for r, a in zip(rounds, answer)],
    'evicted': int(rounds[-1].evicted[row]),
    'metadata': {'row': i},
  }


def with_perplexity(rows: Sequence[Mapping[str, Any]], read: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Answer rows whose metadata tells, per round, the reference's perplexity, its fed tokens and how many the gate kept.

  `reference_evicted` is how many of these were given up later, over all rounds.
  """
  result = []
  for row, own in zip(rows, read):
    known = {
      'perplexity': [perplexity(p) for p in own['log_probs']],
      'reference_fed': [len(k) for k in own['kept']],
      'reference_kept': [k.count('1') for k in own['kept']],
      'reference_evicted': own['evicted'],
    }
    result.append(dict(row) | {'metadata': row['metadata'] | known})
  return result


def agreement(read: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """How far a run goes along with the reference's own greedy answers, over all their tokens.

  `token_agreement` is the share of tokens that the run too would have chosen there, in %; `answer_perplexity` is
  exp of the mean negative log-probability of a token.
  """
  best = ''.join(bits for row in read for bits in row['best'])
  log_probs = [p for row in read for one in row['log_probs'] for p in one]
  return {'token_agreement': 100 * best.count('1') / len(best), 'answer_perplexity': perplexity(log_probs)}
