"""Recomputes what was recorded of methods that act between vision tower and language model.

Per prompt: what the method looked at and chose (its row of `RECORDED`), the image tokens, the logits of the prefill, and the
tokens decoded after it with their logits. Each prompt runs alone, and then in one batch with the others, a text-only row and a
longer row whose image stands elsewhere.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from dynllava_jax.config import IMAGE_ID
from dynllava_jax.convert.records.base import EXACT, LOGITS, Quantity, compare, in_range
from dynllava_jax.convert.records.bases import QUESTION, Base, Record, Sample, groups, samples
from dynllava_jax.convert.records.described import GROUP
from dynllava_jax.convert.records.reducer_arrays import RECORDED, TOLERANCES, Asking, Run
from dynllava_jax.convert.records.reduction import Reduction, Row
from dynllava_jax.convert.records.runs import cut, tail


def verify(record: Record) -> Iterator[Quantity]:
  """Every quantity of a record of one of these methods; prompts that are run in the same way make up a batch."""
  base, described = record.described_base()
  prompts = samples(record, base, described)
  for name, sample in prompts.items():
    prompts[name] = dataclasses.replace(sample, question=question(record, base, name))
  members: dict[Run, list[str]] = {}
  check_complete(record, groups(record, prompts), prompts)
  for group, name in groups(record, prompts).items():
    for run in RECORDED[record.method].runs(Asking(record, base, group, prompts[name])):
      members.setdefault(run, []).append(group)
  done: set[str] = set()
  for run, together in members.items():
    reduction = Reduction(base, run.reducer, RECORDED[record.method].arrays, run.stages)
    inputs = [prompts[group.rpartition('/')[2]] for group in together]
    steps = [decoded(record, group, run) for group in together]
    rows = [('', group, reduction([prompt], [n])[0]) for group, prompt, n in zip(together, inputs, steps)]
    rows += [('in a batch: ', *pair) for pair in zip(together, reduction([*inputs, *neighbours(inputs[0])], steps))]
    for where, group, row in rows:
      for quantity in _compare(record, group, run, where, row):
        if quantity.name not in done:
          done.add(quantity.name)
          yield quantity


def check_complete(record: Record, found: dict[str, str], prompts: dict[str, Sample]) -> None:
  """ConversionError if a prompt lacks an array that `shapes` of `meta.json` lists for another prompt of its variant."""
  listed: dict[str, set[str]] = {}
  for key in record.setting('shapes', kind=GROUP, default={}):
    for group in found:
      if key.startswith(f'{group}/'):
        listed.setdefault(group.rpartition('/')[0], set()).add(key.removeprefix(f'{group}/'))
  for group, prompt in found.items():
    if prompts[prompt].pixels is not None:
      for name in sorted(listed.get(group.rpartition('/')[0], ())):
        record.array(f'{group}/{name}')


def question(record: Record, base: Base, name: str) -> np.ndarray | None:
  """What is asked of a prompt, int[Q] in CLIP's tokens; None where nothing of it was recorded or nothing reads it."""
  at, text = f'{name}/{QUESTION}', base.info.model.clip_text
  if at not in record.case or text is None:
    return None
  return in_range(record.at, at, record.given(at, (None,), whole=True), 0, text.vocab_size).astype(np.int32)


def decoded(record: Record, group: str, run: Run) -> int:
  """How many tokens a run decodes: as many as were recorded, one if none were. ConversionError for logits without tokens."""
  at = f'{group}/{run.prefix}'
  if f'{at}tokens' not in record.case:
    if f'{at}decode_logits' in record.case:
      record.array(f'{at}tokens')
    return 1
  return record.steps(f'{at}tokens')


def neighbours(sample: Sample) -> list[Sample]:
  """Other rows for a batch: one without image, and a longer one that starts with its image."""
  text = sample.ids[sample.ids != IMAGE_ID]
  upside_down = None if sample.pixels is None else sample.pixels[::-1]
  return [Sample(text[: len(text) // 2 + 1], None), Sample(np.concatenate([[IMAGE_ID], text, text]), upside_down, sample.question)]


def _compare(record: Record, group: str, run: Run, where: str, row: Row) -> Iterator[Quantity]:
  """The arrays of a group, `GROUP/NAME`, and those of its prompt that all variants share, `NAME/PROMPT`."""
  variant, _, prompt = group.rpartition('/')
  recorded = {k: k.removeprefix(f'{group}/') for k in record.case if k.startswith(f'{group}/')}
  if variant:
    recorded |= {k: k.partition('/')[0] for k in record.case if k.count('/') == 1 and k.endswith(f'/{prompt}')}
  of_group = {name: record.case[key] for key, name in recorded.items()}
  answer = cut(row.answer, decoded(record, group, run))
  found = row.seen | RECORDED[record.method].answered(answer, of_group)
  for key, name in recorded.items():
    theirs = record.case[key]
    if name == f'{run.prefix}logits':  # some records hold the last row alone
      found[name] = tail(answer.prefill_logits, theirs)
    elif name == f'{run.prefix}tokens':
      found[name] = answer.tokens
    elif name == f'{run.prefix}decode_logits':
      found[name] = answer.logits
    elif name == 'text_embeds' and name in found:  # in a batch there are as many segments as the longest question has
      found[name] = found[name][found['has_text']]
    if name in found:
      whole = any(np.asarray(x).dtype.kind in 'iu' for x in (theirs, found[name]))
      yield compare(f'{where}{key}', found[name], theirs, EXACT if whole else TOLERANCES.get(name.partition('/')[0], LOGITS))
