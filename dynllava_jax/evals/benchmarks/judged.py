"""Benchmarks that a language model judges: LLaVA-Bench in the wild and MM-Vet. Answers and submissions only."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynllava_jax.evals.benchmarks.base import LLAVA_EVAL, Lines, Needed
from dynllava_jax.evals.folders import Folder


class LlavaBench(Lines):
  """Sixty open questions over 24 images."""

  name = 'llava_bench'
  metric = 'none offline: GPT-4-0314 judges (eval_gpt_review_bench.py of LLaVA)'
  folders = ('llava-bench-in-the-wild',)
  question_file = 'questions.jsonl'
  images = ('images',)
  expected_questions = 60
  max_new_tokens = 1024
  scored = False
  needed = (
    Needed((question_file,), 'https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild'),
    Needed(('images',), 'https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild', 'images'),
  )
  notes = ('Scores of different judges, and of one judge at different times, are not comparable.',)


class MmVet(Lines):
  """218 open questions; the submission is what its notebook reads."""

  name = 'mmvet'
  metric = 'none offline: GPT-4 grades (mm-vet_evaluator of MM-Vet)'
  folders = ('mm-vet', 'mmvet')
  question_file = 'llava-mm-vet.jsonl'
  images = ('images',)
  expected_questions = 218
  max_new_tokens = 1024
  scored = False
  needed = (
    Needed((question_file,), LLAVA_EVAL),
    Needed(('images',), 'https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip', 'images'),
  )
  notes = ('The grader drifts: the official answers went from 31.1 to 27.8 within a year (LLaVA#1905).',)

  def submission(self, folder: Folder, rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    content = {f'v1_{r["question_id"]}': r['text'] for r in rows}
    return {f'results/{name}.json': json.dumps(content, indent=2).encode()}
