"""Training curves of one or more runs as one picture.

python -m dynllava_jax.training.plot runs/digits/training.png runs/digits/base runs/digits/dynamic
"""

import io
import sys

import matplotlib
from matplotlib.figure import Figure

from dynllava_jax import paths, remote
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.display import printable
from dynllava_jax.training.metrics import METRICS_FILE, read_metrics, unreadable_lines

matplotlib.use('Agg')

PANELS = (
  ('loss', {'ce': 'cross-entropy'}),
  ('keep rate', {'image_keep': 'image tokens', 'text_keep': 'generated tokens', 'instruct_keep': 'instructions'}),
  ('temperature', {'tau': 'tau'}),
)


def training_figure(runs: dict[str, list[dict[str, float]]]) -> Figure:
  """Loss, keep rates and temperature over the steps of the runs, one after the other. `runs`: metrics by name."""
  figure = Figure(figsize=(9, 7), layout='constrained')
  axes = figure.subplots(len(PANELS), 1, sharex=True)
  offset = 0
  for name, lines in runs.items():
    steps = [offset + line['step'] for line in lines]
    for axis, (title, curves) in zip(axes, PANELS):
      axis.set_ylabel(title)
      axis.axvline(offset, color='#999999', lw=0.6)
      for i, (key, label) in enumerate(curves.items()):
        points = [(s, line[key]) for s, line in zip(steps, lines) if key in line]  # dense runs have no keep rates
        if points:
          axis.plot(*zip(*points), color=f'C{i}', label=f'{name}: {label}' if title == 'loss' else label)
    axes[0].text(offset, 1.02, f' {printable(name)}', transform=axes[0].get_xaxis_transform(), parse_math=False)
    offset = steps[-1]
  axes[0].set_yscale('log')
  for axis in axes[1:]:
    axis.legend(loc='best') if axis.lines[1:] else None
    axis.set_ylim(0, 1.05)
  axes[-1].set_xlabel('step')
  return figure


def save_figure(figure: Figure, path: paths.Given) -> None:
  """Writes a PNG under a temporary name, then renames it."""
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=110)
  write_atomically(path, content.getvalue())


def main(out: str, *workdirs: str) -> None:
  """Writes the picture; exits with a message if a run has no metrics."""
  runs = {}
  for workdir in (paths.given(text, 'WORKDIR') for text in workdirs):
    local = remote.fetched(workdir / METRICS_FILE).parent
    runs[workdir.name] = read_metrics(local)
    if damaged := unreadable_lines(local):
      print(printable(damaged), file=sys.stderr)
    if not runs[workdir.name]:
      sys.exit(f'error: {printable(workdir / METRICS_FILE)}: missing or empty; train there first')
  save_figure(training_figure(runs), paths.given(out, 'OUT.png'))


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit('usage: python -m dynllava_jax.training.plot OUT.png WORKDIR...')
  try:
    main(*sys.argv[1:])
  except OSError as e:
    sys.exit(f'error: {printable(e)}')
