"""What a search found, for people: choice, runner-ups and Pareto front as tables, the front as a picture, the choice as config."""

import pathlib
import pprint
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from dynllava_jax.config import to_dict
from dynllava_jax.controller.search import RUNNERS_UP, Candidate, Found, shown
from dynllava_jax.controller.target import Target
from dynllava_jax.files import write_atomically
from dynllava_jax.training.plot import save_figure

matplotlib.use('Agg')
COLUMNS = ('memory', 'latency', 'tokens_per_second', 'energy', 'flops', 'quality')
HEAD = '| image | text | batch | mode | memory | latency | tokens/s | J/answer | FLOPs of dense | quality | scarcity |'
CONFIG = '''"""{headline}

    python eval.py --config={path} --checkpoint={checkpoint} --out=OUT

Written by `python -m dynllava_jax.controller`. A sparse run is beside dense, as everything is compared with it.
"""

from ml_collections import ConfigDict

RUNS = {runs}


def get_config() -> ConfigDict:
  """An evaluation of the setting that was chosen, and of dense."""
  return ConfigDict(
    dict(
      runs=RUNS,
      benchmark={benchmark!r},
      labels='',
      allow_outside=False,
      text_lengths={text_lengths!r},
      questions={questions!r},
      batch_size={batch!r},
      max_new_tokens={new!r},
      dtype={dtype!r},
      mesh=dict(data=-1, fsdp=1, tensor=1),
      seed=0,
      agreement=True,
    )
  )
'''


def row(candidate: Candidate) -> str:
  """A line of a table."""
  s = candidate.setting
  cells = [f'{s.image:.0%}', f'{s.text:.0%}', str(s.batch), s.mode]
  cells += [shown(name, candidate.value(name)) if name != 'energy' or candidate.estimate.energy else '-' for name in COLUMNS]
  return '| ' + ' | '.join([*cells, f'{candidate.scarcity:.2f}']) + ' |'


def table(candidates: Sequence[Candidate]) -> str:
  """Markdown."""
  return '\n'.join([HEAD, '|' + '---|' * HEAD.count(' | ') + '---|', *map(row, candidates)])


def runners_up(found: Found) -> list[Candidate]:
  """The next best of other shares than the choice's, each with the batch that suits it best."""
  others = {(c.setting.image, c.setting.text): c for c in reversed(found.reaching)}
  chosen = found.reaching[0].setting
  others.pop((chosen.image, chosen.text))
  return sorted(others.values(), key=lambda c: (c.scarcity, -c.estimate.tokens_per_second))[:RUNNERS_UP]


def picture(found: Found, target: Target, path: pathlib.Path) -> None:
  """All settings by memory and tokens per second, coloured by what they drop; the front and the choice marked."""
  figure = Figure(figsize=(8, 5), layout='constrained')
  axes = figure.add_subplot()
  gib = lambda cs: [c.estimate.memory / 2**30 for c in cs]
  rate = lambda cs: [c.estimate.tokens_per_second for c in cs]
  colour = lambda cs: [min(c.scarcity, 2.0) for c in cs]
  axes.scatter(gib(found.candidates), rate(found.candidates), c=colour(found.candidates), s=14, alpha=0.4, cmap='viridis')
  drawn = axes.scatter(gib(found.front), rate(found.front), c=colour(found.front), s=40, cmap='viridis', label='Pareto front')
  figure.colorbar(drawn, label='scarcity at which the rules drop as much')
  if found.reaching:
    axes.scatter(gib(found.reaching[:1]), rate(found.reaching[:1]), marker='*', s=220, color='tab:red', label='chosen')
  if target.memory:
    axes.axvline(target.memory / 2**30, color='grey', linestyle='--', label='memory asked for')
  if target.tokens_per_second:
    axes.axhline(target.tokens_per_second, color='grey', linestyle=':', label='tokens/s asked for')
  axes.set(xscale='log', yscale='log', xlabel='memory of a device, GiB', ylabel='generated tokens per second')
  axes.legend()
  save_figure(figure, path)


def write_config(
  chosen: Candidate, path: pathlib.Path, checkpoint: str, headline: str, *, benchmark: str, text: int, new: int, dtype: str
) -> None:
  """A config file that `eval.py` takes: dense, and the setting that was chosen."""
  dense = dict(stages=[dict(start=0)])
  stages = [{k: v for k, v in to_dict(s).items() if v is not None} for s in chosen.setting.stages]
  content = CONFIG.format(
    headline=headline,
    path=path.name,
    checkpoint=checkpoint,
    runs=pprint.pformat(dict(dense=dense, chosen=dict(stages=stages)), width=120, sort_dicts=False),
    benchmark=benchmark,
    text_lengths=(text,),
    questions=200 if benchmark == 'digits' else 0,  # digits are made, as many as asked for
    batch=min(chosen.setting.batch, 64),
    new=new,
    dtype=dtype,
  )
  write_atomically(path, content.encode())
