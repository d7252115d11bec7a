"""`--plan` and `--compile_for`: what a run takes of a machine, told before it is started."""

import io
import math
import time
from typing import NoReturn

import jax
import numpy as np
from PIL import Image

from dynllava_jax import methods, sharding
from dynllava_jax.config import ConfigError, TrainConfig
from dynllava_jax.data.images import decode, preprocess
from dynllava_jax.display import Terminal
from dynllava_jax.training import ahead, fitting, footprint, limits
from dynllava_jax.training.machines import GIB, Machine
from dynllava_jax.training.throughput import model_flops, peak_flops

ASSUMED_MFU = 0.4  # of a chip's peak, for times that nobody has measured
PICTURE = (640, 480)  # pixels; the median of COCO's, of which most of LLaVA's data is
MEASURED_SECONDS = 0.5
DAY, TERA = 86400, 1e12


def here() -> tuple[str, int, float, float | None]:
  """(name, number, bytes and FLOP/s of each) of the devices of this machine."""
  kind = jax.devices()[0].device_kind
  return kind, jax.device_count(), limits.memory_of_a_device(), peak_flops(kind)


def plan(cfg: TrainConfig, machine: Machine | None) -> None:
  """Prints the plan of a run on a machine, or on the devices at hand.

  Raises:
    ConfigError: it does not fit; the message has overrides that do, if there are any.
  """
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  methods.check_training(cfg.stages, bool(cfg.lora))
  if machine:
    kind, devices = machine.name, machine.devices * cfg.mesh.slices
    memory, peak = machine.chip.memory, peak_flops(machine.chip.kind)
    memory = memory or (limits.memory_of_a_device() if machine.family == 'cpu' else 0)
  else:
    kind, devices, memory, peak = here()
  if not memory:
    raise ConfigError(f'--machine: the memory of {kind} is not known here; --compile_for={kind} asks its compiler')
  sizes = sharding.mesh_sizes(cfg.mesh, devices)
  say = Terminal().print
  say(f'{kind}, {devices:,} devices: {_settings(cfg, sizes)}')
  ways = sharding.batch_ways(sizes)
  if cfg.batch_size % (ways * cfg.accumulate):
    parts = ways * cfg.accumulate
    _refuse(cfg, devices, memory, f'batch_size {cfg.batch_size} does not divide over data x fsdp x accumulate = {parts}')
  found = footprint.of_run(cfg, sizes)
  say('bytes per device, by arithmetic:')
  for name in ('parameters', 'gradients', 'optimizer', 'activations', 'temporaries', 'batch'):
    say(f'  {name:<12} {getattr(found, name) / GIB:8.2f} GiB')
  say(f'  {"together":<12} {found.total / GIB:8.2f} GiB of {memory / GIB:.2f}')
  for line in course(cfg, devices, peak):
    say(line)
  if found.total > memory:
    _refuse(cfg, devices, memory, f'{found.total / GIB:.2f} GiB per device are more than the {memory / GIB:.2f} of {kind}')
  if found.total > fitting.MARGIN * memory:
    say('this is close: it is right to a tenth; --compile_for asks the compiler')


def _refuse(cfg: TrainConfig, devices: int, memory: float, why: str) -> NoReturn:
  if best := fitting.search(cfg, devices, memory):
    flags = ' '.join(best.overrides(cfg))
    raise ConfigError(f'{why}; with {best.footprint.total / GIB:.2f} GiB this fits: {flags}')
  smaller = 'optimizer.moment_dtype=bfloat16, param_dtype=bfloat16, optimizer.name=adafactor or lora take less'
  if more := fitting.fewest_devices(cfg, devices, memory):
    count, best = more
    flags = ' '.join(best.overrides(cfg))
    raise ConfigError(
      f'{why}; no mesh, accumulate and remat fit here, but on {count:,} such devices {flags or "they"} do; {smaller}'
    )
  raise ConfigError(f'{why}; no mesh, accumulate and remat fit, on more devices neither; {smaller}')


def _settings(cfg: TrainConfig, sizes: dict[str, int]) -> str:
  mesh = ' x '.join(f'{axis} {size}' for axis, size in sizes.items())
  over = f' over {cfg.mesh.slices} slices' if cfg.mesh.slices > 1 else ''
  return f'mesh {mesh}{over}, batch {cfg.batch_size}, accumulate {cfg.accumulate}, remat {cfg.remat}'


def step_flops(cfg: TrainConfig) -> float:
  """FLOPs that a step needs if every row of the largest bucket is full and has an image."""
  rows = np.full(cfg.batch_size, ahead.positions(cfg, cfg.data.text_length))
  return model_flops(cfg, rows, cfg.batch_size)


def course(cfg: TrainConfig, devices: int, peak: float | None) -> list[str]:
  """Lines on what a step computes, how long the run takes, what feeds it and what it stores."""
  tokens, flops, rate = cfg.batch_size * ahead.positions(cfg, cfg.data.text_length), step_flops(cfg), measured_rate(cfg)
  lines = [f'a step: {tokens:,} tokens if every row is full, {cfg.batch_size} images, {flops / TERA:,.0f} TFLOP that it needs']
  of_a_core = f'a core of this machine makes {rate:,.0f} (measured now, JPEGs of {PICTURE[0]} x {PICTURE[1]})'
  if peak:
    seconds = flops / (devices * peak * ASSUMED_MFU)
    days, hours, need = seconds * cfg.steps / DAY, seconds * cfg.steps / 3600 * devices, cfg.batch_size / seconds
    each = f'{seconds:.2f} s at {ASSUMED_MFU:.0%} of the peak (assumed)'
    lines.append(f'the run: {cfg.steps:,} steps of {each}: {days:.2f} days, {hours:,.0f} device hours')
    lines.append(f'hosts: {need:,.0f} images/s to be read; {of_a_core}: {math.ceil(need / rate)} cores in all')
  else:
    lines.append(f'the run: {cfg.steps:,} steps; the peak of this device is not known, so no times')
    lines.append(f'hosts: of images/s, {of_a_core}')
  stored = checkpoint_bytes(cfg) / 1e9
  lines.append(f'a checkpoint: {stored:,.1f} GB; {cfg.keep} are kept, {stored * cfg.keep:,.1f} GB, and one that is written')
  return lines


def checkpoint_bytes(cfg: TrainConfig) -> float:
  """Of one step: weights, of a LoRA run those it trains, and moments."""
  state, kept = ahead.abstract_state(cfg)
  size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return size(state.params) + size(state.opt_state) + (0 if cfg.lora else size(kept))


def measured_rate(cfg: TrainConfig) -> float:
  """Pictures per second that one core of this machine decodes and resizes, measured for half a second."""
  noise = np.random.default_rng(0).normal(128, 40, (PICTURE[1] // 8, PICTURE[0] // 8, 3)).clip(0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).resize(PICTURE, Image.BICUBIC).save(file, 'JPEG', quality=90)
  content, count, start = file.getvalue(), 0, time.process_time()
  while count < 3 or time.process_time() - start < MEASURED_SECONDS:
    preprocess(decode(content, 'a picture'), cfg.model.vision, cfg.data.image_aspect)
    count += 1
  return count / (time.process_time() - start)


def compile_for(cfg: TrainConfig, machine: Machine) -> None:
  """Compiles the run's step for a machine and prints what its compiler says.

  Raises:
    ConfigError: it does not fit; the message has overrides that should.
  """
  methods.check_run(cfg.model, cfg.stages, cfg.reducer)
  mesh = sharding.make_mesh(cfg.mesh, ahead.devices(machine, cfg.mesh.slices))
  say = Terminal().print
  try:
    compiled = ahead.compile_step(cfg, mesh, machine.chip.clock)
  except ahead.TooLargeError as e:
    _refuse(cfg, mesh.size, e.have, str(e))
  say(f'{machine.name}, {mesh.size:,} devices: {_settings(cfg, dict(mesh.shape))}')
  say(f'compiled in {compiled.compile_seconds:.0f} s; nothing was run')
  for line in told(cfg, machine, mesh.size, compiled):
    say(line)


def told(cfg: TrainConfig, machine: Machine, devices: int, compiled: ahead.Compiled) -> list[str]:
  """What a compiled step is like, each line with where its figures come from."""
  of, values = f' of {machine.chip.memory / GIB:.2f}' if machine.chip.memory else '', figures(cfg, machine, devices, compiled)
  parts = f'arguments {values["arguments_gib"]:.2f}, temporaries {values["temporaries_gib"]:.2f}'
  lines = [
    f'memory per device (compiler): {values["gib_per_device"]:.2f} GiB{of}: {parts}',
    'collectives of a step, sent by each device (the compiled program, as rings):',
  ]
  lines += [f'  {c.kind:<20} {c.count:>6} times {c.sent / 1e9:10.3f} GB' for c in compiled.collectives]
  if 'estimated_ms' in values:
    lines.append(f"time without collectives (the compiler's estimate): {values['estimated_ms']:,.0f} ms")
  if 'collectives_ms' in values:
    speed = f'{machine.chip.links / 1e9:.0f} GB/s per chip, published'
    lines.append(f'time of the collectives ({speed}): {values["collectives_ms"]:,.0f} ms at best')
  if 'mfu_before_collectives' in values:
    first, last = values['mfu_before_collectives'], values['mfu_behind_each_other']
    lines.append(f'MFU that this implies: {first:.2f} if collectives cost nothing, {last:.2f} if nothing overlaps')
  return lines


def figures(cfg: TrainConfig, machine: Machine, devices: int, compiled: ahead.Compiled) -> dict[str, float]:
  """Memory, times and MFU of a compiled step by name; what its machine's chips are not known for is left out."""
  chip, sent = machine.chip, sum(c.sent for c in compiled.collectives)
  values = {
    'gib_per_device': round(compiled.held / GIB, 3),
    'arguments_gib': round(compiled.arguments / GIB, 3),
    'temporaries_gib': round(compiled.temporaries / GIB, 3),
    'collectives_gb': {c.kind: round(c.sent / 1e9, 3) for c in compiled.collectives},
  }
  if compiled.seconds:
    values['estimated_ms'] = round(1e3 * compiled.seconds, 1)
  if chip.links:
    values['collectives_ms'] = round(1e3 * sent / chip.links, 1)
  peak = peak_flops(chip.kind) if chip.kind else None
  if compiled.seconds and peak:
    at_peak = step_flops(cfg) / devices / peak
    values['mfu_before_collectives'] = round(at_peak / compiled.seconds, 3)
    values['mfu_behind_each_other'] = round(at_peak / (compiled.seconds + sent / chip.links), 3)
  return values
