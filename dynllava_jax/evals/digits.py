"""Scoring of the embedded data set."""

from dynllava_jax.data.digits import read_scene
from dynllava_jax.data.samples import Sample

LONG_TASKS = ('read',)


def score(sample: Sample, text: str) -> float:
  """Short answers: 1 if they match exactly. Long answers: digit accuracy.

  Digit accuracy is the number of digits named in their right place over the number there are, or over the
  number named if that is larger, so that inventing digits does not pay.
  """
  expected = sample.conversations[1]['value']
  if sample.task not in LONG_TASKS:
    return float(text == expected)
  truth, found = read_scene(expected), read_scene(text)
  return sum(found.get(place) == digit for place, digit in truth.items()) / max(len(truth), len(found))
