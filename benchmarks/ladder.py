"""A burst of questions in room for a few dense ones, through the engine: answered densely, and on the controller's ladder.

    python benchmarks/ladder.py --checkpoint=runs/digits/dynamic/checkpoints [--burst=64] [--dense_slots=8] [--turns=5]

Both have the same bytes for keys and values and the same weights; they take turns, A B, B A, ... Reading questions have answers of
71 tokens; the mixed ones are the demo's own, 85 % of them answered by one token. Latency runs from asking to the end of the answer,
and all of a burst are asked at once. Results go to benchmarks/results/ladder.json.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import time

import checkout  # noqa: F401
import jax
import numpy as np

import dynllava_jax as dl
from dynllava_jax.config import Stage
from dynllava_jax.controller.ladder import Need
from dynllava_jax.controller.rules import DECODE, Rules
from dynllava_jax.controller.rungs import by_rules
from dynllava_jax.data.digits import Questions
from dynllava_jax.evals.benchmarks.digits import LONG_TASKS, score
from dynllava_jax.files import write_atomically
from dynllava_jax.serving import questions
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.request import Request

RESULTS = pathlib.Path(__file__).parent / 'results' / 'ladder.json'
TEXT, ANSWER = 32, 71


def asked(loaded, count: int, long_only: bool) -> tuple[list, list[Request]]:
  """So many questions of the test split, and them as requests."""
  source, samples, i = Questions('test', 0, 100_000), [], 0
  while len(samples) < count:
    sample, i = source[i], i + 1
    if not long_only or sample.task in LONG_TASKS:
      samples.append(sample)
  words = [s.conversations[0]['value'].split('\n', 1)[1] for s in samples]
  plain = [questions.question(i, s.image, text) for i, (s, text) in enumerate(zip(samples, words))]
  rows = questions.lay_out(loaded, plain, (TEXT,), [0] * count)
  return samples, [Request(f'question {i}', row) for i, row in enumerate(rows)]


def burst(engine: Engine, samples: list, requests: list[Request]) -> dict:
  """All asked at once: seconds, latencies, right answers, and which rungs answered."""
  begun = time.monotonic()
  tickets = [engine.submit(r) for r in requests]
  engine.run(tickets)
  seconds = time.monotonic() - begun
  replies = [t.reply() for t in tickets]
  latencies = np.asarray([r.timings.total for r in replies])
  right = [score(s.task, s.conversations[1]['value'], r.text) for s, r in zip(samples, replies)]
  rungs = {name: sum(r.rung == name for r in replies) for name in dict.fromkeys(r.rung for r in replies)}
  p50, p95 = (float(np.percentile(latencies, p)) for p in (50, 95))
  return dict(
    seconds=seconds, per_second=len(replies) / seconds, p50=p50, p95=p95, accuracy=100 * float(np.mean(right)), rungs=rungs
  )


def summary(turns: list[dict]) -> dict:
  """Medians over the turns; accuracy and rungs are the same in all."""
  medians = {k: round(statistics.median(t[k] for t in turns), 4) for k in ('seconds', 'per_second', 'p50', 'p95', 'accuracy')}
  return medians | dict(rungs=turns[-1]['rungs'], turns=len(turns))


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--burst', type=int, default=64)
  parser.add_argument('--dense_slots', type=int, default=8)
  parser.add_argument('--turns', type=int, default=5)
  flags = parser.parse_args()
  model = dl.load(flags.checkpoint, max_new_tokens=ANSWER, text_lengths=(TEXT,))
  loaded = model.loaded
  own = by_rules(loaded.stages, loaded.model, Rules(), DECODE)
  cut = loaded.stages[1].start
  dense = {'dense': (Stage(), Stage(start=cut))}
  room = flags.dense_slots * model.adaptive(2**40, lists=dense).pools.ladder.rungs[0].bytes(Need(TEXT, ANSWER))
  engines = {'dense': model.adaptive(room, lists=dense), 'ladder': model.adaptive(room, lists=own)}
  result = dict(
    device=f'{jax.devices()[0].device_kind} ({platform.machine()})',
    date=str(datetime.date.today()),
    room_bytes=room,
    rungs={n: [(p.rung, p.slots) for p in e.pools.pools] for n, e in engines.items()},
    rows={},
  )
  for kind in ('reading', 'mixed'):
    samples, requests = asked(loaded, flags.burst, kind == 'reading')
    for engine in engines.values():
      engine.warm(requests[:1])
    turns: dict[str, list[dict]] = {name: [] for name in engines}
    for turn in range(flags.turns):
      for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
        turns[name].append(burst(engines[name], samples, requests))
    for name, found in turns.items():
      result['rows'][f'{kind}, {name}'] = row = summary(found)
      print(f'{kind}, {name}: {row}')
    ratios = [b['per_second'] / a['per_second'] for a, b in zip(turns['dense'], turns['ladder'])]
    result['rows'][f'{kind}, ratio'] = [round(r, 3) for r in ratios]
    print(f'{kind}: throughput over dense {statistics.median(ratios):.2f} (turns {min(ratios):.2f} to {max(ratios):.2f})')
  result['decisions'] = [d.line for d in list(engines['ladder'].pools.ladder.decisions)[:: flags.burst]]
  write_atomically(RESULTS, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__':
  main()
