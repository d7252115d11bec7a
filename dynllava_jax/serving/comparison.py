"""Several ways to run one model, timed in turn: what stands in the tables of `python -m dynllava_jax.bench`, and the tables."""

import datetime
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from dynllava_jax import arrangement, methods
from dynllava_jax.config import BenchConfig, to_dict
from dynllava_jax.controller.hardware import Limits
from dynllava_jax.evals.store import versions
from dynllava_jax.serving.timing import PARTS, Batch, Contender, limits
from dynllava_jax.training.plot import save_figure

NO_GAIN = 1.05  # an ideal ratio below it is no gain that anybody would notice


def measure(cfg: BenchConfig, tell: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
  """Everything, JSON-ready: what it was measured on, and a row for every run, batch size and part.

  Args:
    cfg: the benchmark.
    tell: told of progress; keep: given what there is after every batch size.

  Raises:
    ConfigError: the model cannot be run so.
  """
  for run in cfg.runs.values():
    methods.check_run(cfg.model, run.stages, run.reducer)
  lies = str(arrangement.best(jax.local_devices()[:1]))
  tell(lies)
  limit = limits(jnp.dtype(cfg.dtype))
  contenders = {name: Contender(cfg, run) for name, run in cfg.runs.items()}
  rows, too_large = [], []
  machine = dict(device=jax.devices()[0].device_kind, limits=vars(limit), date=str(datetime.date.today()), versions=versions())
  machine |= dict(arrangement=lies)
  result = {'machine': machine, 'config': to_dict(cfg), 'rows': rows, 'too_large': too_large}
  for size in cfg.rows:
    try:
      batches = {name: contender.batch(size) for name, contender in contenders.items()}
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      too_large.append(size)
      tell(f'batch of {size}: does not fit into memory')
      continue
    turns: list[dict[str, dict[str, float]]] = []
    for turn in range(cfg.repeats):
      turns.append({name: batches[name].once() for name in list(batches)[:: 1 if turn % 2 == 0 else -1]})
    for name, batch in batches.items():
      rows += [row_of(cfg, name, batch, part, turns, limit, contenders) for part in PARTS if part in turns[0][name]]
    tell(f'batch of {size}: timed')
    keep(result)
  return result


def row_of(
  cfg: BenchConfig,
  name: str,
  batch: Batch,
  part: str,
  turns: Sequence[Mapping[str, Mapping[str, float]]],
  limit: Limits,
  contenders: Mapping[str, Contender],
) -> dict[str, Any]:
  """One cell of the tables."""
  seconds = [turn[name][part] for turn in turns]
  reference = cfg.reference
  ratios = [turn[reference][part] / turn[name][part] for turn in turns if part in turn[reference]]
  ideal = contenders[name].ideal(part, batch.rows, batch.kept, limit)
  best = contenders[reference].ideal(part, batch.rows, 1.0, limit) / ideal
  row = dict(run=name, rows=batch.rows, part=part, seconds=quartiles(seconds), least_seconds=ideal)
  row |= dict(ratio=quartiles(ratios), ideal_ratio=round(best, 3)) if ratios else {}
  if tokens := batch.tokens(part):
    row |= dict(tokens_per_second=round(tokens / statistics.median(seconds), 1))
  row |= dict(kv_bytes=batch.kv_bytes, kept_generated=round(batch.kept, 3), parameter_bytes=contenders[name].parameter_bytes)
  if part in batch.compiled_in:
    row |= dict(compile_seconds=round(batch.compiled_in[part], 2), memory_bytes=batch.memory.get(part))
  if part == 'decode':
    row |= dict(weights_share=round(contenders[reference].weights_share(batch.rows), 4))
  return row


def quartiles(values: list[float]) -> list[float]:
  """Lower quartile, median, upper quartile, to four figures."""
  found = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
  return [float(f'{q:.4g}') for q in found]


def as_markdown(cfg: BenchConfig, result: Mapping[str, Any]) -> str:
  """The tables, and in words what cannot be gained."""
  machine, rows = result['machine'], result['rows']
  limit = machine['limits']
  model = cfg.model
  hardware = f'{limit["flops"] / 1e12:.3g} TFLOP/s and {limit["bandwidth"] / 1e9:.3g} GB/s ({limit["source"]})'
  lines = [
    f'# {model.llama.num_layers} layers of {model.llama.hidden_size}: {model.num_image_tokens} image and {cfg.text} text tokens, '
    f'{cfg.new} generated, {cfg.dtype}',
    '',
    f'{machine["device"]}, {machine["date"]}, jax {machine["versions"]["jax"]}; {hardware}. Medians of {cfg.repeats} turns, in '
    f'brackets the quartiles; `ratio` is how many times as fast as {cfg.reference}, `ideal` the most that is possible here.',
  ]
  lines += [f'Batches of {size} do not fit into memory.' for size in result['too_large']]
  columns = ('rows', 'run', 'seconds', 'tokens/s', 'ratio', 'ideal', 'KV', 'memory', 'compiled in')
  for part in dict.fromkeys(r['part'] for r in rows):
    lines += ['', f'## {part}', '']
    lines += [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    for r in (r for r in rows if r['part'] == part):
      low, median, high = r['seconds']
      ratio = '{1} ({0} to {2})'.format(*(f'{q:.2f}' for q in r['ratio'])) if 'ratio' in r else '-'
      memory, compiled = r.get('memory_bytes'), r.get('compile_seconds')
      cells = [
        r['rows'],
        r['run'],
        f'{median:.4g} ({low:.4g} to {high:.4g})',
        f'{r["tokens_per_second"]:,.0f}' if 'tokens_per_second' in r else '-',
        ratio,
        f'{r["ideal_ratio"]:.2f}' if 'ideal_ratio' in r else '-',
        f'{r["kv_bytes"] / 2**20:.1f} MiB',
        f'{memory / 2**20:.0f} MiB' if memory else '-',
        f'{compiled:.1f} s' if compiled is not None else '-',
      ]
      lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    words = [w for r in rows if r['part'] == part and (w := no_gain(cfg, r))]
    lines += ['', *words] if words else []
  return '\n'.join(lines) + '\n'


def no_gain(cfg: BenchConfig, row: Mapping[str, Any]) -> str:
  """A sentence where the hardware cannot give a gain; '' where it can."""
  if row['run'] == cfg.reference or row.get('ideal_ratio', math.inf) >= NO_GAIN:
    return ''
  why = f'; weights are {100 * row["weights_share"]:.0f} % of what a step reads' if 'weights_share' in row else ''
  where = f'{row["run"]}, {row["part"]}, batch of {row["rows"]}'
  return f'{where}: no gain is possible here, at most {row["ideal_ratio"]:.2f} times{why}.'


def picture(cfg: BenchConfig, result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Measured ratios over the batch size, the ideal ones dashed."""
  rows = [r for r in result['rows'] if r['run'] != cfg.reference and 'ratio' in r]
  found = list(dict.fromkeys(r['part'] for r in rows)) or ['nothing to compare']
  figure = Figure(figsize=(3.2 * len(found), 3.2), layout='constrained')
  axes = figure.subplots(1, len(found), squeeze=False)[0]
  for axis, part in zip(axes, found):
    for i, run in enumerate(dict.fromkeys(r['run'] for r in rows)):
      own = [r for r in rows if r['part'] == part and r['run'] == run]
      if not own:
        continue
      x, low, middle, high = [r['rows'] for r in own], *zip(*(r['ratio'] for r in own))
      axis.plot(x, middle, marker='o', color=f'C{i}', label=run)
      axis.fill_between(x, low, high, alpha=0.2, color=f'C{i}')
      axis.plot(x, [r['ideal_ratio'] for r in own], '--', marker='x', color=f'C{i}')
    axis.axhline(1, color='#999999', lw=0.8)
    axis.set(title=part, xlabel='rows', xscale='log', ylim=(0, None))
  axes[0].set_ylabel(f'times as fast as {cfg.reference}; dashed: ideal')
  axes[0].legend()
  save_figure(figure, path)
