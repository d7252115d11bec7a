"""Evaluates several stage lists on the same questions."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dynllava_jax import checkpoint, sharding
from dynllava_jax.cache import CacheSpec
from dynllava_jax.checkpoint import CheckpointError, CheckpointInfo
from dynllava_jax.config import ConfigError, EvalConfig, EvalRun, check_stages
from dynllava_jax.data import conversation
from dynllava_jax.data.batches import Batch, make_row, stack
from dynllava_jax.data.pipeline import to_mesh
from dynllava_jax.data.samples import Sample
from dynllava_jax.data.sources import questions
from dynllava_jax.data.tokenizer import Tokenizer, load_tokenizer
from dynllava_jax.evals import costs, digits
from dynllava_jax.generate import Generated, Generator
from dynllava_jax.models.dynllava import Prompt

TABLE_WIDTH = 120  # where there is no terminal to ask
RESULTS_FILE, ANSWERS_FILE = 'results.json', 'answers.jsonl'


@dataclasses.dataclass(frozen=True)
class Answer:
  """One generated answer: the sample, its text and tokens, and what the selectors did.

  `kept` says of each token fed back whether the gate kept it; `kept_image` are the image tokens of the last stage.
  """

  sample: Sample
  text: str
  score: float
  tokens: np.ndarray
  kept: np.ndarray
  kept_image: np.ndarray
  prompt_text_tokens: int
  evicted: int


def evaluate(cfg: EvalConfig, path: str, out: pathlib.Path) -> dict[str, list[Answer]]:
  """Runs every stage list on the test split, prints the table and writes `results.json` and `answers.jsonl`.

  Args:
    cfg: the evaluation.
    path: checkpoint, DIR or DIR/STEP, of the runs that name none.
    out: directory for the results.

  Returns:
    All answers by run.

  Raises:
    CheckpointError, ConfigError: what is wrong with the checkpoint or the config.
  """
  models = {name: load_model(name, run, run.checkpoint or path) for name, run in cfg.runs.items()}
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_batch(cfg.batch_size, mesh)
  source = questions(cfg.data, cfg.seed, cfg.questions)
  samples = [source[i] for i in range(len(source))]
  console = Console() if Console().is_terminal else Console(width=TABLE_WIDTH)
  answers, results = {}, {}
  with sharding.on_mesh(mesh):
    for name, run in cfg.runs.items():
      info, tokenizer = models[name]
      used = run.checkpoint or path
      params = checkpoint.load_params(used, mesh)
      answers[name], seconds, compiled = answer_all(cfg, name, run, info, params, tokenizer, samples, mesh)
      results[name] = summarise(cfg, run, info, answers[name]) | {
        'checkpoint': used,
        'seconds': round(seconds, 1),
        'programs_compiled': compiled,
      }
  step = checkpoint.locate(path)[1]
  flops = 'flops_per_sample: every matrix product of tower, prefill and generated tokens, true dimensions, 2 per multiply-add'
  paper = 'paper_prefill_flops: 32 C^2 per token and layer + 4 N^2 C, image tokens only (arXiv 2412.00876)'
  report = {
    'runs': results,
    'questions': len(samples),
    'split': 'test',
    'checkpoint': str(path),
    'step': step,
    'dtype': cfg.dtype,
    'stages': {n: [dataclasses.asdict(s) for s in r.stages] for n, r in cfg.runs.items()},
    'conventions': [flops, paper, 'kv_bytes_per_sample: allocated, all layers'],
  }
  checkpoint.write_atomically(out / RESULTS_FILE, (json.dumps(report, indent=1) + '\n').encode())
  lines = [
    json.dumps(
      {
        'run': n,
        'id': a.sample.id,
        'task': a.sample.task,
        'question': a.sample.conversations[0]['value'],
        'expected': a.sample.conversations[1]['value'],
        'answer': a.text,
        'score': a.score,
      }
    )
    for n, every in answers.items()
    for a in every
  ]
  checkpoint.write_atomically(out / ANSWERS_FILE, ('\n'.join(lines) + '\n').encode())
  console.print(results_table(results))
  return answers


def load_model(name: str, run: EvalRun, path: str) -> tuple[CheckpointInfo, Tokenizer]:
  """Description and tokenizer of a run's checkpoint.

  Raises:
    CheckpointError, ConfigError: no checkpoint, no tokenizer, or a stage list that does not fit the model.
  """
  info = checkpoint.read_info(path)
  try:
    check_stages(run.stages, info.model)
  except ConfigError as e:
    raise ConfigError(f'config.runs.{name}: {e}') from None
  files = checkpoint.read_tokenizer(path)
  if files is None:
    raise CheckpointError(f'{path}: has no tokenizer; this evaluation needs the one it was trained with')
  return info, load_tokenizer(files)


def answer_all(
  cfg: EvalConfig,
  name: str,
  run: EvalRun,
  info: CheckpointInfo,
  params: dict[str, Any],
  tokenizer: Tokenizer,
  samples: list[Sample],
  mesh: jax.sharding.Mesh,
) -> tuple[list[Answer], float, int]:
  """(answers in the order of `samples`, seconds, programs compiled). Long questions share batches with long ones."""
  generator = Generator(
    info.model, run.stages, params, max_new_tokens=cfg.max_new_tokens, eos_id=tokenizer.eos_id, dtype=jnp.dtype(cfg.dtype)
  )
  order = sorted(range(len(samples)), key=lambda i: (samples[i].task in digits.LONG_TASKS, i))
  style = conversation.template(info.conversation)
  answers: list[Answer | None] = [None] * len(samples)
  start = time.monotonic()
  chunks = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
  for chunk in track(chunks, description=f'{name:>10}', transient=True):
    rows = [
      make_row(
        dataclasses.replace(samples[i], conversations=samples[i].conversations[:1]),
        i,
        style=style,
        tokenizer=tokenizer,
        vision=info.model.vision,
        text_length=cfg.data.text_length,
      )
      for i in chunk
    ]
    padded = stack(rows + rows[-1:] * (cfg.batch_size - len(rows)))  # one shape for all batches
    generated = _generate(generator, padded, mesh)
    for row, i in enumerate(chunk):
      answers[i] = _answer(samples[i], generated, row, tokenizer, info, int(padded.length[row]))
  return answers, time.monotonic() - start, generator.compilations()


def _generate(generator: Generator, batch: Batch, mesh: jax.sharding.Mesh) -> Generated:
  batch = to_mesh(batch, sharding.batch_sharding(mesh))
  prompt = Prompt(batch.tokens, batch.length, batch.image_start, batch.seed)
  return jax.device_get(generator(prompt, batch.pixels))


def _answer(sample: Sample, generated: Generated, row: int, tokenizer: Tokenizer, info: CheckpointInfo, length: int) -> Answer:
  tokens = generated.tokens[row, : generated.length[row]]
  text = tokenizer.decode(tokens)
  has_image = sample.image is not None
  return Answer(
    sample=sample,
    text=text,
    score=digits.score(sample, text),
    tokens=tokens,
    kept=generated.kept[row, : len(tokens) - 1],
    kept_image=generated.kept_image[-1][row],
    prompt_text_tokens=length - has_image * info.model.vision.num_patches,
    evicted=int(generated.evicted[row]),
  )


def summarise(cfg: EvalConfig, run: EvalRun, info: CheckpointInfo, answers: list[Answer]) -> dict[str, Any]:
  """The numbers of one row of the table, from what was counted at run time."""
  tasks = sorted({a.sample.task for a in answers})
  fed = sum(len(a.kept) for a in answers)
  long = [a for a in answers if a.sample.task in digits.LONG_TASKS]
  spec = CacheSpec(max_new_tokens=cfg.max_new_tokens)
  per_stage = costs.cache_bytes(info.model, run.stages, cfg.data.text_length, spec, jnp.dtype(cfg.dtype).itemsize)
  flops = [costs.sample_flops(info.model, run.stages, a.prompt_text_tokens, list(a.kept)) for a in answers]
  return {
    'accuracy': float(np.mean([a.score for a in answers])),
    'accuracy_by_task': {t: float(np.mean([a.score for a in answers if a.sample.task == t])) for t in tasks},
    'questions_by_task': {t: sum(a.sample.task == t for a in answers) for t in tasks},
    'image_tokens': len(answers[0].kept_image),
    'generated_kept': sum(int(a.kept.sum()) - a.evicted for a in answers) / max(fed, 1),
    'generated_kept_long_answers': sum(int(a.kept.sum()) - a.evicted for a in long) / max(sum(len(a.kept) for a in long), 1),
    'flops_per_sample': float(np.mean(flops)),
    'paper_prefill_flops': costs.paper_flops(costs.paper_setting(info.model, run.stages)),
    'kv_bytes_per_sample': int(sum(per_stage)),
    'kv_bytes_per_stage': per_stage,
    'evicted': sum(a.evicted for a in answers),
  }


def results_table(results: dict[str, dict[str, Any]]) -> Table:
  """The table people read."""
  table = Table(title='test split')
  for column in ('run', 'accuracy', 'short', 'long', 'image tokens', 'generated K/V kept', 'MFLOPs / sample', 'KV KiB / sample'):
    table.add_column(column, justify='left' if column == 'run' else 'right')
  for name, r in results.items():
    by_task, counts = r['accuracy_by_task'], r['questions_by_task']

    def mean(tasks):
      tasks = [t for t in tasks if t in counts]
      total = sum(counts[t] for t in tasks)
      return f'{sum(by_task[t] * counts[t] for t in tasks) / total:.1%}' if total else '-'

    table.add_row(
      name,
      f'{r["accuracy"]:.1%}',
      mean([t for t in counts if t not in digits.LONG_TASKS]),
      mean(digits.LONG_TASKS),
      str(r['image_tokens']),
      f'{r["generated_kept"]:.0%}',
      f'{r["flops_per_sample"] / 1e6:,.0f}',
      f'{r["kv_bytes_per_sample"] / 1024:,.0f}',
    )
  return table
