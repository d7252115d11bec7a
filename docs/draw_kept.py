"""Draws docs/kept/NAME.png: what each method keeps or merges of two pictures.

    python docs/draw_kept.py [NAME ...]

On the left a digit scene at 9 of 49 tokens, by the model in `examples/digits`, which is asked how many digits there are. On the
right a photograph at 64 of 576 tokens, by a model of LLaVA-1.5's layout with random weights: what a method looks at is then
the picture's own likenesses, and no training, so it shows the form of a choice, not its quality. The photograph is of Grace Hopper,
U.S. Navy, in the public domain; matplotlib brings it along.
"""

import dataclasses
import functools
import io
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import cbook
from matplotlib.figure import Figure
from PIL import Image

import dynllava_jax as dl
from dynllava_jax import checkpoint
from dynllava_jax.checkpoint import CheckpointInfo
from dynllava_jax.config import IMAGE_ID, ClipTextConfig, EvalRun, LlamaConfig, ModelConfig, VisionConfig, from_config_dict
from dynllava_jax.convert.records.bases import Base, Sample
from dynllava_jax.convert.records.decoded import Asked
from dynllava_jax.convert.records.runs import Runner
from dynllava_jax.data import digits
from dynllava_jax.data.images import preprocess
from dynllava_jax.evals import budgets
from dynllava_jax.models import params as parameters
from dynllava_jax.models.batch import question_segments
from dynllava_jax.models.clip_text import ClipText
from dynllava_jax.ops.images import normalize
from dynllava_jax.sharding import unboxed

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / 'docs' / 'kept'
KEPT, MERGED = '#ffb000', '#30c0ff'
SEED, BUDGETS = 7, (9, 64)
QUESTION = 'How many digits are there?'


@dataclasses.dataclass(frozen=True)
class Shown:
  """A picture uint8[R, R, 3] as a model sees it, the model, the prompt, and how its runs are cut."""

  picture: np.ndarray
  base: Base
  sample: Sample
  setting: budgets.Setting
  budget: int


def scene() -> Shown:
  """A digit scene and the model that ships here."""
  folder = ROOT / 'examples' / 'digits'
  loaded = dl.load(folder, stages='dense', max_new_tokens=1, text_lengths=(32,), batch_size=1).loaded
  picture = digits.make_scene('test', np.random.default_rng(SEED)).image
  words = [loaded.tokenizer.bos_id, IMAGE_ID, *(token for token, _ in loaded.tokenizer.encode(f'{QUESTION}\n'))]
  base = Base(loaded.info, checkpoint.load_params(folder), {})
  setting = budgets.Setting(model=loaded.model, cut=1, average=False)
  return shown(picture, base, words, setting, BUDGETS[0])


def photograph() -> Shown:
  """A photograph and a small model of random weights in LLaVA-1.5's layout: 24 x 24 patches, a block above the features."""
  tower = VisionConfig(hidden_size=128, mlp_dim=256, num_layers=6, num_heads=4)
  text = ClipTextConfig(vocab_size=64, hidden_size=32, mlp_dim=64, num_layers=1, num_heads=2, num_positions=16, embed_dim=32)
  llama = LlamaConfig(vocab_size=64, hidden_size=128, mlp_dim=256, num_layers=8, num_heads=4, num_kv_heads=4)
  model = ModelConfig(vision=tower, llama=llama, clip_text=text)
  keys = jax.random.split(jax.random.key(SEED), 3)
  weights = unboxed(parameters.init_params(model, keys[0]))
  x = jnp.zeros((1, 1, tower.hidden_size))
  weights['vision_tail'] = unboxed(parameters.VisionTail(model).init(keys[1], x)['params'])
  weights['clip_text'] = unboxed(ClipText(text, tower).init(keys[2], jnp.zeros((1, 1, 16), jnp.int32), x)['params'])
  info = CheckpointInfo(model=model, stages=(), sparsity=None)
  picture = np.asarray(Image.open(cbook.get_sample_data('grace_hopper.jpg')).convert('RGB').crop((0, 40, 512, 552)))
  words = [1, IMAGE_ID, *np.random.default_rng(SEED).integers(2, 60, 12).tolist()]
  return shown(picture, Base(info, weights, {}), words, budgets.Setting(model=model, average=False), BUDGETS[1])


def shown(picture: np.ndarray, base: Base, words: list[int], setting: budgets.Setting, budget: int) -> Shown:
  """The picture as the model gets it, and the prompt."""
  seen = preprocess(picture, setting.model.vision, 'pad')
  pixels = np.asarray(normalize(jnp.asarray(seen)[None], setting.model.vision))[0]
  question = np.array([62, 5, 9, 23, 63]) if setting.model.clip_text else None
  return Shown(seen, base, Sample(np.array(words), pixels, question), setting, budget)


@dataclasses.dataclass(frozen=True)
class Looked:
  """What a run makes of a picture.

  Attributes:
    share: float[P], how much of each patch stays: 0 or 1, of a compressor the share of heads and layers.
    merged: bool[P], patches that others were merged into.
    held_by: int[P], the token that holds each patch; None unless the method says.
  """

  share: np.ndarray
  merged: np.ndarray
  held_by: np.ndarray | None = None


def look(of: Shown, run: dict[str, Any]) -> Looked:
  """Runs a prompt and reads off what is left of its picture."""
  typed = from_config_dict(EvalRun, run)
  runner = Runner(of.setting.model, of.base.params, typed.stages, typed.reducer)
  apply = lambda *args, method: jax.jit(functools.partial(runner.model.apply, method=method))({'params': runner.params}, *args)
  text = of.setting.model.clip_text
  question = question_segments([of.sample.question], text.num_positions) if text else None
  reduced = apply(of.sample.pixels[None], question, method='reduce_images')
  index, held_by = np.asarray(reduced.index[0]), None
  share, merged = np.zeros(of.setting.patches), np.zeros(of.setting.patches, bool)
  if reduced.group is not None:
    held_by = np.asarray(reduced.group[0])
  elif typed.reducer:
    plain = apply(of.sample.pixels[None], question, method=lambda m, *seen: m.projector(m.look(*seen).features))[0]
    changed = np.abs(np.asarray(reduced.tokens[0]) - np.asarray(plain)[index]).max(-1) > 1e-3
    merged[index[changed & (index >= 0)]] = True
  (answer,) = runner.answer([Asked(of.sample.ids, reduced.tokens[0], None if held_by is None else held_by)], 1)
  last, stage = answer.traces[-1], typed.stages[-1]
  kept = index[last.kept_image]
  share[kept[kept >= 0]] = 1
  budget = stage.kept_image_tokens(len(index))
  merged[kept[budget:]] = stage.selector != 'all'  # rows that stand for several are behind those that stay
  if stage.compressor:
    columns = slice(answer.image_start, answer.image_start + of.setting.patches)
    share = np.concatenate([t.of_layers['keep'][..., columns] for t in answer.traces]).mean((0, 1))
  return Looked(np.ones_like(share) if held_by is not None else share, merged, held_by)


def draw(axes, of: Shown, seen: Looked) -> None:
  """The picture, dark where little stays; what others were merged into is framed blue, tokens of several patches in one colour."""
  side = round(of.setting.patches**0.5)
  size = of.picture.shape[0] // side
  patches = of.picture[: side * size, : side * size].reshape(side, size, side, size, 3).swapaxes(1, 2)
  patches = patches.reshape(side * side, size, size, 3).astype(np.float32)
  if seen.held_by is not None:
    for token in np.unique(seen.held_by):
      patches[seen.held_by == token] = patches[seen.held_by == token].mean((0, 1, 2))
  patches *= (0.2 + 0.8 * seen.share)[:, None, None, None]
  axes.imshow(patches.reshape(side, side, size, size, 3).swapaxes(1, 2).reshape(side * size, side * size, 3).astype(np.uint8))
  axes.set_axis_off()
  for patch in np.flatnonzero((seen.share == 1) & (seen.held_by is None)):
    row, column = divmod(int(patch), side)
    where, color = (column * size - 0.5, row * size - 0.5), MERGED if seen.merged[patch] else KEPT
    axes.add_patch(matplotlib.patches.Rectangle(where, size, size, fill=False, edgecolor=color, lw=8 / side))
  count = len(np.unique(seen.held_by)) if seen.held_by is not None else seen.share.sum()
  axes.set_title(f'{count:.0f} of {side * side}', fontsize=8)


def main(*names: str) -> None:
  """Draws those called so, or all."""
  OUT.mkdir(exist_ok=True)
  of_run = [(of, runs_of(of)) for of in (scene(), photograph())]
  for name in names or sorted({name for _, runs in of_run for name in runs}):
    figure = Figure(figsize=(4.4, 2.4), layout='constrained')
    for axes, (of, runs) in zip(figure.subplots(1, 2), of_run):
      axes.set_axis_off()
      if name in runs:
        draw(axes, of, look(of, runs[name]))
      else:
        axes.text(0.5, 0.5, 'not on this model', ha='center', fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=100)
    content.seek(0)
    Image.open(content).convert('RGB').quantize(96).save(OUT / f'{name}.png', optimize=True)
    print(name, flush=True)


def runs_of(of: Shown) -> dict[str, dict[str, Any]]:
  """By method, how it is run at the picture's budget; without those that keep everything or were trained."""
  without = () if 'vision_tail' in of.base.params else ('prumerge', 'prumerge_plus')
  rows = budgets.rows(of.setting, [of.budget], without)
  own = ('dense', 'redundancylens', 'smaller_image')
  return {run['method']: run for run in rows.values() if run['method'] not in own}


if __name__ == '__main__':
  main(*sys.argv[1:])
