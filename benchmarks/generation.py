"""Prefill and decoding, each contender in a process of its own, in turn: what `against_transformers.py` and `regress.py` run.

All read the same random weights: a model that transformers makes, converted by `convert_weights.py`. Every contender gets the same
tokens and pixels on the same threads; all of them run a case once before any is timed. Turns go A B C, C B A, ... so that whatever
else the machine does falls on all, and ratios are of the same turn.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parent.parent
SYSTEM = 10  # text tokens in front of the image
SIZES = {  # width, mlp, layers, heads, vocabulary; tower width, layers, heads, image size
  'mid': (768, 2048, 12, 12, 32_000, 384, 7, 6, 336),
  'tiny': (64, 96, 2, 4, 512, 32, 3, 4, 56),
}
PATCH = 14
BATCHES = ('1x64', '4x64', '8x64', '16x64', '1x1472')


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed: `prefill` with tower and head, or `decode`, the tokens after the first, of `rows` prompts with `text` tokens."""

  what: str
  rows: int
  text: int
  new: int = 1


def make_models(folder: pathlib.Path, size: str) -> None:
  """`folder/hf` of random numbers, as transformers saves it, and `folder/ours`, converted."""
  import torch
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  width, mlp, layers, heads, vocabulary, tower, tower_layers, tower_heads, image = SIZES[size]
  torch.manual_seed(0)
  vision = CLIPVisionConfig(
    hidden_size=tower,
    intermediate_size=4 * tower,
    num_hidden_layers=tower_layers,
    num_attention_heads=tower_heads,
    image_size=image,
    patch_size=PATCH,
  )
  text = LlamaConfig(
    vocab_size=vocabulary,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=heads,
    initializer_range=0.05,
  )
  config = LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=vocabulary - 1, image_seq_length=(image // PATCH) ** 2
  )
  LlavaForConditionalGeneration(config).save_pretrained(folder / 'hf')
  command = [sys.executable, 'convert_weights.py', f'--src={folder / "hf"}', f'--dst={folder / "ours"}', '--no_readback']
  subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def inputs(case: Case, vocabulary: int, image: int):
  """(int[rows, text], uint8[rows, image, image, 3]), the same for everybody."""
  import numpy as np

  rng = np.random.default_rng(case.text)
  return rng.integers(3, vocabulary - 2, (case.rows, case.text)), rng.integers(0, 256, (case.rows, image, image, 3), np.uint8)


def ours(folder: pathlib.Path, dynamic: bool) -> Callable[[Case], tuple[float, list[int]]]:
  """Runs a case with the checkout on the path: (seconds, the first row's tokens)."""
  import jax
  import numpy as np

  from dynllava_jax import checkpoint
  from dynllava_jax.config import DENSE, PredictorConfig, Stage
  from dynllava_jax.generate import Generator
  from dynllava_jax.models.dynllava import Prompt
  from dynllava_jax.models.groups import init_groups

  info, params = checkpoint.read_info(folder / 'ours'), checkpoint.load_params(folder / 'ours')
  model, stages = info.model, DENSE
  if dynamic:
    model = dataclasses.replace(model, predictor=PredictorConfig(d_model=min(512, model.llama.hidden_size), num_heads=8))
    stages = (Stage(), Stage(start=min(2, model.llama.num_layers - 1), selector='dynamic', image_keep_rate=0.2))
    params |= init_groups(model, ('image_predictor', 'text_predictor'), jax.random.key(0))
  image = model.vision.num_patches
  generators: dict[int, Generator] = {}

  def run(case: Case) -> tuple[float, list[int]]:
    if case.new not in generators:
      generators[case.new] = Generator(model, stages, params, max_new_tokens=case.new, eos_id=None)
    generator = generators[case.new]
    text, pixels = inputs(case, model.llama.vocab_size, model.vision.image_size)
    zeros = np.zeros((case.rows, image), text.dtype)
    tokens = np.concatenate([text[:, :SYSTEM], zeros, text[:, SYSTEM:]], 1).astype(np.int32)
    full = lambda value, dtype: np.full(case.rows, value, dtype)
    prompt = Prompt(tokens, full(tokens.shape[1], np.int32), full(SYSTEM, np.int32), full(0, np.uint32))
    prompt, pixels = jax.device_put((prompt, pixels))
    start = time.perf_counter()
    turn, kept = jax.block_until_ready(generator.start(prompt, pixels))
    first = time.perf_counter()
    answers = jax.block_until_ready(generator.decode(turn, prompt.seed, kept)[0])
    end = time.perf_counter()
    return first - start if case.what == 'prefill' else end - first, np.asarray(answers.tokens)[0].tolist()

  return run


def transformers(folder: pathlib.Path, threads: int) -> Callable[[Case], tuple[float, list[int]]]:
  """The same of transformers' LLaVA: a forward pass, and one token at a time with its growing cache."""
  import numpy as np
  import torch
  from transformers import LlavaForConditionalGeneration

  torch.set_num_threads(threads)
  torch.set_grad_enabled(False)
  model = LlavaForConditionalGeneration.from_pretrained(folder / 'hf', dtype=torch.float32, attn_implementation='sdpa').eval()
  config = model.config
  image, size = config.image_seq_length, config.vision_config.image_size
  mean, std = (np.array(x, np.float32) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))

  def run(case: Case) -> tuple[float, list[int]]:
    text, pixels = inputs(case, config.text_config.vocab_size, size)
    text = torch.from_numpy(text)
    places = torch.full((case.rows, image), config.image_token_id)
    ids = torch.cat([text[:, :SYSTEM], places, text[:, SYSTEM:]], 1)
    normal = torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    start = time.perf_counter()
    out = model(input_ids=ids, pixel_values=normal, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    tokens, first = [token], time.perf_counter()
    for _ in range(case.new - 1):
      out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
      token = out.logits[:, -1].argmax(-1, keepdim=True)
      tokens.append(token)
    end = time.perf_counter()
    return first - start if case.what == 'prefill' else end - first, torch.cat(tokens, 1)[0].tolist()

  return run


def serve(name: str, folder: pathlib.Path, threads: int) -> None:
  """Answers one case per line read."""
  run = transformers(folder, threads) if name == 'transformers' else ours(folder, name == 'dynamic')
  print('ready', flush=True)
  for line in sys.stdin:
    print(json.dumps(run(Case(**json.loads(line)))), flush=True)


@dataclasses.dataclass
class Worker:
  """A contender: `dense`, `dynamic` or `transformers`, with the code of a checkout."""

  process: subprocess.Popen

  @classmethod
  def start(cls, name: str, code: pathlib.Path, models: pathlib.Path, threads: int) -> 'Worker':
    """Starts the process."""
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': str(code)}
    command = [sys.executable, str(HERE), name, str(models), str(threads)]
    return cls(subprocess.Popen(command, cwd=code, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

  def answer(self) -> str:
    """The next line; the program ends if there is none."""
    line = self.process.stdout.readline()
    return line if line else sys.exit('error: a contender ended; see above')

  def run(self, case: Case) -> tuple[float, list[int]]:
    """Seconds of a case, and the first row's tokens."""
    print(json.dumps(dataclasses.asdict(case)), file=self.process.stdin, flush=True)
    seconds, tokens = json.loads(self.answer())
    return seconds, tokens


def in_turn(workers: dict[str, Worker], cases: list[Case], turns: int, reference: str) -> list[dict]:
  """Times all cases; of each contender median and quartiles, and those of its ratios to `reference`, turn by turn."""
  for worker in workers.values():
    worker.answer()  # ready
  results = []
  for case in cases:
    tokens = {name: worker.run(case)[1] for name, worker in workers.items()}  # compiles, or fills caches
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(turns):
      for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
        seconds[name].append(workers[name].run(case)[0])
    row = dataclasses.asdict(case) | {'contenders': {}}
    for name, values in seconds.items():
      ratios = [a / b for a, b in zip(values, seconds[reference])]
      same = tokens[name] == tokens[reference]
      row['contenders'][name] = {'seconds': quartiles(values), 'ratio': quartiles(ratios), 'same_tokens': same}
    results.append(row)
    cells = [f'{n} {v["seconds"][1]:.4f} s, ratio {v["ratio"][1]:.2f} {v["ratio"][::2]}' for n, v in row['contenders'].items()]
    print(f'{case.what} {case.rows} x {case.text}+{case.new}: ' + '; '.join(cells), flush=True)
  for worker in workers.values():
    worker.process.stdin.close()
    worker.process.wait()
  return results


def quartiles(values: list[float]) -> list[float]:
  """Lower quartile, median, upper quartile."""
  return [round(q, 5) for q in statistics.quantiles(values, n=4, method='inclusive')] if len(values) > 1 else values * 3


def machine(threads: int) -> dict:
  """What the figures were measured on."""
  names = ('jax', 'flax', 'numpy', 'transformers', 'torch')
  installed = {d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions() if d.metadata['Name']}
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  model = next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.processor())
  return {
    'machine': f'{model}, {os.cpu_count()} cores, {threads} threads each',
    'load': [round(x, 1) for x in os.getloadavg()],
    'date': str(datetime.date.today()),
    'versions': {n: installed[n] for n in names if n in installed},
  }


def arguments(text: str) -> argparse.ArgumentParser:
  """What both programs take."""
  parser = argparse.ArgumentParser(description=text.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='mid', help='of the model')
  parser.add_argument('--turns', type=int, default=8, help='times that each contender runs a case')
  parser.add_argument('--threads', type=int, default=2, help='of each contender')
  parser.add_argument('--batches', nargs='+', default=BATCHES, help='rows x text tokens of a prompt, e.g. 4x64')
  parser.add_argument('--new', type=int, default=32, help='tokens that are decoded')
  return parser


def cases(args: argparse.Namespace) -> list[Case]:
  """Prefill and decoding for all sizes asked for."""
  sizes = [map(int, batch.split('x')) for batch in args.batches]
  return [Case(what, rows, text, args.new) for rows, text in sizes for what in ('prefill', 'decode')]


if __name__ == '__main__':
  serve(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))
