"""One search from top to bottom: checkpoint and hardware, costs, quality where it is asked for, choice, files."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax

from dynllava_jax import checkpoint, presets
from dynllava_jax.config import DENSE, ConfigError, EvalConfig, EvalRun, Stage
from dynllava_jax.controller import hardware, report, resources
from dynllava_jax.controller.estimate import Costs
from dynllava_jax.controller.quality import Quality, read_quality
from dynllava_jax.controller.rules import Rules
from dynllava_jax.controller.search import Found, described, missed, search, work_of
from dynllava_jax.controller.target import Target
from dynllava_jax.evals.benchmarks import suite

PRESETS = {'7b': presets.DYNAMIC_LLAVA_7B, '13b': presets.DYNAMIC_LLAVA_13B}
PUBLISHED = (Stage(), Stage(start=2, selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5))
MEASURED = 8  # settings at most that are measured, evenly over those that reach the rest of a target
MORE_CHIPS = 7  # doublings that are tried, and one
BENCH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'results'


@dataclasses.dataclass(frozen=True)
class Asked:
  """The flags of the program."""

  path: str | None
  preset: str | None
  target: Target
  rules: Rules
  results: pathlib.Path | None
  measure: int
  bench: pathlib.Path | None
  benchmark: str
  out: pathlib.Path


def run(asked: Asked, tell: Callable[[str], None]) -> bool:
  """Whether a setting reaches the target; prints and writes.

  Raises:
    ConfigError, CheckpointError: what cannot be searched, and why.
  """
  target, out = asked.target, asked.out
  suite.get(asked.benchmark, '--benchmark')  # else eval.py would refuse what is written here
  if asked.path is None:
    model, own, reducer, where = PRESETS[asked.preset], PUBLISHED, None, 'CHECKPOINT'
  else:
    info = checkpoint.read_info(asked.path)
    model, own, reducer, where = info.model, info.stages, info.reducer, asked.path
  selector = 'dynamic' if any(s.selector == 'dynamic' for s in own) else 'fastv'
  place = hardware.of_name(target.device) if target.device else here()
  place = hardware.calibrated(place, asked.bench) if asked.bench else place
  if target.memory is None or target.memory > place.memory:
    target = dataclasses.replace(target, memory=place.memory)
  dtype = 'bfloat16' if place.limits.source == 'data sheet' else 'float32'
  work = work_of(target, model.num_image_tokens)
  costs = Costs(model, place, work, 2 if dtype == 'bfloat16' else 4, reducer)
  quality = read_quality(asked.results, selector) if asked.results else Quality()
  if target.quality and not asked.results and asked.measure:
    quality = measured(asked, search(costs, own, dataclasses.replace(target, quality=None), asked.rules, quality), work.text, dtype)
  found = search(costs, own, target, asked.rules, quality)
  tell(f'{place.name}: {place.source}. Quality: {quality.source}.')
  tell(f'{work.text} text tokens and {model.num_image_tokens} of an image, {work.new} of an answer: mostly {found.phase}.')
  out.mkdir(parents=True, exist_ok=True)
  report.picture(found, target, out / 'front.png')
  if not found.reaching:
    tell('No setting reaches the target. What would:')
    for line in [*missed(found, target), *others(costs, own, target, asked.rules, quality)]:
      tell(f'  {line}')
    tell(f'\nPareto front of memory, tokens/s and scarcity ({out / "front.png"}):\n{report.table(found.front)}')
    return False
  chosen = found.reaching[0]
  tell(f'\nChosen: {described(chosen)}\n{report.table([chosen])}\n\nRunner-ups:\n{report.table(report.runners_up(found))}')
  tell(f'\nPareto front of memory, tokens/s and scarcity ({out / "front.png"}):\n{report.table(found.front)}')
  headline = f'Dense, and what was chosen on {place.name}: {described(chosen)}.'
  sizes = dict(benchmark=asked.benchmark, text=work.text, new=work.new, dtype=dtype)
  report.write_config(chosen, out / 'choice.py', where, headline, **sizes)
  tell(f'\n{out / "choice.py"}: a config for eval.py')
  return True


def others(costs: Costs, own: tuple[Stage, ...], target: Target, rules: Rules, quality: Quality) -> list[str]:
  """What else would reach a target that nothing reaches: a smaller batch, more of the same chips."""
  lines = []
  for batch in (target.batch >> i for i in range(1, target.batch.bit_length())):
    if found := search(costs, own, dataclasses.replace(target, batch=batch), rules, quality).reaching:
      lines.append(f'batch={batch} would do ({described(found[0])})')
      break
  place = costs.hardware
  name = place.name.partition('-')[0]
  for chips in (place.chips << i for i in range(1, MORE_CHIPS)) if target.device else ():
    more = Costs(costs.model, dataclasses.replace(place, chips=chips), costs.work, costs.width, costs.reducer)
    if found := search(more, own, target, rules, quality).reaching:
      lines.append(f'device={name}-{chips} would do ({described(found[0])})')
      break
  return lines


def here() -> hardware.Hardware:
  """The first device of this process; of one without a data sheet, such as a CPU, what a recorded benchmark measured."""
  kind = jax.devices()[0].device_kind
  if name := hardware.name_of(kind):
    return hardware.of_name(name)
  bench = BENCH / 'bench_mid.json'
  if not bench.exists():
    raise ConfigError(f'--target: what {kind} can do is not known; give device=..., or --bench=FILE measured here')
  limits = hardware.Limits(**json.loads(bench.read_text())['machine']['limits'])
  place = hardware.Hardware(kind, limits, memory=resources.machine_memory())
  return hardware.calibrated(place, bench)


def measured(asked: Asked, found: Found, text: int, dtype: str) -> Quality:
  """Agreement with dense, of settings that reach the rest of the target, by an evaluation of the demo's questions."""
  if asked.path is None:
    raise ConfigError('--measure: needs a checkpoint, and --preset has none')
  from dynllava_jax.evals import report as evaluation

  lists = {c.setting.stages: c for c in reversed(found.reaching) if c.setting.stages != DENSE}
  chosen = sorted(lists.values(), key=lambda c: c.scarcity)
  chosen = [chosen[round(i * (len(chosen) - 1) / max(1, MEASURED - 1))] for i in range(min(MEASURED, len(chosen)))]
  runs = {'dense': EvalRun(stages=DENSE)}
  for c in chosen:
    runs[f'image {c.setting.image:.2f} text {c.setting.text:.2f}'] = EvalRun(stages=c.setting.stages)
  sizes = dict(questions=asked.measure, batch_size=min(64, asked.measure), text_lengths=(max(32, text),), max_new_tokens=128)
  cfg = EvalConfig(runs=runs, dtype=dtype, agreement=True, **sizes)
  folder = asked.out / 'measured'
  evaluation.run(cfg, asked.path, folder)
  selector = next((s.selector for c in chosen for s in c.setting.stages if s.selector != 'all'), 'all')
  return read_quality(folder / 'results.json', selector)
