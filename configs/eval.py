"""The benchmarks of LLaVA-1.5 and the long-answer evaluations of Dynamic-LLaVA, on any converted checkpoint.

    python eval.py --config=configs/eval.py:pope --checkpoint=CHECKPOINT --data=DIR --out=results/pope
    python eval.py --config=configs/eval.py:pope,compare --checkpoint=CHECKPOINT --data=DIR --out=results/pope
    python eval.py --config=configs/eval.py:pope,methods --checkpoint=CHECKPOINT --data=DIR --out=results/pope_methods
    python eval.py --config=configs/eval.py:pope --answers=FILE --data=DIR

The first runs the checkpoint with its own stage list, the second compares stage lists, the third published methods that need no
training, the last scores an answer file made elsewhere. docs/evaluation.md says what DIR must hold. Hardware: one accelerator with
24 GiB for a 7B model in bfloat16 (batch_size=16); more of them with `--config.mesh...`.
"""

from ml_collections import ConfigDict

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


def in_decoder(**stage) -> dict:
  """All tokens up to layer SPARSE_LAYER, then what `stage` makes of them."""
  return dict(stages=[dict(start=0), dict(start=SPARSE_LAYER) | stage])


def reduced(name: str, **options) -> dict:
  """A dense decoder on the image tokens that a reducer makes."""
  return dict(stages=[dict(start=0)], reducer=dict(name=name, **options))


def compressed(name: str, starts: tuple[int, ...] = (0,), **options) -> dict:
  """A dense prefill, of which a compressor leaves less in the cache; each of the stages at `starts` has slots of its own number."""
  return dict(stages=[dict(start=start, compressor=dict(name=name, **options)) for start in starts])


def published() -> dict:
  """Dense, and methods that need no training, with 64 of 576 image tokens unless their name says otherwise."""
  pyramid = [dict(start=8 * i, selector='pyramiddrop', image_keep_rate=0.5**i) for i in (1, 2, 3)]  # as published
  return dict(
    dense=dict(stages=[dict(start=0)]),
    fastervlm_64=reduced('fastervlm', tokens=64),
    visionzip_64=reduced('visionzip', dominant=54, contextual=10),
    fastv_64=in_decoder(selector='fastv', image_tokens=30),  # 30 of 576 from layer 2 of 32 on: 64 on average
    pyramiddrop_270=dict(stages=[dict(start=0), *pyramid]),
    snapkv_64=compressed('snapkv', ratio=8 / 9, window=16),
    knorm_64=compressed('knorm', ratio=8 / 9),
    pyramidkv_64=compressed('pyramidkv', starts=(0, 8, 16, 24), ratio=8 / 9, window=16),
    look_m_20=compressed('look_m', hh_ratio=0.1, recent_ratio=0.1),
  )


def get_config(arg: str = 'pope') -> ConfigDict:
  """`BENCHMARK`, `BENCHMARK,compare` or `BENCHMARK,methods`."""
  name, _, mode = arg.partition(',')
  runs = {'': lambda: dict(own=dict(stages=[])), 'compare': comparison, 'methods': published}
  if mode not in runs:
    raise ValueError(f'configs/eval.py:{arg}: expected BENCHMARK, BENCHMARK,compare or BENCHMARK,methods')
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
