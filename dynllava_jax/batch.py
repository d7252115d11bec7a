"""Answers a file of questions about a folder of pictures, as fast as the devices go.

    python -m dynllava_jax.batch --checkpoint=CHECKPOINT --questions=questions.jsonl --images=DIR --out=answers.jsonl

One per line, `{"question_id": 1, "image": "dog.jpg", "text": "What is it?"}`; without `image` it is asked without a picture.
Started again with the same --out it goes on where it stopped: finished answers are in `answers.jsonl.parts` until all are there.
With --multihost each host answers its share, and the first one puts them together.
"""

import contextlib
import json
import pathlib

from absl import flags

from dynllava_jax import command_line, locks, paths
from dynllava_jax.config import ConfigError

CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
QUESTIONS = command_line.define_path('questions', None, 'Question file: JSON lines, or a JSON list.')
IMAGES = command_line.define_path('images', None, 'Folder of the pictures; that of the question file if not given.')
OUT = command_line.define_path('out', None, 'Answer file to write, .jsonl.')
STAGES = flags.DEFINE_string('stages', None, "How it is run: dense, dynamic, a method, or a JSON list; the checkpoint's own.")
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the computation; bfloat16 on accelerators if not given.')
QUANTIZATION = command_line.define_quantization()
SLOTS = flags.DEFINE_integer('slots', 16, 'Questions that each engine answers at once.', lower_bound=1, upper_bound=2**16)
STEPS = flags.DEFINE_integer('steps', 8, 'Tokens per dispatch.', lower_bound=1)
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that hold the weights together; each group is an engine.', lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'Most tokens of an answer.', lower_bound=1)
TEXT_LENGTHS = flags.DEFINE_multi_integer('text_lengths', [32, 64, 128, 256, 512, 1024], 'Text buckets.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the most likely token.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Only the most likely so many; 0 for all.')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Only the most likely that have so much probability together.')
PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'Tokens that were there become less likely by this factor.')
STOP = flags.DEFINE_multi_string('stop', [], 'Strings that end an answer.')
SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn by chance.', lower_bound=0)
MULTIHOST = flags.DEFINE_bool('multihost', False, 'One of several processes, one per host: join the others first.')


def main(_) -> None:
  """From the question file to the answer file."""
  with command_line.readable_errors():
    for flag in (CHECKPOINT, QUESTIONS, OUT):
      if flag.value is None:
        raise ConfigError(f'--{flag.name} is missing')
    out = command_line.path(OUT)
    if not paths.is_local(out) or out.suffix != '.jsonl':
      raise ConfigError(f'--out={OUT.value}: expected a file NAME.jsonl on this machine')
    if out.is_dir():
      raise ConfigError(f'--out={OUT.value}: is a folder, expected a file NAME.jsonl')
    stages = command_line.stages(STAGES)
    if MULTIHOST.value:
      command_line.join_hosts()
    try:
      _run(out, stages)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(f'finished answers are in {out}.parts, the same command goes on with the others') from None


def _run(out: pathlib.Path, stages) -> None:
  import jax
  from jax.experimental import multihost_utils

  from dynllava_jax import api
  from dynllava_jax.config import EvalConfig, MeshConfig
  from dynllava_jax.data.samples import DataError
  from dynllava_jax.display import Terminal
  from dynllava_jax.evals import runner
  from dynllava_jax.evals.benchmarks.questions import OwnQuestions
  from dynllava_jax.evals.folders import Folder
  from dynllava_jax.evals.layout import Layout
  from dynllava_jax.evals.reading import read_lines
  from dynllava_jax.evals.store import AnswerStore
  from dynllava_jax.files import sweep, write_atomically
  from dynllava_jax.progress import progress
  from dynllava_jax.serving import batch
  from dynllava_jax.serving.engine import Engine
  from dynllava_jax.serving.request import Options

  console = Terminal()
  try:
    options = Options(
      temperature=TEMPERATURE.value,
      top_k=TOP_K.value,
      top_p=TOP_P.value,
      repetition_penalty=PENALTY.value,
      stop=tuple(STOP.value),
      seed=SEED.value,
    )
  except ValueError as e:
    raise ConfigError(f'--{e}') from None
  source = command_line.read(QUESTIONS)
  folder = Folder(command_line.open_folder(IMAGES) or source.parent, ('.',), str(source))
  questions = OwnQuestions(str(source)).questions(folder)
  devices = jax.local_devices()
  if len(devices) % TENSOR.value:
    raise ConfigError(f'--tensor: {TENSOR.value} does not divide the {len(devices)} devices of this host')
  meshes = batch.meshes(devices, TENSOR.value)
  hosts, host = jax.process_count(), jax.process_index()
  sizes = dict(max_new_tokens=MAX_NEW_TOKENS.value, text_lengths=tuple(sorted(set(TEXT_LENGTHS.value))), batch_size=SLOTS.value)
  loaded, run = api.describe(command_line.path(CHECKPOINT), stages, QUANTIZATION.value)
  layout = Layout(loaded, questions, sizes['text_lengths'], SEED.value, '--text_lengths') if questions else None
  dtype = api.dtype_of(DTYPE.value)
  cfg = EvalConfig(runs={'batch': run}, benchmark='questions', dtype=dtype, seed=SEED.value, mesh=MeshConfig(), **sizes)
  made_by = runner.provenance(cfg, loaded, questions, meshes[0]) | {'decoding': str(options)}
  parts = out.with_name(f'{out.name}.parts')
  with contextlib.ExitStack() as held:
    held.enter_context(locks.sole_use(parts if hosts == 1 else parts / f'lock-{host}', '--out'))
    sweep(parts)
    store = AnswerStore(parts, f'host-{host}-of-{hosts}', made_by)
    if store.set_aside:
      console.print(f'{store.why} were moved to {store.set_aside}')
    left = [i for i in range(host, len(questions), hosts) if i not in store.rows]
    if store.rows:
      console.print(f'{len(store.rows)} answers are there already')
    if left:
      sizes |= dict(dtype=dtype, quantization=QUANTIZATION.value, mesh=meshes[0])
      first = api.load(command_line.path(CHECKPOINT), stages=stages, **sizes)
      models = [first, *(first.on(mesh) for mesh in meshes[1 : len(left)])]
      engine = dict(text_length=max(layout.bucket[i] for i in left), slots=SLOTS.value, steps=STEPS.value)
      engines = [Engine(model.generator, loaded.tokenizer, **engine) for model in models]
      with progress(console, 'answers', len(left)) as advance:
        batch.Work(layout, left, options, store, advance).run(engines)
    store.finish()
    if hosts > 1:
      multihost_utils.sync_global_devices('all answers are there')
    if host == 0:
      rows = {row['metadata']['row']: row for path in batch.parts(parts, hosts) for row in read_lines(path)}
      if len(rows) != len(questions):
        raise DataError(f'{parts}: {len(rows)} answers to {len(questions)} questions; do all hosts see this folder?')
      write_atomically(out, ''.join(json.dumps(rows[i]) + '\n' for i in sorted(rows)).encode())
      console.print(f'{len(rows)} answers: {out}')


if __name__ == '__main__':
  command_line.run(main)
