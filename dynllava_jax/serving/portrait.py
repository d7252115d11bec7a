"""What `inside` saw, as a figure and as an HTML file that needs nothing else."""

import base64
import html
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dynllava_jax.display import printable
from dynllava_jax.evals import figures
from dynllava_jax.evals.layout import Loaded
from dynllava_jax.serving.inside import Answer, Seen

KEEP_COLORS = matplotlib.colormaps['RdBu']
NEVER_FED = '#777777'
WRAP = 100
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1rem auto; padding: 0 1rem; color: #111; background: #fff; }
img { max-width: 100%; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #ccc; padding-left: .7rem; }
.answer span { border-radius: 3px; } .dropped { color: #999; } h2 { margin: 2rem 0 .3rem; } .way { color: #555; }
"""


def shade(margin: float, largest: float) -> float:
  """A margin as a place in a map of colours from 0, dropped, to 1, kept; 0.5 is undecided."""
  return 0.5 + 0.5 * float(np.clip(margin / largest, -1, 1)) if largest else 0.5


def largest_margin(answer: Answer) -> float:
  """The largest that is a number, either way; 0 if there is none."""
  known = np.abs(answer.margin[np.isfinite(answer.margin)])
  return float(known.max(initial=0))


def figure(seen: Seen, loaded: Loaded) -> Figure:
  """Kept patches by budget and the predictor's heat; the first answer's words by margin; keys and values held while it grows."""
  side, answers = figures.grid(loaded), seen.answers
  has_image = seen.question.image is not None
  columns = max(len(answers) + (seen.heat is not None), 3)
  drawn = Figure(figsize=(2.6 * columns, 8 if has_image else 5.4), layout='constrained')
  drawn.suptitle(printable(seen.question.text[0])[:120], fontsize=12)
  rows = drawn.subfigures(3 if has_image else 2, 1, height_ratios=[1.1, 0.8, 1] if has_image else [0.8, 1])
  if has_image:
    picture = figures.seen_by_model(seen.question, loaded)
    panels = rows[0].subplots(1, columns, squeeze=False)[0]
    for axes, answer in zip(panels, answers):
      figures.draw_patches(axes, picture, answer.kept_image, side)
      axes.set_title(f'{answer.name}: {len(answer.kept_image)} of {side * side}', fontsize=9)
    for axes in panels[len(answers) :]:
      axes.set_axis_off()
    if seen.heat is not None:
      axes = panels[len(answers)]
      axes.imshow(picture // 2)
      size = picture.shape[0]
      shown = axes.imshow(
        seen.heat.reshape(side, side),
        cmap='magma',
        alpha=0.75,
        extent=(-0.5, size - 0.5, size - 0.5, -0.5),
        interpolation='nearest',
      )
      axes.set_title('keep margin of the predictor', fontsize=9)
      rows[0].colorbar(shown, ax=axes, shrink=0.7)
  _draw_words(rows[-2].subplots(), answers[0], loaded)
  _draw_growth(rows[-1], answers, loaded)
  return drawn


def _draw_words(axes, answer: Answer, loaded: Loaded) -> None:
  axes.set_axis_off()
  largest = largest_margin(answer)
  note = 'blue kept, red dropped, the paler the closer' if largest else 'nothing was judged'
  axes.set_title(f'{answer.name}: {len(answer.tokens)} tokens; {note}', fontsize=9, loc='left')

  def color(i):
    if i >= len(answer.margin) or not np.isfinite(answer.margin[i]):
      return NEVER_FED
    at = shade(answer.margin[i], largest)
    return KEEP_COLORS(0.95 - 0.3 * (1 - 2 * (at - 0.5)) if at >= 0.5 else 0.05 + 0.3 * 2 * at)  # never as pale as paper

  figures.write_tokens(axes, answer.meta, loaded.tokenizer, 0.95, color, WRAP)


def _draw_growth(part, answers: Sequence[Answer], loaded: Loaded) -> None:
  stages = loaded.stages
  panels = part.subplots(1, len(stages), squeeze=False)[0]
  ends = [s.start for s in stages[1:]] + [loaded.model.llama.num_layers]
  for i, (axes, stage, end) in enumerate(zip(panels, stages, ends)):
    for answer in answers:
      axes.plot(answer.slots[:, i] / (end - stage.start), label=answer.name, drawstyle='steps-post')
    axes.set_title(f'keys and values per layer, layers {stage.start} to {end - 1}', fontsize=9)
    axes.set_xlabel('generated tokens')
    axes.set_ylim(0, None)
  panels[0].set_ylabel('slots in use')
  panels[-1].legend(fontsize=8)


def page(title: str, shown: Sequence[tuple[Seen, Figure]], loaded: Loaded) -> str:
  """All of it as one HTML file: pictures are inside, nothing is fetched, nothing runs."""
  parts = [
    f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>'
  ]
  for seen, drawn in shown:
    content = io.BytesIO()
    drawn.savefig(content, format='png', dpi=110)
    encoded = base64.b64encode(content.getvalue()).decode()
    parts.append(f'<h2>{html.escape(printable(seen.question.text[0]))}</h2>')
    parts.append(f'<img alt="kept patches, margins and cache" src="data:image/png;base64,{encoded}">')
    for answer in seen.answers:
      kept = f'{len(answer.kept_image)} image tokens, {int(answer.kept.sum())} of {len(answer.kept)} generated ones kept'
      parts.append(f'<p class="way">{html.escape(answer.name)}: {kept}</p><p class="answer">{words(answer, loaded)}</p>')
  return '\n'.join(parts) + '\n'


def words(answer: Answer, loaded: Loaded) -> str:
  """The answer's tokens as spans on the colour of their margin, which each shows when pointed at."""
  largest, out = largest_margin(answer), []
  for i, token in enumerate(answer.tokens):
    if token == loaded.tokenizer.eos_id:
      continue
    piece = html.escape(printable(loaded.tokenizer.piece(token), lines=True))
    if i >= len(answer.margin) or not np.isfinite(answer.margin[i]):
      out.append(f'<span>{piece}</span>')
      continue
    ground = to_hex(KEEP_COLORS(0.25 + 0.5 * shade(answer.margin[i], largest)))
    name = '' if answer.kept[i] else ' class="dropped"'
    out.append(f'<span{name} style="background:{ground}" title="margin {answer.margin[i]:.2f}">{piece}</span>')
  return ''.join(out).strip()
