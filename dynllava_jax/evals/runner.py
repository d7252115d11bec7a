"""Answers a benchmark's questions with one stage list: sharded over devices and hosts, resumable."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from dynllava_jax import checkpoint, sharding
from dynllava_jax.config import TOKENIZER_FILES, EvalConfig, to_dict
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.evals.benchmarks.base import Question
from dynllava_jax.evals.hosts import own_part
from dynllava_jax.evals.layout import Layout, Loaded, Rows, load_weights
from dynllava_jax.evals.store import AnswerStore, folder_sha256, pictures_sha256, questions_sha256, source_sha256, versions
from dynllava_jax.generate import Generator
from dynllava_jax.generated import Generated, Turn
from dynllava_jax.progress import progress

PICTURED = 100  # so many first questions keep the list of their image tokens, for pictures


@dataclasses.dataclass(frozen=True)
class RunResult:
  """A finished run: its answer rows in the order of the questions, and what making them took this time."""

  rows: list[dict[str, Any]]
  path: pathlib.Path
  seconds: float
  programs_compiled: int


def provenance(cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """All that the answers depend on, as it was found: of the mesh the sizes it has, of the devices what they call themselves."""
  directory, step = checkpoint.locate(loaded.path)
  sealed = directory / str(step) / checkpoint.INTEGRITY_FILE  # holds the digest of every array file
  if sealed.exists():
    checkpoint.sealed_files(sealed)  # refused if it is damaged, also one without end: if all is answered, nothing else reads it
  names = (checkpoint.MODEL_FILE, *TOKENIZER_FILES, f'{step}/{sealed.name if sealed.exists() else "params"}')
  return {
    'benchmark': cfg.benchmark,
    'questions': len(questions),
    'questions_sha256': questions_sha256(questions),
    'pictures_sha256': pictures_sha256(questions),
    'checkpoint': str(loaded.path),
    'step': step,
    'checkpoint_sha256': folder_sha256(directory, names),
    'conversation': loaded.info.conversation,
    'model': to_dict(loaded.model),
    'stages': [to_dict(s) for s in loaded.stages],
    'reducer': loaded.reducer.to_plain() if loaded.reducer else None,
    'quantization': loaded.quantization,
    'decoding': 'greedy',
    'seed': cfg.seed,
    'max_new_tokens': cfg.max_new_tokens,
    'text_lengths': list(cfg.text_lengths),
    'dtype': cfg.dtype,
    'batch_size': cfg.batch_size,
    'mesh': dict(mesh.shape),
    'device': mesh.devices.flat[0].device_kind,
    'versions': versions(),
    'source_sha256': source_sha256(),
  }


def answer_all(
  cfg: EvalConfig, loaded: Loaded, questions: Sequence[Question], out: pathlib.Path, mesh: jax.sharding.Mesh, console: Console
) -> RunResult:
  """Answers what `out/answers/RUN.jsonl` does not hold yet. Host 0 writes; all hosts return the same rows but it alone a path.

  Raises:
    CheckpointError, DataError: the checkpoint or a question cannot be used; finished answers stay on disk.
  """
  start = time.monotonic()
  layout = Layout(loaded, questions, cfg.text_lengths, cfg.seed)
  first_host = jax.process_index() == 0
  store = AnswerStore(out / 'answers', loaded.name, provenance(cfg, loaded, questions, mesh)) if first_host else None
  done = np.zeros(len(questions), bool)
  if store:
    done[list(store.rows)] = True
    if store.set_aside:
      console.print(f'{loaded.name}: {store.why} were moved to {store.set_aside}')
  if jax.process_count() > 1:
    done = multihost_utils.broadcast_one_to_all(done)
  compiled = 0
  if not done.all():
    generator = Generator(
      loaded.model,
      loaded.stages,
      load_weights(loaded, mesh),
      max_new_tokens=cfg.max_new_tokens,
      eos_id=loaded.tokenizer.eos_id,
      later_tokens=layout.later_tokens(),
      dtype=jnp.dtype(cfg.dtype),
      reducer=loaded.reducer,
      int8_cache=loaded.int8_cache,
    )
    if store and done.any():
      console.print(f'{loaded.name}: {done.sum()} of {len(questions)} answers are there already')
    batches = layout.batches(np.flatnonzero(~done).tolist(), cfg.batch_size)
    with progress(console, loaded.name, int((~done).sum())) as advance, concurrent.futures.ThreadPoolExecutor(1) as reader:
      ahead = reader.submit(layout.rows, own_part(batches[0], cfg.batch_size, mesh))
      for n, chunk in enumerate(batches):
        batch = ahead.result()
        if n + 1 < len(batches):
          ahead = reader.submit(layout.rows, own_part(batches[n + 1], cfg.batch_size, mesh))  # decoded while the device computes
        generated = generate(generator, batch, mesh)
        check_numbers([g.finite for g in generated], [questions[i].id for i in chunk], loaded)
        if store:
          store.add(answer_row(loaded, layout, i, generated, row) for row, i in enumerate(chunk))
        advance(len(chunk))
    compiled = generator.compilations()
  rows = store.finish() if store else []
  return RunResult(rows, store.path if store else out, time.monotonic() - start, compiled)


def generate(generator: Generator, rows: Rows, mesh: jax.sharding.Mesh) -> list[Generated]:
  """Answers of the whole batch, round by round, on every host. A later round sees the answers given so far."""
  rows = to_mesh(rows, sharding.batch_sharding(mesh))
  turn, kept_image = generator.start(rows.prompt, rows.pixels)
  answers = []
  for i in range(rows.later.shape[1] + 1):
    if i:
      turn, _ = generator.append(turn, rows.later[:, i - 1], rows.counts[:, i - 1])
    logits = turn.logits
    generated, cache = generator.decode(turn, rows.prompt.seed, kept_image)
    turn = Turn(cache, logits)
    answers.append(on_host(generated))
  return answers


def check_numbers(finite: Sequence[np.ndarray], ids: Sequence[str | int], loaded: Loaded) -> None:
  """FloatingPointError naming the first question for which the model did not compute numbers. `finite`: bool[B] of every round."""
  for row, id_ in enumerate(ids):
    if not all(f[row] for f in finite):
      raise FloatingPointError(
        f'question {id_}: the logits of {loaded.name} ({loaded.path}) are not finite; no answer was written. Look at its '
        'weights, or compute with --config.dtype=float32'
      )


def on_host(tree: Any) -> Any:
  """Arrays of the whole batch as numpy, on every host."""
  return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def from_first_host(value: Any) -> Any:
  """A JSON-ready value that host 0 has, on every host."""
  if jax.process_count() == 1:
    return value
  content = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int64(len(content))))
  buffer = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    buffer[:] = np.frombuffer(content, np.uint8)
  return json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())


def given_up(kept: np.ndarray, margin: np.ndarray, evicted: int) -> list[int]:
  """Which kept tokens a full cache gave up: it always takes the smallest margin, so in the end the largest of all remain.

  Args:
    kept: bool[T]; margin: float[T], of the tokens fed; evicted: how many were given up.
  """
  return sorted(np.argsort(np.where(kept, margin, np.inf))[:evicted].tolist())


def answer_row(loaded: Loaded, layout: Layout, i: int, rounds: Sequence[Generated], row: int) -> dict[str, Any]:
  """One line of the answer file: LLaVA's fields, and under `metadata` what was counted at run time.

  `metadata.kept` has a character per token fed back, 1 where the gate kept it; the last token of a round is never fed.
  `metadata.layers`, in a run with exits, has the decoder layers that each token was drawn behind.
  Of a conversation of several rounds `text` is a list, and `tokens` and `kept` run through all of them. The first questions
  also tell which image tokens were kept, and which kept tokens were given up later because the cache was full.
  """
  question = layout.questions[i]
  kept_image = rounds[0].kept_image[-1][row] if question.image is not None else np.zeros(0, int)
  tokens = [g.tokens[row, : g.length[row]].tolist() for g in rounds]
  texts = [loaded.tokenizer.decode(t) for t in tokens]
  fed = [slice(len(t) - 1) for t in tokens]
  kept = np.concatenate([g.kept[row, f] for g, f in zip(rounds, fed)])
  metadata = {
    'row': i,
    'rendered_prompt': layout.rendered[i],
    'prompt_text_tokens': layout.text_tokens[i] + sum(map(len, layout.later[i])),
    'text_length': layout.bucket[i] + layout.later_tokens(),
    'image_tokens': len(kept_image),
    'tokens': [t for one in tokens for t in one],
    'kept': ''.join('01'[int(k)] for k in kept),
    'evicted': int(rounds[-1].evicted[row]),
  }
  if rounds[0].layers is not None:
    metadata['layers'] = [n for g in rounds for n in g.layers[row, : g.length[row]].tolist()]
  if question.long:
    metadata['long'] = True
  if len(rounds) > 1:
    metadata['first_round'] = len(tokens[0])
  if i < PICTURED:
    metadata['kept_image'] = kept_image.tolist()
    margin = np.concatenate([g.margin[row, f] for g, f in zip(rounds, fed)])
    metadata['given_up'] = given_up(kept, margin, metadata['evicted'])
  identity = hashlib.sha256(f'{loaded.path} {loaded.name} {i} {layout.rendered[i]}'.encode()).hexdigest()
  return {
    'question_id': question.id,
    'prompt': question.prompt,
    'text': texts[0] if len(texts) == 1 else texts,
    **question.extra,
    'answer_id': identity[:22],
    'model_id': loaded.name,
    'metadata': metadata,
  }
