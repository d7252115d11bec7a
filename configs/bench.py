"""Speed and memory with random weights, dense and sparse in turn.

    python -m dynllava_jax.bench --config=configs/bench.py:mid --out=runs/bench
    python -m dynllava_jax.bench --config=configs/bench.py:mid,methods --config.rows='(1,)' --out=runs/bench-methods

    python -m dynllava_jax.bench --config=configs/bench.py:7b,int8 --out=runs/bench-int8

The second times every method that needs no training at the published budgets instead, 192, 128 and 64 of 576 image tokens;
the third dense and dynamic with their weights as int8 beside them.

`mid` is a model that two CPU cores can time, `7b` and `13b` are for accelerators, and `tiny` shows that it runs. Expected:
prefill near the ideal ratio that is printed beside it from batch 2 on; decoding gains with the batch.
"""

from ml_collections import ConfigDict

from dynllava_jax import presets
from dynllava_jax.config import LlamaConfig, ModelConfig, PredictorConfig, VisionConfig, to_dict

MID = ModelConfig(
  vision=VisionConfig(hidden_size=256, mlp_dim=1024, num_layers=5, num_heads=4),
  llama=LlamaConfig(vocab_size=4096, hidden_size=512, mlp_dim=1408, num_layers=16, num_heads=8, num_kv_heads=8),
  predictor=PredictorConfig(d_model=128, num_heads=2, num_layers=2, mlp_dim=256),
)
SETTINGS = {
  'tiny': (presets.TINY, dict(rows=(1, 2), text=16, new=8, uncached_new=2, repeats=2, dtype='float32')),
  'mid': (MID, dict(rows=(1, 2, 4, 16), text=64, new=48, uncached_new=2, repeats=5, dtype='float32')),
  '7b': (presets.DYNAMIC_LLAVA_7B, dict(rows=(1, 8, 32), text=64, new=256, uncached_new=8, repeats=5, dtype='bfloat16')),
  '13b': (presets.DYNAMIC_LLAVA_13B, dict(rows=(1, 8), text=64, new=256, uncached_new=8, repeats=5, dtype='bfloat16')),
}


def training_free(model: ModelConfig) -> dict:
  """Dense, and every registered method that needs no training, with a third, 2/9 and 1/9 of the image tokens."""
  from dynllava_jax.evals import budgets  # brings jax, which starts only after the flags are known to be right

  setting = budgets.Setting(model=model, cut=model.llama.num_layers // 16)  # 2 of 32; a later one would use up all of 1/9
  runs = budgets.rows(setting, [setting.share(tokens) for tokens in (192, 128, 64)])
  return {name: run for name, run in runs.items() if 'image_size' not in run}  # pictures here have the tower's own size


def get_config(arg: str = 'mid') -> ConfigDict:
  """`tiny`, `mid`, `7b` or `13b`, also with `,int8` behind it; with `,methods` all but `tiny`, whose picture has 16 patches."""
  name, _, mode = arg.partition(',')
  if name not in SETTINGS or mode not in ('', 'methods', 'int8') or arg == 'tiny,methods':
    sizes = ', '.join(SETTINGS)
    raise ValueError(f'configs/bench.py has no {arg!r}; expected one of {sizes}, with ,int8, or mid, 7b or 13b with ,methods')
  model, settings = SETTINGS[name]
  cut = 2 if model.llama.num_layers > 4 else 1
  stages = lambda **second: dict(stages=[dict(start=0), dict(start=cut, **second)])
  runs = dict(
    dense=dict(stages=[dict(start=0)]),
    dynamic=stages(selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5),
    fastv=stages(selector='fastv', image_keep_rate=0.5),
  )
  if mode == 'methods':
    runs = training_free(model)
  if mode == 'int8':
    runs.pop('fastv')
    runs |= {f'{name}, int8': run | dict(quantization='int8') for name, run in runs.items()}
  return ConfigDict(dict(model=to_dict(model), runs=runs, engine=not mode, seed=0, **settings))
