"""What LLaVA's training takes of TPU slices, by their compiler: the rows of docs/scale.md. No TPU is needed, and nothing is run.

    pip install libtpu==0.0.51
    python benchmarks/scale.py                         # every row that is not there yet, minutes each; stop it when you like
    python benchmarks/scale.py dynamic_7b_v5p          # this row, or all whose names begin so, again
    python benchmarks/scale.py --table                 # writes docs/scale.md's tables from the rows that are there

Each row is what `train.py --compile_for` prints, by the same code; it is written to benchmarks/results/scale.json once it is made.
"""

# ruff: noqa: E402
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import re
import sys

from checkout import ROOT

from dynllava_jax.training import machines

machines.pretend(machines.read('v5e:1x1', 'benchmarks'))  # before jax

import jax

from dynllava_jax import sharding
from dynllava_jax.checkpoint import write_atomically
from dynllava_jax.config import ConfigError, TrainConfig, from_config_dict
from dynllava_jax.display import Terminal
from dynllava_jax.training import ahead, fitting, footprint, plan

RESULTS, PAGE = ROOT / 'benchmarks' / 'results' / 'scale.json', ROOT / 'docs' / 'scale.md'
# Clouds count v4 and v5p by cores, two to a chip, the others by chips.
SLICES = {
  'v5e-64': 'v5e:8x8',
  'v5e-256': 'v5e:16x16',
  'v5p-64': 'v5p:2x4x4',
  'v5p-128': 'v5p:4x4x4',
  'v6e-64': 'v6e:8x8',
  'v6e-256': 'v6e:16x16',
  'v4-128': 'v4:4x4x4',
}
RECIPES = {'finetune': 'dense', 'dynamic': 'dynamic', 'finetune_lora': 'LoRA'}
FSDP = 16  # ways that weights are split; more cost more exchange than memory is worth
LARGEST_BATCH = 2**13
SHORT = ('data.text_length=448', 'data.buckets=(128, 256)')  # 1,024 positions
# Rows that targets are about; name -> (config, machine, overrides).
TARGETS = {
  'target_memory_and_time': ('dynamic', 'v5p:4x4x4', ('mesh.data=4',)),
  'target_mfu': ('dynamic', 'v5e:16x16', ('mesh.data=16', 'batch_size=256', *SHORT)),
  'target_causal_instead': ('finetune', 'v5p:4x4x4', ('mesh.data=4', 'batch_size=64', "frozen=('vision', 'projector')")),
  'target_64_chips': ('dynamic', 'v5e:8x8', ('mesh.data=4', 'batch_size=64', *SHORT)),
  'target_refused': ('finetune', 'v5e:4x4', ('accumulate=2',)),  # what --plan says instead of accumulate=1
  'target_two_slices': ('dynamic', 'v5e:16x16', ('mesh.data=8', 'mesh.tensor=4', 'mesh.slices=2', 'batch_size=128')),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One compilation: a config of configs/llava.py with overrides, for a machine."""

  config: str
  machine: str
  overrides: tuple[str, ...]

  @property
  def command(self) -> str:
    """What prints it."""
    flags = ' '.join(f'"--config.{o}"' if '(' in o else f'--config.{o}' for o in self.overrides)
    return f'python train.py --config=configs/llava.py:{self.config} {flags} --compile_for={self.machine}'.replace('  ', ' ')

  def run(self) -> TrainConfig:
    """The run itself."""
    spec = importlib.util.spec_from_file_location('llava_config', ROOT / 'configs' / 'llava.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(self.config)
    for override in self.overrides:
      key, _, value = override.partition('=')
      *groups, last = key.split('.')
      place = config
      for group in groups:
        place = place[group]
      place[last] = value if isinstance(place[last], str) else eval(value)  # our own text, above
    return from_config_dict(TrainConfig, config)


def rows() -> dict[str, Row]:
  """All of them by name; the largest batch is that of the plan's arithmetic, a power of two times the recipe's."""
  made = {name: Row(config, machine, overrides) for name, (config, machine, overrides) in TARGETS.items()}
  for size, recipe, slice_ in ((z, r, s) for z in ('7b', '13b') for r in RECIPES for s in SLICES):
    machine = machines.read(SLICES[slice_], 'SLICES')
    config = recipe + ('_13b' if size == '13b' else '')
    name = f'{recipe}_{size}_{slice_}'
    lora = ('init_from=BASE',) if 'lora' in recipe else ()
    at = lambda batch: Row(config, machine.name, (*lora, *settings(machine.devices, batch)))
    batch = 64 if recipe == 'dynamic' else 128
    made[name] = at(batch)
    largest = batch
    while 2 * largest <= LARGEST_BATCH and fits(at(2 * largest).run(), machine):
      largest *= 2
    if largest > batch:
      made[f'{name}_largest'] = at(largest)
  return made


def settings(devices: int, batch: int) -> tuple[str, ...]:
  """Mesh and batch: layers are split only where there are more devices than rows."""
  tensor = max(1, devices // batch)
  return f'mesh.data={devices // tensor // FSDP}', f'mesh.tensor={tensor}', f'batch_size={batch}'


def fits(cfg: TrainConfig, machine: machines.Machine) -> bool:
  """By arithmetic."""
  sizes = sharding.mesh_sizes(cfg.mesh, machine.devices)
  return footprint.of_run(cfg, sizes).total <= fitting.MARGIN * machine.chip.memory


def make(row: Row) -> dict:
  """Compiles it: figures by name, or why there are none."""
  cfg, machine = row.run(), machines.read(row.machine, 'machine')
  common = {
    'command': row.command,
    'batch': cfg.batch_size,
    'positions': ahead.positions(cfg, cfg.data.text_length),
    'date': str(datetime.date.today()),
    'jax': jax.__version__,
    'libtpu': importlib.metadata.version('libtpu'),
  }
  try:
    mesh = sharding.make_mesh(cfg.mesh, ahead.devices(machine, cfg.mesh.slices))
    reckoned = footprint.of_run(cfg, dict(mesh.shape)).total / machines.GIB
    compiled = ahead.compile_step(cfg, mesh, machine.chip.clock)
  except ConfigError as e:
    return common | {'refused': str(e)}
  more = {'planned_gib': round(reckoned, 3), 'compile_seconds': round(compiled.compile_seconds)}
  return common | {'devices': mesh.size} | plan.figures(cfg, machine, mesh.size, compiled) | more


def table(wanted: dict[str, Row], results: dict[str, dict]) -> str:
  """As Markdown."""
  head = ['row', 'batch x positions', 'GiB per chip', 'planned', "compiler's ms", 'collectives ms', 'MFU without and with them']
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  missing = []
  for name, row in wanted.items():
    found = results.get(name)
    if not found:
      missing.append(f'    {row.command}   # {name}')
      continue
    cells = [f'`{name}`', f'{found["batch"]} x {found["positions"]:,}']
    if 'refused' in found:
      cells += [found['refused'], *[''] * 4]
    else:
      error = found['planned_gib'] / found['gib_per_device'] - 1
      mfu = f'{found["mfu_before_collectives"]:.2f}, {found["mfu_behind_each_other"]:.2f}'
      times = [f'{found["estimated_ms"]:,.0f}', f'{found["collectives_ms"]:,.0f}']
      cells += [f'{found["gib_per_device"]:.2f}', f'{found["planned_gib"]:.2f} ({error:+.0%})', *times, mfu]
    lines.append(f'| {" | ".join(cells)} |')
  commands = [f'    {results[name]["command"]}   # {name}' for name in wanted if name in results]
  text = '\n'.join([*lines, '', 'The commands that print these rows:', '', *commands])
  return '\n'.join([text, '', 'Not made yet:', '', *missing]) if missing else text


def main(arguments: list[str]) -> None:
  """Makes rows, or the table."""
  say, wanted = Terminal().print, rows()
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  if arguments == ['--table']:
    text = PAGE.read_text()
    begin, end = '<!-- rows -->\n', '<!-- end of rows -->'
    PAGE.write_text(re.sub(f'{begin}.*{end}', lambda _: f'{begin}{table(wanted, results)}\n{end}', text, flags=re.S))
    return
  unknown = [a for a in arguments if not any(name.startswith(a) for name in wanted)]
  if unknown:
    sys.exit(f'error: no row begins with {", ".join(unknown)}; expected one of {", ".join(wanted)}')
  begins = lambda name: any(name == a or (a not in wanted and name.startswith(a)) for a in arguments)
  asked = [name for name in wanted if (begins(name) if arguments else name not in results)]
  for name in asked:
    say(f'{name}: {wanted[name].command}')
    found = make(wanted[name])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = found
    write_atomically(RESULTS, (json.dumps(results, indent=1) + '\n').encode())
    say(json.dumps(found))
    jax.clear_caches()


if __name__ == '__main__':
  main(sys.argv[1:])
