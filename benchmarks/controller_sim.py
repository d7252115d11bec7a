"""The controller's ladder at scale, simulated: 7B on eight v5e or v5p chips, Poisson arrivals and bursts, against fixed settings.

    python benchmarks/controller_sim.py            # a minute, no device

Nothing is run. A server answers as `serving.engine` does: prompts are run as they come, at most 16 at once, then all requests get
8 tokens; a rung has the room for keys and values until its last request is over. Seconds are the arithmetic of
`controller.estimate` times what the TPU compiler's estimate of 7B on one v5p (results/tpu_fit.json) is above it, for prefill and
for decoding; work is spread evenly over the eight chips and what they tell each other is not counted. The compiler's estimates
are pessimistic where weights are streamed, so read ratios, not seconds. Requests are of four kinds, after LLaVA's evaluations:
prompts in their text buckets, answers drawn around their usual lengths, room counted for what their scripts allow. Results go to
results/controller_sim.json.
"""

import argparse
import collections
import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics

import checkout  # noqa: F401
import numpy as np

from dynllava_jax import presets
from dynllava_jax.controller.estimate import CACHED, Costs, Setting, Work
from dynllava_jax.controller.hardware import Hardware, of_name
from dynllava_jax.controller.ladder import Ladder, Load, Need, Rung
from dynllava_jax.controller.program import PUBLISHED
from dynllava_jax.controller.rules import DECODE, Rules
from dynllava_jax.controller.rungs import by_rules
from dynllava_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).parent / 'results'
MODEL = presets.DYNAMIC_LLAVA_7B
PROMPTS, TOKENS = 16, 8  # prompts that are run at once, tokens per dispatch
SPARE = 0.9  # of the memory beside the weights that keys and values may have; the rest is for temporaries
# Share of the requests, text bucket, tokens that may be generated, and mean and spread (of the logarithm) of what is.
SUITES = {
  'a word (GQA, VQAv2, POPE, MME)': (0.5, 128, 128, 3, 0.5),
  'a letter (ScienceQA, MMBench, SEED)': (0.2, 256, 128, 2, 0.2),
  'sentences (MM-Vet)': (0.1, 128, 1024, 60, 0.8),
  'paragraphs (LLaVA-Bench, LVIS-VQA, ShareGPT4V-VQA)': (0.2, 128, 1024, 160, 0.5),
}
SECONDS = 180.0  # of arrivals


@dataclasses.dataclass
class Asked:
  """A request. Times in seconds; `left`: tokens still to come."""

  at: float
  need: Need
  length: int
  left: int = 0
  first: float = 0.0
  end: float = 0.0
  rung: str = ''


def calibrated(name: str) -> Hardware:
  """Eight chips, with the compiler's estimates over the arithmetic's for one v5p."""
  recorded = json.loads((RESULTS / 'tpu_fit.json').read_text())
  one = Costs(MODEL, of_name('v5p'), Work(64, 256), 2)
  rows, own = 16, by_rules(PUBLISHED, MODEL, Rules(), DECODE)
  pairs = {'dense': (own['dense'], 1.0), 'dynamic': (PUBLISHED, 0.5)}
  factors = collections.defaultdict(list)
  for kind, (stages, text) in pairs.items():
    setting = Setting(1.0, text, rows, CACHED, stages)
    for part, seconds in (('prefill', one.prefill_seconds(stages, rows)), ('decode', one.step_seconds(setting))):
      factors[part].append(recorded[f'{part}_7b_v5p_{kind}']['estimated_ms'] / 1e3 / seconds)
  return dataclasses.replace(of_name(name), factors={part: statistics.mean(f) for part, f in factors.items()})


class Machine:
  """What rungs cost on some chips: seconds of a prompt, of a step, and bytes."""

  def __init__(self, hardware: Hardware):
    self.hardware = hardware
    self._costs = {}
    self.weights = self.costs(Need(64, 64)).weights
    self.room = int(SPARE * (hardware.chips * hardware.memory - self.weights))

  def costs(self, need: Need) -> Costs:
    """For requests of one kind."""
    if need not in self._costs:
      self._costs[need] = Costs(MODEL, self.hardware, Work(need.text, need.new), 2)
    return self._costs[need]

  def prefill(self, rung: Rung, group: list[Asked]) -> float:
    """Seconds of some prompts together."""
    flops = sum(self.costs(a.need).flops_of(rung.stages, 1.0, CACHED)[0] for a in group)
    return self.hardware.seconds('prefill', flops, self.weights)

  def step(self, rung: Rung, running: list[Asked]) -> float:
    """Seconds of a token for all."""
    counts = collections.Counter(a.need for a in running)
    text = rung.stages[-1].text_keep_budget
    flops = sum(n * self.costs(need).flops_of(rung.stages, text, CACHED)[1] for need, n in counts.items())
    moved = self.costs(Need(64, 64)).decoder + sum(n * rung.bytes(need) for need, n in counts.items())
    return self.hardware.seconds('decode', flops, moved)


def arrivals(rate: float, bursts: bool, seed: int) -> list[Asked]:
  """Requests by time: Poisson; or in bursts, 70 % of each minute's within its first 5 s, at the same mean rate."""
  rng = np.random.default_rng(seed)
  times = []
  for minute in range(int(SECONDS / 60)):
    count = rng.poisson(60 * rate)
    if not bursts:
      times += (60 * minute + 60 * rng.random(count)).tolist()
      continue
    inside = rng.random(count) < 0.7
    times += (60 * minute + np.where(inside, 5 * rng.random(count), 60 * rng.random(count))).tolist()
  shares, kinds = [s[0] for s in SUITES.values()], list(SUITES.values())
  out = []
  for at in sorted(times):
    _, text, most, mean, spread = kinds[rng.choice(len(kinds), p=shares)]
    length = int(np.clip(round(rng.lognormal(np.log(mean), spread)), 1, most))
    out.append(Asked(at, Need(text, most), length))
  return out


def served(machine: Machine, rungs: tuple[Rung, ...], asked: list[Asked]) -> tuple[list[Asked], Ladder]:
  """Answers all, on a ladder of these rungs; a ladder of one is a fixed setting."""
  now = 0.0
  ladder = Ladder(rungs, Rules(), clock=lambda: now)
  pending, waiting, running, held = collections.deque(asked), collections.deque(), [], 0
  present = rungs[0]
  line = collections.Counter()
  while pending or waiting or running:
    if not waiting and not running:
      now = max(now, pending[0].at)
    while pending and pending[0].at <= now:
      line[pending[0].need] += 1
      waiting.append(pending.popleft())
    while waiting:
      first = waiting[0]
      line[first.need] -= 1
      decision = ladder.choose('', first.need, Load(room=machine.room, held=held, waiting={n: c for n, c in line.items() if c}))
      line[first.need] += 1
      rung = rungs[decision.index]
      if rung is not present and running:
        break  # the room is another rung's until its last request is over
      present, group = rung, []
      while waiting and len(group) < PROMPTS and held + rung.bytes(waiting[0].need) <= machine.room:
        group.append(waiting.popleft())
        line[group[-1].need] -= 1
        held += rung.bytes(group[-1].need)
      if not group:
        break
      now += machine.prefill(rung, group)
      for a in group:
        a.first, a.left, a.rung = now, a.length - 1, rung.name
        ladder.record(decision)
      running += group
    if running:
      steps = max(1, min(TOKENS, max(a.left for a in running)))
      now += steps * machine.step(present, running)
      for a in running:
        a.left -= steps
      for a in (a for a in running if a.left <= 0):
        a.end, held = now, held - present.bytes(a.need)
      running = [a for a in running if a.left > 0]
  return asked, ladder


def summary(asked: list[Asked]) -> dict:
  """Latency to first token and to the end, tokens per second, and who was answered on which rung."""
  percentile = lambda values, p: round(float(np.percentile(values, p)), 3)
  total, first = [a.end - a.at for a in asked], [a.first - a.at for a in asked]
  rungs = collections.Counter(a.rung for a in asked)
  return dict(
    requests=len(asked),
    p50=percentile(total, 50),
    p95=percentile(total, 95),
    first_p95=percentile(first, 95),
    tokens_per_second=round(sum(a.length for a in asked) / max(a.end for a in asked), 1),
    on={name: round(count / len(asked), 3) for name, count in rungs.items()},
  )


def capacity(machine: Machine, dense: Rung) -> float:
  """Requests per second that dense serves when more than enough wait."""
  burst = [dataclasses.replace(a, at=0.0) for a in arrivals(20, False, 9)]
  return len(burst) / max(a.end for a in served(machine, (dense,), burst)[0])


def main() -> None:
  """All machines, arrivals and settings."""
  argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
  results = dict(date=str(datetime.date.today()), suites={k: v[:4] for k, v in SUITES.items()}, rows=[])
  for name in ('v5e-8', 'v5p-8'):
    machine = Machine(calibrated(name))
    size = lambda stages: lambda need: machine.costs(need).kv_bytes(stages)
    lists = by_rules(PUBLISHED, MODEL, Rules(), DECODE)
    rungs = tuple(Rung(rung, stages, size(stages)) for rung, stages in lists.items())
    most = capacity(machine, rungs[0])
    factors = {k: round(v, 2) for k, v in machine.hardware.factors.items()}
    results[name] = dict(room_gib=round(machine.room / 2**30, 1), dense_requests_per_second=round(most, 2), factors=factors)
    print(name, results[name])
    settings = {rung.name: (rung,) for rung in (rungs[0], rungs[-1])} | {'ladder': rungs}
    for share, bursts in itertools.product((0.5, 0.9, 1.3), (False, True)):
      for setting, chosen in settings.items():
        asked, ladder = served(machine, chosen, arrivals(share * most, bursts, 1))
        changes = sum(d.index != d.before for d in ladder.decisions)
        row = dict(machine=name, load=share, arrivals='bursts' if bursts else 'Poisson', setting=setting) | summary(asked)
        results['rows'].append(row | dict(changes=changes))
        print(row)
  write_atomically(RESULTS / 'controller_sim.json', (json.dumps(results, indent=1) + '\n').encode())


if __name__ == '__main__':
  main()
