"""What a checkpoint keeps of pictures and of its answers, drawn at several budgets.

    python -m dynllava_jax.visualize --checkpoint=CHECKPOINT --image=scene.png --question='How many digits are there?'
    python -m dynllava_jax.visualize --checkpoint=CHECKPOINT --benchmark=digits --questions=4

Writes one PNG per question and `report.html`, which holds them all and can be sent to a colleague.
"""

from absl import flags

from dynllava_jax import command_line, paths
from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError

CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
IMAGE = command_line.define_path('image', [], 'Picture; once for all questions, or once for each.', several=True)
QUESTION = flags.DEFINE_multi_string('question', [], 'What is asked; may be given several times.')
BENCHMARK = flags.DEFINE_string('benchmark', None, 'Draw questions of this benchmark instead.')
DATA = command_line.define_path('data', None, "Folder of the benchmarks' data, see docs/evaluation.md.")
QUESTIONS = flags.DEFINE_integer('questions', 4, 'How many of the benchmark.', lower_bound=1, upper_bound=100)
KEEP = flags.DEFINE_list('keep', ['0.1', '0.5'], 'Shares of the image tokens beside what the checkpoint was made for, and dense.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Most tokens of an answer.', lower_bound=1)
TEXT_LENGTHS = flags.DEFINE_multi_integer('text_lengths', [32, 128, 512], 'Text buckets.')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the computation; bfloat16 on accelerators if not given.')
OUT = command_line.define_path('out', 'runs/visualize', 'Where the pictures go, a folder.')


def main(_) -> None:
  """Asks, draws, writes."""
  with command_line.readable_errors():
    if CHECKPOINT.value is None:
      raise ConfigError('--checkpoint is missing')
    if bool(QUESTION.value) == bool(BENCHMARK.value):
      raise ConfigError('give either --question, or --benchmark')
    out = command_line.output_directory(OUT)
    if not paths.is_local(out):
      raise ConfigError(f'--out={OUT.value}: expected a folder of this machine')
    shares = [_share(text) for text in KEEP.value]
    import dynllava_jax as dl
    from dynllava_jax import api
    from dynllava_jax.display import Terminal
    from dynllava_jax.files import write_atomically
    from dynllava_jax.serving import inside, portrait
    from dynllava_jax.training.plot import save_figure

    console = Terminal()
    asked = _asked()
    sizes = dict(max_new_tokens=MAX_NEW_TOKENS.value, text_lengths=tuple(sorted(set(TEXT_LENGTHS.value))), batch_size=1)
    own = dl.load(command_line.path(CHECKPOINT), dtype=DTYPE.value, **sizes)
    models = {'own': own} | {f'{share:.0%}': own.run_as(api.share_of(own.loaded.info, share)) for share in shares}
    models['dense'] = own.run_as('dense')
    ways = {name: (model.loaded, model.generator) for name, model in models.items()}
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for i, question in enumerate(asked, 1):
      seen = inside.look(question, ways, sizes['text_lengths'])
      drawn = portrait.figure(seen, own.loaded)
      shown.append((seen, drawn))
      save_figure(drawn, out / f'{i:03d}.png')
    title = f'{api.name_of(command_line.path(CHECKPOINT))}: what is kept, by budget of image tokens'
    write_atomically(out / 'report.html', portrait.page(title, shown, own.loaded).encode())
    console.print(f'{len(shown)} questions: {out}/001.png and so on, all of them in {out}/report.html')


def _share(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 < value <= 1:
    raise ConfigError(f'--keep: {text!r}, expected shares above 0 up to 1, such as 0.1,0.5')
  return value


def _asked() -> list:
  """The questions that are drawn."""
  from dynllava_jax.evals.benchmarks import suite
  from dynllava_jax.evals.folders import Folder
  from dynllava_jax.serving import questions

  if BENCHMARK.value:
    from dynllava_jax.config import EvalConfig, EvalRun

    cfg = EvalConfig(runs={'own': EvalRun()}, benchmark=BENCHMARK.value, questions=QUESTIONS.value)
    benchmark = suite.get(BENCHMARK.value, '--benchmark').configured(cfg)
    if benchmark.needed and DATA.value is None:
      raise ConfigError(f'--data is missing; {benchmark.name} needs files')
    folder = Folder(command_line.open_folder(DATA), benchmark.folders, '--data') if DATA.value else None
    return list(benchmark.questions(folder))[: QUESTIONS.value]
  images = [paths.given(text, '--image') for text in IMAGE.value]
  if len(images) not in (0, 1, len(QUESTION.value)):
    raise DataError(f'{len(images)} --image and {len(QUESTION.value)} --question; give one image for all, or one for each')
  images = images * len(QUESTION.value) if len(images) == 1 else images or [None] * len(QUESTION.value)
  return [questions.question(i, *pair) for i, pair in enumerate(zip(images, QUESTION.value), 1)]


if __name__ == '__main__':
  command_line.run(main)
