"""A newcomer's minute: three questions about a picture, dense and dynamic side by side, by the model that ships here.

    make hello

Prints both runs' answers and what they cost, and leaves the scene and a picture of the kept tokens in runs/hello.
"""

import time

import numpy as np
from absl import flags
from PIL import Image

from dynllava_jax import command_line, paths
from dynllava_jax.workspace import workspace

CHECKPOINT = command_line.define_path('checkpoint', paths.shipped('examples/digits'), 'Checkpoint of the digits model.')
OUT = command_line.define_path('out', 'runs/hello', 'Where the pictures go.')
SEED = flags.DEFINE_integer('seed', 0, 'Which scene is drawn, of digits that the model has never seen.', lower_bound=0)

TASKS = ('how_many', 'largest', 'read')
LONGEST = 72  # tokens of a whole scene
TEXT = 32  # text bucket


def main(_) -> None:
  """Answers and pictures."""
  with command_line.readable_errors():
    out = command_line.output_directory(OUT)
    start = time.perf_counter()
    from rich.table import Table

    import dynllava_jax as dl
    from dynllava_jax import costs
    from dynllava_jax.data import digits
    from dynllava_jax.display import Terminal
    from dynllava_jax.evals.benchmarks.base import Question
    from dynllava_jax.evals.figures import Pictured, tokens_figure
    from dynllava_jax.training.plot import save_figure

    rng = np.random.default_rng(SEED.value)
    scene = digits.make_scene('test', rng)
    asked = [digits.ask(task, scene, rng) for task in TASKS]
    sizes = dict(max_new_tokens=LONGEST, text_lengths=(TEXT,), batch_size=len(asked))
    models = {name: dl.load(command_line.path(CHECKPOINT), stages=name, **sizes) for name in ('dense', 'dynamic')}
    replies = {name: model.reply(scene.image, [question for question, _ in asked]) for name, model in models.items()}
    table = Table('question', 'truth', *models)
    for i, (question, truth) in enumerate(asked):
      table.add_row(question, truth, *(replies[name][i].text for name in models))
    table.add_section()
    generator = {name: model.generator for name, model in models.items()}
    kept = {name: len(r[0].kept_image) for name, r in replies.items()}
    held = {name: f'{sum(x.kept_generated for x in r)} of {sum(len(x.kept) for x in r)}' for name, r in replies.items()}
    size = {
      name: sum(costs.cache_bytes(m.loaded.model, m.loaded.stages, TEXT, generator[name].spec, 4)) for name, m in models.items()
    }
    table.add_row('image tokens behind the first layer', '', *(str(n) for n in kept.values()))
    table.add_row('generated tokens whose K/V stay', '', *held.values())
    table.add_row('KV cache of a question', '', *(f'{n / 1024:.0f} KiB' for n in size.values()))
    Terminal(width=110).print(table)
    shown = [Pictured(Question(i, (q,), q, scene.image), {'metadata': as_metadata(r)})
             for i, ((q, _), r) in enumerate(zip(asked, replies['dynamic']))]  # fmt: skip
    with workspace(out, '--out', wanted=lambda name: False) as folder:
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(scene.image).resize([digits.CANVAS * 4] * 2, Image.Resampling.NEAREST).save(folder / 'scene.png')
      save_figure(tokens_figure(shown, models['dynamic'].loaded, 'dynamic: what is kept'), folder / 'tokens.png')
    print(f'{time.perf_counter() - start:.0f} s; the scene and what was kept of it: {out}/scene.png, {out}/tokens.png')


def as_metadata(reply) -> dict:
  """What `evals.figures` draws of an answer."""
  kept = ''.join('01'[k] for k in reply.kept)
  return dict(kept_image=list(reply.kept_image), kept=kept, evicted=reply.evicted, given_up=[], tokens=list(reply.tokens))


if __name__ == '__main__':
  command_line.run(main)
