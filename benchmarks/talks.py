"""What is recalled of long conversations in little room: facts told in earlier turns, by what becomes of turns that do not fit.

    python benchmarks/talks.py --checkpoint=runs/digits/conversation/checkpoints [--talks=24]

Conversations of 20 turns of the test split (`data/talks.py`), 8 facts each, through `Model.chat`, whose own answers are its
history. `keep` has room for all; the others may hold half or a quarter as many text tokens. `oldest` drops the oldest sentences,
the baseline; `extract` ranks them, `summarise` has the model write down what it remembers. Results go to results/talks.json.
"""

import argparse
import collections
import datetime
import json
import pathlib
import time

import checkout  # noqa: F401
import numpy as np

import dynllava_jax as dl
from dynllava_jax.conversation import EXTRACT, GAPS, KEEP, SUMMARISE, History
from dynllava_jax.data.talks import RECALL, make_talk
from dynllava_jax.data.talks import SUMMARISE as QUESTION
from dynllava_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).parent / 'results' / 'talks.json'
TURNS, FACTS, ANSWER = 20, 8, 48
TEXT = 32  # of the first prompt


def histories(budget: int) -> dict[str, History]:
  """What may become of turns that there is no room for."""
  extract = lambda **options: History(mode=EXTRACT, budget=budget, **options)
  return {
    'oldest': extract(importance='recency'),
    'extract, frequency': extract(importance='frequency'),
    'extract, surprisal': extract(importance='surprisal'),
    'extract, surprisal, gaps': extract(importance='surprisal', positions=GAPS),
    'extract, surprisal, recomputed': extract(importance='surprisal', recompute=True),
    'oldest, recomputed': extract(importance='recency', recompute=True),
    'summarise': History(mode=SUMMARISE, budget=budget, prompt=QUESTION),
    'summarise, recomputed': History(mode=SUMMARISE, budget=budget, prompt=QUESTION, recompute=True),
  }


def recall(model: dl.Model, talks: list, history: History, later: int, new: int) -> dict:
  """Shares of right answers by kind of turn, and what was held and left out."""
  right, asked = collections.Counter(), collections.Counter()
  held, compactions, begun = [], 0, time.monotonic()
  for image, turns in talks:
    chat = model.chat(image, max_new_tokens=new, later_tokens=later, history=history)
    for turn in turns:
      reply = chat.send(turn.question, max_tokens=ANSWER)
      asked[turn.kind] += 1
      right[turn.kind] += reply.text == turn.answer
      if history.mode != KEEP:
        held.append(chat.held)
    compactions += len(chat.compactions)
  share = {kind: round(100 * right[kind] / asked[kind], 1) for kind in sorted(asked)}
  more = dict(most_held=max(held), mean_held=round(float(np.mean(held)), 1)) if held else {}
  return share | more | dict(compactions=compactions, recalled=asked[RECALL], seconds=round(time.monotonic() - begun, 1))


def main() -> None:
  """All histories at half and a quarter of the room."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--talks', type=int, default=24)
  flags = parser.parse_args()
  model = dl.load(flags.checkpoint, text_lengths=(TEXT, 128, 256))
  talks = [make_talk('test', np.random.default_rng((7, i)), FACTS, TURNS) for i in range(flags.talks)]
  size = lambda text: len(model.loaded.tokenizer.encode(text))
  whole = round(np.mean([sum(size(f'USER: {t.question} ASSISTANT: {t.answer}</s>') for t in turns) for _, turns in talks]))
  result = dict(date=str(datetime.date.today()), talks=flags.talks, turns=TURNS, facts=FACTS, text_tokens=whole, rows={})
  keep = recall(model, talks, History(), 2 * whole, 2 * whole)
  result['rows']['keep'] = keep
  print('keep', keep, flush=True)
  for part in (0.5, 0.25):
    budget = int(part * whole)
    for name, history in histories(budget).items():
      row = recall(model, talks, history, budget + 64, 64 + ANSWER)
      result['rows'][f'{name}, {part:.0%}'] = row
      print(f'{name}, {part:.0%} ({budget} tokens)', row, flush=True)
    write_atomically(RESULTS, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__':
  main()
