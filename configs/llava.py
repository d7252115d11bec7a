"""LLaVA-1.5 in its two stages, and Dynamic-LLaVA on top: 7B, data as LLaVA's README lays it out (docs/data.md).

    python train.py --config=configs/llava.py:pretrain --workdir=runs/llava-pretrain --config.init_from=checkpoints/vicuna-clip
    python train.py --config=configs/llava.py:finetune --workdir=runs/llava-7b --config.init_from=runs/llava-pretrain/checkpoints
    python train.py --config=configs/llava.py:dynamic --workdir=runs/dynamic-7b --config.init_from=runs/llava-7b/checkpoints

pretrain: 558,128 captions, projector only, batch 256, learning rate 1e-3 (LLaVA's scripts/v1_5/pretrain.sh).
finetune: 665,298 conversations, projector and language model, batch 128, 2e-5 (scripts/v1_5/finetune.sh).
dynamic: the 624,610 of them with an image, language model 5e-6 and predictors 2e-4, batch 64 (the authors' training script).
Of 13B: `finetune_13b`, `dynamic_13b` and so on.
dynamic_tokenpacker: `dynamic` on a LLaVA with TokenPacker (arXiv 2407.02392), 57 of 144 image tokens, from a converted checkpoint.
finetune_lora, dynamic_lora: the same with adapters of the decoder in place of its weights (docs/training.md).

One epoch each; `steps` counts its whole batches. Hardware: meant for v5p-128 (64 chips of 16 hosts; --multihost on each host) with
--config.mesh.data=4, so that weights are split 16 ways: the TPU compiler gathers over all 64 chips by sums of zeros, which costs a
sixth of the step and twice the traffic. Elsewhere all devices share the weights, which takes the least memory. Not run on any
accelerator yet, so there is no expected score here.
"""

from ml_collections import ConfigDict

from dynllava_jax import presets
from dynllava_jax.config import to_dict

COMMON = dict(
  mesh=dict(data=1, fsdp=-1, tensor=1, slices=1),
  dtype='bfloat16',
  remat='block',
  accumulate=1,
  log_every=10,
  save_every=500,
  save_minutes=0.0,
  keep=3,
  keep_every=0,
  keep_best=0,
  keep_best_by='',
  on_bad_step='stop',
  spike=0.0,
  grace_seconds=120.0,
  seed=0,
  init_from='',
)
# 1472 text tokens and the 576 of the image are LLaVA's 2048, at which it cuts.
DATA = dict(
  source='prepared',
  images='',
  tokenizer='',
  text_length=1472,
  truncate=True,
  on_bad_sample='error',
  images_only=False,
  image_aspect='pad',
  rotate_images=False,
  shuffle=True,
  workers=8,
)


def pretrain() -> dict:
  return COMMON | dict(
    model=to_dict(presets.LLAVA_1_5_7B),
    data=DATA | dict(path='prepared/llava_pretrain/1.0.0', conversation='plain', buckets=(32, 64, 128), group_lengths=False),
    stages=[dict(start=0)],
    steps=558_128 // 256,
    batch_size=256,
    frozen=('vision', 'llama'),
    optimizer=dict(learning_rate=1e-3, warmup_share=0.03),
  )


def finetune() -> dict:
  return COMMON | dict(
    model=to_dict(presets.LLAVA_1_5_7B),
    data=DATA | dict(path='prepared/llava/1.0.0', conversation='vicuna_v1', buckets=(128, 256, 512, 1024), group_lengths=True),
    stages=[dict(start=0)],
    steps=665_298 // 128,
    batch_size=128,
    frozen=('vision',),
    optimizer=dict(learning_rate=2e-5, warmup_share=0.03),
  )


def dynamic() -> dict:
  keep = dict(image_keep_rate=0.2, text_keep_rate=0.5)
  base = finetune()
  return base | dict(
    model=to_dict(presets.DYNAMIC_LLAVA_7B),
    data=base['data'] | dict(images_only=True),
    stages=[dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=keep['image_keep_rate'])],
    steps=624_610 // 64,
    batch_size=64,
    frozen=('vision', 'projector'),
    optimizer=dict(learning_rate=5e-6, predictor_learning_rate=2e-4, warmup_share=0.03),
    sparsity=keep | dict(mask_loss_weight=100.0, min_answer_len=50, tau_start=1.0, tau_end=0.1),
  )


LORA = dict(rank=128, alpha=256.0, dropout=0.05, targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'), base='bfloat16')


def finetune_lora() -> dict:
  base = finetune()
  return base | dict(lora=LORA, optimizer=base['optimizer'] | dict(learning_rate=2e-4))  # scripts/v1_5/finetune_lora.sh


def dynamic_lora() -> dict:
  base = dynamic()
  return base | dict(lora=LORA, optimizer=base['optimizer'] | dict(learning_rate=5e-5))  # ours: ten times that of all weights


def dynamic_tokenpacker() -> dict:
  base, rate = dynamic(), 0.4
  stages = [dict(start=0), dict(start=2, selector='dynamic', image_keep_rate=rate)]
  sparsity = base['sparsity'] | dict(image_keep_rate=rate)
  return base | dict(model=to_dict(presets.DYNAMIC_TOKENPACKER_7B), stages=stages, sparsity=sparsity)


def get_config(name: str = 'finetune') -> ConfigDict:
  """`pretrain`, `finetune`, `dynamic`, `finetune_lora`, `dynamic_lora` or `dynamic_tokenpacker`; with `_13b` behind it, 13B."""
  made = (pretrain, finetune, dynamic, finetune_lora, dynamic_lora, dynamic_tokenpacker)
  configs = {make.__name__: make for make in made}
  size = '_13b' if name.endswith('_13b') else ''
  if name.removesuffix(size) not in configs:
    raise ValueError(f'configs/llava.py has no {name!r}; expected one of {", ".join(configs)}, and _13b behind it for 13B')
  config = configs[name.removesuffix(size)]()
  if size:
    config['model']['llama'] = to_dict(presets.LLAVA_1_5_13B.llama)
  return ConfigDict(config)
