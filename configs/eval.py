"""The benchmarks of LLaVA-1.5 and the long-answer evaluations of Dynamic-LLaVA, on any converted checkpoint.

    python eval.py --config=configs/eval.py:pope --checkpoint=CHECKPOINT --data=DIR --out=results/pope
    python eval.py --config=configs/eval.py:pope,compare --checkpoint=CHECKPOINT --data=DIR --out=results/pope
    python eval.py --config=configs/eval.py:pope,methods --checkpoint=CHECKPOINT --data=DIR --out=results/pope_methods
    python eval.py --config=configs/eval.py:pope --answers=FILE --data=DIR

The first runs the checkpoint with its own stage list, the second compares stage lists, the third all methods that need no training
(of 13B: `pope,methods,13b`; with `7b+text` CDPruner too), the last scores an answer file made elsewhere. docs/evaluation.md says
what DIR must hold. Hardware: one accelerator with 24 GiB for a 7B model in bfloat16 (batch_size=16); more with `--config.mesh...`.
"""

import dataclasses

from ml_collections import ConfigDict

from dynllava_jax import presets
from dynllava_jax.config import ClipTextConfig
from dynllava_jax.evals.benchmarks import suite

SPARSE_LAYER = 2


def cut(selector: str, keep: float, text: float = 1.0) -> dict:
  """All tokens up to layer SPARSE_LAYER, then the share `keep` of the image tokens."""
  return dict(
    stages=[dict(start=0), dict(start=SPARSE_LAYER, selector=selector, image_keep_rate=keep, text_keep_budget=text)],
  )


def comparison() -> dict:
  """Dense, dynamic at three budgets, and baselines near the 20 % budget: by position, at random, a smaller image."""
  return dict(
    dense=dict(stages=[dict(start=0)]),
    dynamic_40=cut('dynamic', 0.4),
    dynamic_20=cut('dynamic', 0.2),
    dynamic_10=cut('dynamic', 0.1),
    uniform_20=cut('uniform', 0.2),
    random_20=cut('random', 0.2),
    image_168=dict(stages=[dict(start=0)], image_size=168),
  )


def training_free(model: str) -> dict:
  """Dense, and all registered methods that need no training, with 192, 128 and 64 of 576 image tokens, averaged over layers.

  CDPruner is among them for `7b+text` and `13b+text`: it needs a checkpoint that was converted with CLIP's text tower.
  """
  from dynllava_jax.evals import budgets  # brings jax, which scoring of answer files does without

  sizes = {'7b': presets.LLAVA_1_5_7B, '13b': presets.LLAVA_1_5_13B}
  size, _, text = model.partition('+')
  if size not in sizes or text not in ('', 'text') or model.endswith('+'):
    raise ValueError(f'configs/eval.py: methods are set for {" or ".join(sizes)}, with +text or without, got {model!r}')
  of_run = dataclasses.replace(sizes[size], clip_text=ClipTextConfig() if text else None)
  return budgets.rows(budgets.Setting(model=of_run, cut=SPARSE_LAYER), (192, 128, 64))


def get_config(arg: str = 'pope') -> ConfigDict:
  """`BENCHMARK`, `BENCHMARK,compare`, `BENCHMARK,methods` or `BENCHMARK,methods,13b`."""
  name, mode, model = (*arg.split(','), '', '')[:3]
  runs = {'': lambda: dict(own=dict(stages=[])), 'compare': comparison, 'methods': lambda: training_free(model or '7b')}
  if mode not in runs or (model and mode != 'methods') or arg.count(',') > 2:
    raise ValueError(f'configs/eval.py:{arg}: expected BENCHMARK, or with ,compare or ,methods or ,methods,13b behind it')
  benchmark = suite.get(name)
  return ConfigDict(
    dict(
      benchmark=benchmark.name,
      labels='',
      allow_outside=False,
      runs=runs[mode](),
      text_lengths=(128, 256, 512, 768),
      questions=0,
      batch_size=16,
      max_new_tokens=benchmark.max_new_tokens,  # 128 or 1024, as in LLaVA's scripts
      dtype='bfloat16',
      mesh=dict(data=-1, fsdp=1, tensor=1),
      seed=0,
      agreement=False,
    )
  )
