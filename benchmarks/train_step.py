"""A training step against Hugging Face transformers, and against another checkout of this project, on this machine.

    pip install torch   # any CPU build
    python benchmarks/train_step.py                        # ours, transformers
    python benchmarks/train_step.py --other=../elsewhere   # and another checkout

A random LLaVA with a decoder of 100 M parameters, 768 positions (576 of them the image), batch 4, float32, layers rematerialised,
tower and projector frozen, AdamW, gradients clipped; every contender computes the loss of the same 64 supervised tokens of each
row, on the same two cores. Each is a process of its own; they take turns, A B B A, so that whatever else the machine does falls on
all. Prints medians and quartiles of the times, and of the ratios turn by turn, and writes benchmarks/results/train_step.json.
With --memory: what the compiler says the step holds at most, with and without micro-batches; added to the same file.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parent.parent
RESULTS = HERE.parent / 'results' / 'train_step.json'
THREADS = 2
BATCH, ANSWER, TEXT_BEFORE, TEXT = 4, 64, 35, 192  # 192 text and 576 image positions
WIDTH, MLP, LAYERS, HEADS, VOCABULARY = 768, 2048, 8, 12, 32_000
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 384, 7, 6
LEARNING_RATE = 5e-6


def tokens(rows: int = BATCH):
  """int32[rows, TEXT], the same for everybody."""
  import numpy as np

  return np.random.default_rng(0).integers(3, VOCABULARY - 2, (rows, TEXT)).astype(np.int32)


def our_step(accumulate: int = 1, rows: int = BATCH, remat: str = 'block'):
  """(compiled step, state, frozen, batch) of the checkout on the path."""
  import jax
  import numpy as np
  from jax.sharding import AxisType, Mesh

  from dynllava_jax import sharding
  from dynllava_jax.config import IGNORE, LlamaConfig, ModelConfig, OptimizerConfig, TrainConfig, VisionConfig
  from dynllava_jax.data.batches import Batch
  from dynllava_jax.models.params import cut_params, init_params
  from dynllava_jax.training.step import State, make_optimizer, make_train_step, split_frozen

  vision = VisionConfig(hidden_size=TOWER_WIDTH, mlp_dim=4 * TOWER_WIDTH, num_layers=TOWER_LAYERS, num_heads=TOWER_HEADS)
  llama = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, mlp_dim=MLP, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=HEADS)
  fields = dict(
    model=ModelConfig(vision=vision, llama=llama),
    optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
    frozen=('vision', 'projector'),
    batch_size=rows,
  )
  if 'accumulate' in TrainConfig.__dataclass_fields__:
    cfg = TrainConfig(**fields, accumulate=accumulate, remat=remat)
  else:  # a checkout from before micro-batches
    cfg = TrainConfig(**fields, remat=True)
  text, patches = tokens(rows), vision.num_patches
  whole = np.concatenate([text[:, :TEXT_BEFORE], np.zeros((rows, patches), np.int32), text[:, TEXT_BEFORE:]], 1)
  labels = np.full_like(whole, IGNORE)
  labels[:, -ANSWER:] = whole[:, -ANSWER:]
  full = lambda value: np.full(rows, value, np.int32)
  size = whole.shape[1]
  pixels = np.random.default_rng(1).integers(0, 256, (rows, vision.image_size, vision.image_size, 3), np.uint8)
  batch = Batch(pixels, whole, labels, full(size), full(TEXT_BEFORE), full(size - ANSWER), np.arange(rows, dtype=np.uint32))
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  optimizer = make_optimizer(cfg.optimizer, cfg.steps)
  with sharding.on_mesh(mesh):
    params = jax.jit(lambda: sharding.unboxed(init_params(cfg.model, jax.random.key(0))))()
    trained, frozen = split_frozen(cut_params(params, cfg.stages), cfg.frozen)
    state = State(jax.numpy.int32(0), trained, optimizer.init(trained))
    return make_train_step(cfg, optimizer, mesh).lower(state, frozen, batch).compile(), state, frozen, batch


def ours():
  """A function that runs one more step and returns its loss."""
  compiled, state, frozen, batch = our_step()

  def step() -> float:
    nonlocal state
    state, metrics = compiled(state, frozen, batch)
    return float(metrics['loss'])

  return step


def transformers_step():
  """The same of transformers' LLaVA."""
  import numpy as np
  import torch
  from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

  torch.set_num_threads(THREADS)
  torch.manual_seed(0)
  vision = CLIPVisionConfig(
    hidden_size=TOWER_WIDTH,
    intermediate_size=4 * TOWER_WIDTH,
    num_hidden_layers=TOWER_LAYERS,
    num_attention_heads=TOWER_HEADS,
    image_size=336,
    patch_size=14,
  )
  text = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
  )
  image = VOCABULARY - 1
  model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)).train()
  model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
  for name, parameter in model.named_parameters():
    parameter.requires_grad_('vision' not in name and 'projector' not in name)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
  given = torch.from_numpy(tokens().astype(np.int64))
  ids = torch.cat([given[:, :TEXT_BEFORE], torch.full((BATCH, 576), image), given[:, TEXT_BEFORE:]], 1)
  labels = torch.full_like(ids, -100)
  labels[:, -ANSWER:] = ids[:, -ANSWER:]
  pixels = torch.from_numpy(np.random.default_rng(1).standard_normal((BATCH, 3, 336, 336), np.float32))

  def step() -> float:
    optimizer.zero_grad()
    loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.item()

  return step


def serve(contender: str) -> None:
  """One step per line read; answers with its seconds and loss."""
  import time

  step = transformers_step() if contender == 'transformers' else ours()
  step()  # compiles, or fills caches
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.monotonic()
    loss = step()
    print(json.dumps([time.monotonic() - start, loss]), flush=True)


def memory() -> dict[str, float]:
  """GB of the compiled step on 16 rows whose layers keep everything: its temporaries, and with parameters and moments."""
  out = {}
  for parts in (1, 4):
    stats = our_step(parts, 16, 'none')[0].memory_analysis()
    out[f'temporaries, accumulate={parts}'] = stats.temp_size_in_bytes / 1e9
    out[f'all, accumulate={parts}'] = (stats.argument_size_in_bytes + stats.temp_size_in_bytes) / 1e9
  return out


def start(contender: str, folder: pathlib.Path) -> subprocess.Popen:
  """A process that serves one contender, with the project's code of `folder`."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': str(THREADS), 'PYTHONPATH': str(folder)}
  command = [sys.executable, str(HERE), '--serve', contender]
  return subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
  """Runs the contenders in turn and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--other', type=pathlib.Path, help='another checkout of this project')
  parser.add_argument('--turns', type=int, default=6, help='steps of each contender')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  parser.add_argument('--memory', action='store_true', help="print the compiler's figures of memory alone")
  args = parser.parse_args()
  if args.serve:
    serve(args.serve)
    return
  if args.memory:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path.insert(0, str(ROOT))
    found = {k: round(v, 3) for k, v in memory().items()}
    print(json.dumps(found, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {'memory, GB': found}, indent=1) + '\n')
    return
  contenders = {'ours': ROOT, 'transformers': ROOT} | ({'other': args.other.resolve()} if args.other else {})
  workers = {name: start(name, folder) for name, folder in contenders.items()}
  for name, worker in workers.items():
    if worker.stdout.readline().strip() != 'ready':
      sys.exit(f'error: {name} did not start; see above')
  seconds = {name: [] for name in workers}
  losses = {}
  for turn in range(args.turns):
    for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
      print('go', file=workers[name].stdin, flush=True)
      elapsed, losses[name] = json.loads(workers[name].stdout.readline())
      seconds[name].append(elapsed)
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  quartiles = lambda values: [round(q, 3) for q in statistics.quantiles(values, n=4, method='inclusive')]
  result = {'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores', 'turns': args.turns}
  result['date'] = str(datetime.date.today())
  for name, values in seconds.items():
    low, median, high = quartiles(values)
    result[name] = {'seconds': median, 'quartiles': [low, high]}
    line = f'{name:14} {median:7.3f} s [{low:.3f} {high:.3f}]  loss {losses[name]:.3f}'
    if name != 'ours':
      low, median, high = quartiles([a / b for a, b in zip(seconds['ours'], values)])
      result[name] |= {'ours over it': median, 'its quartiles': [low, high]}
      line += f'   ours / {name} = {median:.3f} [{low:.3f} {high:.3f}]'
    print(line)
  RESULTS.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
