"""Digit scenes: a small LLaVA trained from nothing, then made dynamic.

    python train.py --config=configs/digits.py:base --workdir=runs/digits/base
    python train.py --config=configs/digits.py:dynamic --workdir=runs/digits/dynamic
    python eval.py --config=configs/digits.py:eval --checkpoint=runs/digits/dynamic/checkpoints

`make demo` runs all three. `make methods` runs methods that need no training on the same checkpoint, `configs/digits.py:methods`.
Hardware: 2 CPU cores, 5 to 19 minutes. Expected: dense 96 %, dynamic 95 to 97 %, uniform and random 27 to 30 %.
"""

import functools

from ml_collections import ConfigDict

from dynllava_jax.config import ModelConfig, from_config_dict

SPARSE_LAYER = 1
IMAGE_KEEP_RATE = 0.2
REVISITED = 3  # image tokens that a generated token sees, of 49
TEXT_KEEP_RATE = 0.5
METHODS_QUESTIONS = 200  # per run of `methods`, of which there are several dozen
LONGEST_ANSWER = 71  # tokens of a whole scene, the end of sentence included

MODEL = dict(
  vision=dict(image_size=98, patch_size=14, hidden_size=96, mlp_dim=384, num_layers=3, num_heads=4),
  projector='mlp2x_gelu',
  llama=dict(vocab_size=430, hidden_size=128, mlp_dim=256, num_layers=4, num_heads=4, num_kv_heads=4),
)
PREDICTOR = dict(d_model=64, num_heads=4, num_layers=2, mlp_dim=128)
HARDWARE = dict(mesh=dict(data=-1, fsdp=1, tensor=1), dtype='float32')
# What a run saves, keeps and gives up; a config lists what flags may change.
WATCHING = dict(
  log_every=10,
  save_minutes=0.0,
  keep=3,
  keep_every=0,
  keep_best=0,
  keep_best_by='',
  on_bad_step='stop',
  spike=0.0,
  grace_seconds=120.0,
)
DATA = dict(source='digits', conversation='plain_turns', text_length=90, shuffle=False)


def stages(selector: str) -> list[dict]:
  """Dense up to SPARSE_LAYER, then what `selector` keeps."""
  return [dict(start=0), dict(start=SPARSE_LAYER, selector=selector, image_keep_rate=IMAGE_KEEP_RATE)]


def base() -> dict:
  return dict(
    model=MODEL,
    data=DATA,
    stages=[dict(start=0)],
    steps=1800,
    batch_size=16,
    optimizer=dict(learning_rate=1e-3, warmup_share=0.05, b2=0.99),
    save_every=400,
    seed=0,
    init_from='',
    frozen=(),
    remat='none',
    **HARDWARE,
    **WATCHING | dict(log_every=20),
  )


def dynamic() -> dict:
  return dict(
    model=MODEL | dict(predictor=PREDICTOR),
    data=DATA | dict(source='digits_instruct'),
    stages=stages('dynamic'),
    steps=500,
    batch_size=16,
    init_from='runs/digits/base/checkpoints',
    frozen=('vision', 'projector'),
    optimizer=dict(learning_rate=3e-4, predictor_learning_rate=3e-3, warmup_share=0.03, b2=0.99),
    sparsity=dict(
      image_keep_rate=IMAGE_KEEP_RATE,
      text_keep_rate=TEXT_KEEP_RATE,
      mask_loss_weight=100.0,
      min_answer_len=50,
      tau_start=1.0,
      tau_end=0.1,
      dense_share=0.3,
    ),
    save_every=100,
    evals=dict(
      digits=dict(every=100, questions=96, batch_size=48, text_lengths=(32,), max_new_tokens=LONGEST_ANSWER, seed=1),
    ),
    seed=1,
    remat='none',
    **HARDWARE,
    **WATCHING,
  )


def conversation() -> dict:
  """Conversations of up to 20 turns, in which facts are told that the picture does not show (`data/talks.py`). Dense, from `base`.

  Trained at the full length, as rotary positions beyond it fail. About 10 minutes on 2 CPU cores, by its first 600 steps.
  """
  return base() | dict(
    data=DATA | dict(source='digits_talks', text_length=320),
    steps=1500,
    batch_size=8,
    optimizer=dict(learning_rate=1e-3, warmup_share=0.05, b2=0.99),
    save_every=250,
    init_from='runs/digits/base/checkpoints',
    frozen=('vision', 'projector'),
    seed=2,
  )


def dynamic_lora() -> dict:
  base = dynamic()
  lora = dict(rank=8, alpha=16.0, dropout=0.0, targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'), base='float32')
  return base | dict(lora=lora, optimizer=base['optimizer'] | dict(learning_rate=3e-3))


def revisit(score: str = 'dot', objective: str = 'distil', steps: int = 100) -> dict:
  """Scores by which each generated token chooses REVISITED of all image tokens; everything else stays as `dynamic` left it."""
  base = dynamic()
  evals = dict(
    digits=dict(every=steps // 2, questions=96, batch_size=48, text_lengths=(32,), max_new_tokens=LONGEST_ANSWER, seed=1)
  )
  return base | dict(
    model=base['model'] | dict(relevance=dict(score=score, width=64, num_heads=2)),
    stages=[dict(start=0), dict(start=SPARSE_LAYER, revisit=dict(name=score, tokens=REVISITED))],
    relevance=dict(objective=objective, weight=100.0),
    steps=steps,
    init_from='runs/digits/dynamic/checkpoints',
    frozen=('vision', 'projector', 'llama', 'image_predictor', 'text_predictor'),
    save_every=steps // 2,
    evals=evals,
  )


def revisit_gumbel() -> dict:
  return revisit(objective='gumbel') | dict(init_from='runs/digits/revisit/checkpoints')


def revisit_decoder() -> dict:
  """The decoder too, on what the scores choose; a third of the rows see everything, so that the same weights still run dense."""
  base = revisit(objective='decoder')
  sparsity = base['sparsity'] | dict(dense_share=0.3)
  frozen = ('vision', 'projector', 'relevance', 'image_predictor', 'text_predictor')
  return base | dict(sparsity=sparsity, frozen=frozen, init_from='runs/digits/revisit/checkpoints')


def revisit_eval() -> dict:
  """Beside dense and fixed choices of as many, by the checkpoint of `revisit`; `attention` needs no training."""
  chosen = lambda name, start=SPARSE_LAYER: [dict(start=0), dict(start=start, revisit=dict(name=name, tokens=REVISITED))]
  runs = dict(dense=dict(stages=[dict(start=0)]), dot=dict(stages=chosen('dot')), attention=dict(stages=chosen('attention', 2)))
  for name in ('dynamic', 'random'):
    runs[f'{name}_{REVISITED}'] = dict(stages=[dict(start=0), dict(start=SPARSE_LAYER, selector=name, image_tokens=REVISITED)])
  return evaluate() | dict(runs=runs)


def gates_eval() -> dict:
  """Gates of generated text on the checkpoint of `dynamic`, a fifth of the image: half of the text, none of it guarded or the first
  and the last 4 tokens. A guard of 4 and 8 reads the scene alone, which says nothing about gates."""
  runs = {}
  for guard in (0, 4):
    for name in ('predictor', 'novelty', 'frequency', 'surprisal', 'entropy', 'random'):
      gate = dict(name=name, share=TEXT_KEEP_RATE, gain=0.25, sinks=guard, window=guard)
      runs[f'{name}_{guard}'] = dict(stages=[dict(start=0), stages('dynamic')[1] | dict(gate=gate)])
  for window in (4, 8):
    gate = dict(name='recency', sinks=4, window=window)
    runs[f'recency_{window}'] = dict(stages=[dict(start=0), stages('dynamic')[1] | dict(gate=gate)])
  return evaluate() | dict(runs=evaluate()['runs'] | runs)


def int8_eval() -> dict:
  """Dense and dynamic, with weights, caches and both as int8."""
  runs = {name: run for name, run in evaluate()['runs'].items() if name in ('dense', 'dynamic')}
  forms = ('int8', 'int8_cache', 'int8_all')
  return evaluate() | dict(runs=runs | {f'{n}, {f}': r | dict(quantization=f) for n, r in runs.items() for f in forms})


def evaluate() -> dict:
  runs = dict(dense=dict(stages=[dict(start=0)])) | {n: dict(stages=stages(n)) for n in ('dynamic', 'uniform', 'random')}
  runs['dynamic']['stages'][1]['text_keep_budget'] = TEXT_KEEP_RATE
  return dict(text_lengths=(32,), runs=runs, questions=600, batch_size=100, max_new_tokens=LONGEST_ANSWER, seed=0, **HARDWARE)


def methods() -> dict:
  """All registered methods that need no training with 20 and 40 % of the 49 image tokens, beside what was trained.

  The decoder has 4 layers: with everything in the first one, as Dynamic-LLaVA has it, an average of 20 % over all layers would
  leave nothing for the others. So a budget counts from SPARSE_LAYER on; the table prints the true average. PyramidDrop and
  SparseVLM cut in front of layers 1, 2 and 3; VScan cuts once, in the middle, as it does of 32. DyMU merges in the 2 blocks of the
  tower that are run, at most half each time, so it cannot get below 13. A picture or a pool has a whole number of tokens along
  each side. PruMerge looks at the block above the features, which LLaVA never runs and a model
  trained from nothing therefore does not have.
  """
  from dynllava_jax.evals import budgets  # brings jax, which the other programs start only after their flags are known to be right

  setting = budgets.Setting(model=from_config_dict(ModelConfig, ConfigDict(MODEL)), cut=SPARSE_LAYER, average=False)
  kept = [int(setting.patches * share) for share in (IMAGE_KEEP_RATE, 2 * IMAGE_KEEP_RATE)]
  runs = budgets.rows(setting, kept, without=('prumerge', 'prumerge_plus'))
  for count in kept:
    cut = dict(start=SPARSE_LAYER, selector='dynamic', image_tokens=count, text_keep_budget=TEXT_KEEP_RATE)
    runs[f'dynamic_{count}'] = dict(stages=[dict(start=0), cut], method='dynamic', budget=count)
  return evaluate() | dict(runs=runs, questions=METHODS_QUESTIONS)


def get_config(name: str = 'base') -> ConfigDict:
  """`base`, `dynamic`, `conversation`, `dynamic_lora`, `revisit`, `revisit_mlp`, `eval`, `methods` and so on."""
  configs = dict(base=base, dynamic=dynamic, conversation=conversation, dynamic_lora=dynamic_lora, eval=evaluate, methods=methods)
  configs |= dict(revisit=revisit, revisit_gumbel=revisit_gumbel, revisit_decoder=revisit_decoder, revisit_eval=revisit_eval)
  configs |= dict(gates_eval=gates_eval, int8_eval=int8_eval)
  configs |= {f'revisit_{score}': functools.partial(revisit, score) for score in ('mlp', 'transformer')}
  if name not in configs:
    raise ValueError(f'configs/digits.py has no {name!r}; expected one of {", ".join(configs)}')
  return ConfigDict(configs[name]())
