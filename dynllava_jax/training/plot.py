"""Training curves of one or more runs as one picture.

python -m dynllava_jax.training.plot OUT.png runs/a runs/b                           # over each other
python -m dynllava_jax.training.plot --in_turn OUT.png runs/digits/base runs/digits/dynamic   # one after the other
"""

import io
import sys
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from dynllava_jax import paths, remote
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.display import printable
from dynllava_jax.training.metrics import METRICS_FILE, read_metrics, unreadable_lines

matplotlib.use('Agg')

IN_TURN = '--in_turn'
LINES = ('-', '--', ':', '-.')
PANELS = (
  ('loss', {'ce': 'cross-entropy'}),
  ('gradient norm', {'grad_norm': 'of all groups'}),
  ('keep rate', {'image_keep': 'image tokens', 'text_keep': 'generated tokens', 'instruct_keep': 'instructions'}),
  ('temperature', {'tau': 'tau'}),
)
LOGARITHMIC = ('loss', 'gradient norm')
SHARES = ('keep rate', 'temperature')


def panels(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[tuple[str, dict[str, str]]]:
  """What the runs have numbers for: (title, label by name in the metrics), the scores of each of their evaluations last."""
  known = {name for lines in runs.values() for line in lines for name in line}
  scores = sorted(name for name in known if name.startswith('eval/') and name.endswith('/score'))
  wanted = [*PANELS, *((name.split('/')[1], {name: 'score'}) for name in scores)]
  return [(title, {k: v for k, v in curves.items() if k in known}) for title, curves in wanted if known & curves.keys()]


def training_figure(runs: Mapping[str, Sequence[Mapping[str, float]]], in_turn: bool = False) -> Figure:
  """Curves over the steps of the runs, a colour for each run.

  Args:
    runs: metrics by name.
    in_turn: each run begins where the one before ended, as when one was started from another.
  """
  shown = panels(runs)
  figure = Figure(figsize=(9, 1 + 2 * len(shown)), layout='constrained')
  axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
  offset = 0
  for number, (name, lines) in enumerate(runs.items()):
    for axis, (_, curves) in zip(axes, shown):
      for style, (key, label) in zip(LINES, curves.items()):
        points = [(offset + line['step'], line[key]) for line in lines if key in line]
        if points:
          marker = 'o' if key.startswith('eval/') else None  # there may be but one
          axis.plot(*zip(*points), style, marker=marker, ms=3, color=f'C{number}', label=f'{printable(name)}: {label}')
    offset += lines[-1]['step'] if in_turn else 0
  for axis, (title, _) in zip(axes, shown):
    axis.set_ylabel(printable(title), parse_math=False)
    axis.set_yscale('log' if title in LOGARITHMIC else 'linear')
    if title in SHARES:
      axis.set_ylim(0, 1.05)
    for text in axis.legend(loc='best', fontsize='small').get_texts():
      text.set_parse_math(False)
  axes[-1].set_xlabel('step')
  return figure


def save_figure(figure: Figure, path: paths.Given) -> None:
  """Writes a PNG under a temporary name, then renames it."""
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=110)
  write_atomically(path, content.getvalue())


def main(out: str, *workdirs: str, in_turn: bool = False) -> None:
  """Writes the picture; exits with a message if a run has no metrics."""
  runs = {}
  given = [paths.given(text, 'WORKDIR') for text in workdirs]
  for text, workdir in zip(workdirs, given):
    local = remote.fetched(workdir / METRICS_FILE).parent
    name = workdir.name if [w.name for w in given].count(workdir.name) == 1 else text
    runs[name] = read_metrics(local)
    if damaged := unreadable_lines(local):
      print(printable(damaged), file=sys.stderr)
    if not runs[name]:
      sys.exit(f'error: {printable(workdir / METRICS_FILE)}: missing or empty; train there first')
  save_figure(training_figure(runs, in_turn), paths.given(out, 'OUT.png'))


if __name__ == '__main__':
  words = [word for word in sys.argv[1:] if word != IN_TURN]
  if len(words) < 2 or any(word.startswith('--') for word in words):
    sys.exit(f'usage: python -m dynllava_jax.training.plot [{IN_TURN}] OUT.png WORKDIR...')
  try:
    main(*words, in_turn=IN_TURN in sys.argv)
  except OSError as e:
    sys.exit(f'error: {printable(e)}')
