"""Speed and memory with random weights, dense and sparse in turn.

    python -m dynllava_jax.bench --config=configs/bench.py:mid --out=runs/bench

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


def get_config(name: str = 'mid') -> ConfigDict:
  """`tiny`, `mid`, `7b` or `13b`."""
  if name not in SETTINGS:
    raise ValueError(f'configs/bench.py has no {name!r}; expected one of {", ".join(SETTINGS)}')
  model, settings = SETTINGS[name]
  cut = 2 if model.llama.num_layers > 4 else 1
  stages = lambda **second: dict(stages=[dict(start=0), dict(start=cut, **second)])
  runs = dict(
    dense=dict(stages=[dict(start=0)]),
    dynamic=stages(selector='dynamic', image_keep_rate=0.2, text_keep_budget=0.5),
    fastv=stages(selector='fastv', image_keep_rate=0.5),
  )
  return ConfigDict(dict(model=to_dict(model), runs=runs, engine=True, seed=0, **settings))
