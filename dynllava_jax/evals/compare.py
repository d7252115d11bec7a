"""Several finished runs side by side: numbers of each, differences to the reference, tables and a plot."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from dynllava_jax import costs
from dynllava_jax.cache import CacheSpec
from dynllava_jax.config import EvalConfig
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals import depth, published, score
from dynllava_jax.evals.answers import Labels, join
from dynllava_jax.evals.benchmarks.base import Benchmark, Problems
from dynllava_jax.evals.layout import Loaded
from dynllava_jax.evals.runner import RunResult

matplotlib.use('Agg')
matplotlib.rcParams['text.parse_math'] = False  # a `$` in a question or a name is no formula

CONVENTIONS = (
  'flops_per_sample: every matrix product of tower, prefill and generated tokens, true dimensions, 2 per multiply-add',
  'prefill_flops: the decoder over image tokens, true dimensions',
  'paper_prefill_flops: 32 C^2 per token and layer + 4 N^2 C, image tokens only (arXiv 2412.00876, section 4.1)',
  'image_tokens_layer_average: mean over the decoder layers, as tables of in-decoder pruning count; image_tokens: last stage',
  'budget (nominal): image tokens that a run was set for; of methods that only shrink the cache, so many are left in it',
  'kv_bytes_per_sample: allocated, all layers (of a run that leaves early: before caches of layers that nobody needs are freed)',
  'layers_run: decoder layers behind which the tokens of an answer were drawn, mean over answers',
  'mixture: score of questions that are answered at random at the two next fixed depths among the runs, as many layers on average',
  'interval, difference_interval: 95 % bootstrap over images, the second paired with the reference',
)
MARKERS, COLORS = 'os^Dv*Ph', 10  # of a picture's points: each run another pair
NAMES_PER_COLUMN = 20  # of its legend
COLUMNS = {
  'score': 'score (95 % interval)',
  'difference': 'difference',
  'answers_differ': 'answers that differ',
  'published': 'published for LLaVA-1.5-7B',
  'budget': 'image tokens, nominal',
  'image_tokens_layer_average': 'image tokens, layer average',
  'generated_kept': 'generated K/V kept',
  'layers_run': 'layers run, mean',
  'mixture': 'fixed depths mixed at random, as many layers',
  'flops_per_sample': 'true FLOPs / sample',
  'paper_prefill_flops': "paper's prefill FLOPs",
  'kv_bytes_per_sample': 'KV / sample',
}


def costs_of(cfg: EvalConfig, loaded: Loaded, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What a run cost, from what was counted at run time and by arithmetic."""
  meta = [r['metadata'] for r in rows]
  kept = [[c == '1' for c in m['kept']] for m in meta]
  fed = sum(map(len, kept))
  spec = CacheSpec(max_new_tokens=cfg.max_new_tokens)
  itemsize = costs.number_bytes(loaded.model, jnp.dtype(cfg.dtype).itemsize, loaded.int8_cache)
  lengths = {m['text_length'] for m in meta}
  per_stage = {t: costs.cache_bytes(loaded.model, loaded.stages, t, spec, itemsize, loaded.reducer) for t in lengths}
  setting = costs.paper_setting(loaded.model, loaded.stages, loaded.reducer)
  flops = [
    costs.sample_flops(
      loaded.model, loaded.stages, m['prompt_text_tokens'], k, spec, m['image_tokens'] > 0, loaded.reducer, m.get('layers', ())
    )
    for m, k in zip(meta, kept)
  ]
  depths = [m['layers'] for m in meta if 'layers' in m]
  return {
    'image_tokens': max(m['image_tokens'] for m in meta),
    'image_tokens_layer_average': float(np.mean(setting.tokens_per_layer)),
    'generated_kept': (sum(map(sum, kept)) - sum(m['evicted'] for m in meta)) / max(fed, 1),
    **depth.run_of(depths),
    'flops_per_sample': float(np.mean(flops)),
    'prefill_flops': costs.decoder_flops(loaded.model, loaded.stages, loaded.reducer),
    'paper_prefill_flops': costs.paper_flops(setting),
    'kv_bytes_per_sample': int(np.mean([sum(per_stage[m['text_length']]) for m in meta])),
    'kv_bytes_per_stage': np.mean([per_stage[m['text_length']] for m in meta], 0).astype(int).tolist(),
    'evicted': sum(m['evicted'] for m in meta),
  } | _long(meta)


def _long(meta: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The share of generated tokens that long answers kept; nothing if none is known to be long."""
  long = [m for m in meta if m.get('long')]
  fed = sum(len(m['kept']) for m in long)
  return {'generated_kept_long_answers': sum(m['kept'].count('1') - m['evicted'] for m in long) / fed} if fed else {}


def compare(
  cfg: EvalConfig,
  benchmark: Benchmark,
  labels: Labels | None,
  loaded: Mapping[str, Loaded],
  results: Mapping[str, RunResult],
) -> dict[str, dict[str, Any]]:
  """One JSON-ready row per run.

  Args:
    cfg, benchmark: what was asked.
    labels: None where there are none to score with.
    loaded, results: by run; all have answered the same questions.

  Raises:
    DataError: answers and labels do not fit together.
  """
  rows, tallies = {}, {}
  reference = results[cfg.reference]
  for name, result in results.items():
    row = costs_of(cfg, loaded[name], result.rows)
    run = cfg.runs[name]
    row['budget'] = run.budget or None
    row['published'] = [dataclasses.asdict(f) for f in published.figures(benchmark.name, run.method, run.budget)]
    row['answers_differ'] = sum(a['text'] != b['text'] for a, b in zip(result.rows, reference.rows))
    row |= {'checkpoint': loaded[name].path, 'seconds': round(result.seconds, 1), 'programs_compiled': result.programs_compiled}
    if labels is not None:
      tallies[name], scores = scores_of(benchmark, labels, result)
      row |= scores
    rows[name] = row
  depth.compare(rows)
  for name, row in rows.items():
    if name != cfg.reference and 'score' in row and 'score' in rows[cfg.reference]:
      row['difference'] = row['score'] - rows[cfg.reference]['score']
      row['difference_interval'] = score.bootstrap(benchmark, tallies[name], tallies[cfg.reference])
  return rows


def scores_of(benchmark: Benchmark, labels: Labels, result: RunResult) -> tuple[score.Tallies, dict[str, Any]]:
  """Counts of one run and its scores, or under `not_scored` why there are none; DataError as `compare`."""
  problems = Problems()
  joined = join(benchmark, labels, result.rows, problems)
  if problems:
    raise DataError(f'{result.path}: answers and labels of {benchmark.name} do not fit together:\n{problems}\n{benchmark.hint}')
  tallies = score.tally(benchmark, joined)
  try:
    figures = score.figures(benchmark, tallies)
    value = figures[score.headline(benchmark, figures)]
  except DataError as e:  # such as an F1 without any 'yes'; the answers and costs still tell something
    return tallies, {'not_scored': str(e)}
  scores = {'score': value, 'interval': score.bootstrap(benchmark, tallies), 'figures': figures}
  return tallies, scores | {'difference': None, 'difference_interval': None} | by_group(figures, tallies)


def by_group(figures: Mapping[str, float], tallies: score.Tallies) -> dict[str, Any]:
  """Accuracy as a share, over all and per group of questions, where that is what the benchmark counts."""
  sums = dict(zip(tallies.columns, tallies.counts.sum(0)))
  groups = [k.removesuffix('/n') for k in sums if k.endswith('/n') and k.removesuffix('/n') in figures]
  if 'accuracy' not in figures:
    return {}
  return {
    'accuracy': figures['accuracy'] / 100,
    'accuracy_by_task': {g: figures[g] / 100 for g in groups},
    'questions_by_task': {g: int(sums[f'{g}/n']) for g in groups},
  }


def scaled(value: float, unit: str, step: int = 1000) -> str:
  """Three digits and a prefix, such as 7.63 TFLOPs."""
  prefixes = ('', 'k', 'M', 'G', 'T', 'P') if step == 1000 else ('', 'Ki', 'Mi', 'Gi', 'Ti')
  power = 0
  while value >= step and power + 1 < len(prefixes):
    value, power = value / step, power + 1
  return f'{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {prefixes[power]}{unit}'


def cell(key: str, row: Mapping[str, Any]) -> str:
  """One value of a run as tables show it, '-' if it has none."""
  value = row.get(key)
  if value in (None, []):
    return '-'
  if key in ('score', 'difference'):
    sign = '+' if key == 'difference' else ''
    interval = row['interval' if key == 'score' else 'difference_interval']
    return f'{value:{sign}.2f}' + (f' ({interval[0]:{sign}.2f} to {interval[1]:{sign}.2f})' if interval else '')
  if key == 'published':
    return ', '.join(f'{f["value"]:g} ({f["lineage"]})' for f in value)
  if key == 'generated_kept':
    return f'{value:.0%}'
  if key.endswith(('flops', 'flops_per_sample')):
    return scaled(value, 'FLOPs')
  if key == 'kv_bytes_per_sample':
    return scaled(value, 'B', 1024)
  return f'{value:.2f}' if isinstance(value, float) else str(value)


def _table(benchmark: Benchmark, rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
  """Header and lines; columns that no run has a value for are left out."""
  columns = {}
  for key, title in COLUMNS.items():
    columns[title] = [cell(key, r) for r in rows.values()]
    if key == 'score':
      columns |= {k.replace('/', ' '): [cell(k, r.get('figures', {})) for r in rows.values()] for k in benchmark.shown}
  for key in dict.fromkeys(k for r in rows.values() for k in r.get('agreement', {})):
    columns[key.replace('_', ' ')] = [cell(key, r.get('agreement', {})) for r in rows.values()]
  columns = {title: cells for title, cells in columns.items() if set(cells) != {'-'}}
  return [['run', *columns], *([name, *(cells[i] for cells in columns.values())] for i, name in enumerate(rows))]


def markdown(benchmark: Benchmark, title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The comparison as a Markdown page."""
  head, *body = _table(benchmark, rows)
  lines = [f'# {title}', '', '| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  lines += ['| ' + ' | '.join(line) + ' |' for line in body]
  sources = [f'published, ({k}): {published.LINEAGES[k]}' for k in _lineages(rows)]
  return '\n'.join([*lines, '', *(f'* {c}' for c in (*CONVENTIONS, *sources)), ''])


def _lineages(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Of all published figures that the table shows."""
  return sorted({f['lineage'] for row in rows.values() for f in row.get('published', ())})


def comma_separated(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The same numbers, unrounded, as CSV; intervals and groups as JSON in a cell."""
  keys = list(dict.fromkeys(k for r in rows.values() for k in r))
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['run', *keys])
  plain = lambda v: json.dumps(v) if isinstance(v, (dict, list)) else v
  for name, row in rows.items():
    writer.writerow([name, *(plain(row.get(k)) for k in keys)])
  return text.getvalue()


def console_table(benchmark: Benchmark, title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
  """The comparison for a terminal."""
  head, *body = _table(benchmark, rows)
  table = Table(title=title)
  for i, name in enumerate(head):
    table.add_column(name, justify='right' if i else 'left', no_wrap=not i)
  for line in body:
    table.add_row(*line)
  return table


def figure(title: str, metric: str, rows: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Score with its interval against FLOPs and against KV bytes per sample."""
  columns = -(-len(rows) // NAMES_PER_COLUMN)
  result = Figure(figsize=(9 + 2 * columns, 4.5 if columns == 1 else 6), layout='constrained')
  result.suptitle(title)
  left, right = result.subplots(1, 2, sharey=True)
  left.set_ylabel('\n'.join(metric.split(', ')))
  for axis, key, unit, label in (
    (left, 'flops_per_sample', 1e9, 'GFLOPs per sample (true dimensions)'),
    (right, 'kv_bytes_per_sample', 2**20, 'KV cache, MiB per sample (allocated)'),
  ):
    axis.set_xlabel(label)
    axis.set_xlim(0, 1.1 * max(r[key] for r in rows.values()) / unit)
    axis.grid(alpha=0.3)
    for i, (name, row) in enumerate((n, r) for n, r in rows.items() if 'score' in r):
      low, high = row['interval'] or (row['score'], row['score'])
      error = [[max(row['score'] - low, 0)], [max(high - row['score'], 0)]]
      marker = MARKERS[i // COLORS % len(MARKERS)]
      axis.errorbar(row[key] / unit, row['score'], error, fmt=marker, capsize=3, color=f'C{i % COLORS}', label=name)
  right.legend(loc='center left', bbox_to_anchor=(1.02, 0.5), ncols=columns)
  return result
