"""Methods that are trained, on the digit scenes: each starts from the dense checkpoint of `make demo`.

    python train.py --config=configs/methods.py:pmod --workdir=runs/digits/pmod
    python eval.py --config=configs/methods.py:pmod_eval --checkpoint=runs/digits/pmod/checkpoints --out=runs/digits/pmod/eval

What each does, how long it takes and what to expect stands at its function. NAME_eval compares it with the same weights run dense.
Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import digits
from dynllava_jax.methods.exits import ALWAYS, NEVER

FROM = 'runs/digits/base/checkpoints'


def trained(steps: int, model: dict, stages: list[dict], learning_rate: float = 3e-4, **fields) -> dict:
  """A run from the dense checkpoint in which the decoder learns, and what the method brings ten times as fast."""
  optimizer = dict(learning_rate=learning_rate, predictor_learning_rate=10 * learning_rate, warmup_share=0.03, b2=0.99)
  return digits.base() | dict(
    model=digits.MODEL | model,
    data=digits.DATA | dict(source='digits_instruct'),
    stages=stages,
    steps=steps,
    init_from=FROM,
    frozen=('vision', 'projector'),
    optimizer=optimizer,
    save_every=100,
    seed=1,
    **fields,
  )


def evaluated(**runs: list[dict]) -> dict:
  """The weights run dense and in other ways, by stage lists."""
  return digits.evaluate() | dict(runs={name: dict(stages=stages) for name, stages in dict(dense=[dict(start=0)], **runs).items()})


def of_depth(method: str, **options) -> list[dict]:
  """The stage list of a method with routers: every second layer, or from the second one on with a falling share."""
  piece = dict(name=method, **options)
  if method == 'videollm_mod':
    return [dict(start=0, layers=piece)]
  return [dict(start=0), *(dict(start=layer, layers=piece) for layer in (1, 2, 3))]


def videollm_mod() -> dict:
  """A fifth of the 49 tokens, 9, pass layers 1 and 3."""
  return trained(500, dict(routers=dict(method='videollm_mod')), of_depth('videollm_mod'))


def pmod() -> dict:
  """Of the 49 tokens 36, 12 and 7 pass layers 1, 2 and 3; each layer is a stage, so that its cache has room for these alone.

  4 minutes on 2 shared cores, 2 more to evaluate. Expected: short answers 65 %, long ones 82 %; the same weights dense 64 and 68 %.
  """
  return trained(500, dict(routers=dict(method='pmod', bias=True)), of_depth('pmod'))


ROUTER = 276  # ' ASSISTANT', which ends the user's turn, in the tokenizer of the digit scenes


def pyramid() -> list[dict]:
  """The 7 x 7 grid in squares of 2 x 2 from the second layer on: 16 tokens."""
  return [dict(start=0), dict(start=1, selector='dpn', image_tokens=16, options=dict(kernel=2, ceil=True))]


def dpn() -> dict:
  """A fixed route: with one kernel a router has nothing to choose, and its weight is 1."""
  return trained(500, dict(dpn=dict(layers=(1,), kernels=((2,),), router_id=ROUTER)), pyramid())


def moe_llava() -> dict:
  """Experts and routers learn, everything else stays; two of four experts in layers 0 and 2.

      python convert_weights.py --src=runs/digits/base/checkpoints --dst=runs/digits/upcycled --upcycle=4

  makes what it starts from, which answers as the dense checkpoint does, whatever the routers say. No gain is to be expected: a
  token passes two MLPs where it passed one, so it costs more, and the digit scenes ask for no more parameters. What changes is the
  load: `expert_load`, the fullest expert's share of first choices.

  To expect of 600 questions: dense 94.6 (short 94.0, long 97.9), upcycled the same, answer by answer, after these 100 steps 95.6
  (95.2, 98.2), which is within what chance gives; the load 37 % after 20 steps and 26 % after 100, where 25 % is even; 167 MFLOPs
  per question where the dense one takes 138. Under a cut that was not trained (`uniform`, 19 of 49 tokens from layer 1 on): 46.7,
  46.7 and 46.2. A few seconds to upcycle, some minutes to train.
  """
  experts = dict(experts=dict(layers=(0, 2), count=4, top_k=2))
  run = trained(100, dict(llama=digits.MODEL['llama'] | experts), [dict(start=0)])
  return run | dict(init_from='runs/digits/upcycled', frozen=(), only=('llama/*/experts', 'llama/*/router'))


def exits(name: str = 'confidence', **options) -> list[dict]:
  """The stage list of a run that may leave behind layers 2 and 3 of 4; DeeR compares with the layer before."""
  return [dict(start=0), *(dict(start=i, exit=dict(name=name, **options)) for i in (1, 2)), dict(start=3)]


def at_depth(layers: int) -> list[dict]:
  """Everybody leaves behind so many layers: what a criterion has to be better than."""
  limit = {i: ALWAYS if i + 1 == layers else NEVER for i in (1, 2)}
  return [dict(start=0), *(dict(start=i, exit=dict(name='confidence', threshold=limit[i])) for i in (1, 2)), dict(start=3)]


def deer() -> dict:
  """An exit head that all depths share, trained with the decoder; it begins as the final norm and output matrix."""
  return trained(200, dict(exit_head=dict()), exits())


def deer_eval() -> dict:
  """DeeR's criterion beside 1 - the favourite's probability, per question at three ratios and per token, and fixed depths.

  First `python -m dynllava_jax.calibrate` with this config and checkpoint: it stores the thresholds.
  """
  runs = {f'depth_{n}': at_depth(n) for n in (2, 3, 4)}
  for name in ('deer', 'confidence'):
    runs |= {f'{name}_{ratio}': exits(name, ratio=ratio) for ratio in (0.5, 1.0, 2.0)}
    runs[f'{name}_token'] = exits(name, ratio=1.0, per='token')
  return evaluated(**runs)


MEMORY = dict(slots=16, rate=4, rank=32, alpha=32.0, targets=('q', 'k', 'v', 'o'))


def icae() -> dict:
  """16 memory tokens stand for the 49 of the image; adapter, memory tokens and decoder learn. About 4 minutes.

  Expected: short answers 75 %, long ones 36 % (16 tokens chosen blindly: 38 and 26; dense before: 96 and 98). With the second
  pass a question alone costs more than dense, 199 and 140 MFLOPs: slots pay where they are used again.
  """
  return trained(300, dict(memory=MEMORY), [dict(start=0)], 5e-4, reducer=dict(name='icae'))


def icae_frozen() -> dict:
  """The same as published: the decoder that reads the slots stays as it is."""
  return icae() | dict(only=('memory', 'memory_adapter'))


def icae_eval() -> dict:
  """Slots, and as many image tokens chosen blindly."""
  blind = dict(stages=[dict(start=0, selector='uniform', image_tokens=16)])
  return evaluated() | dict(runs=dict(icae=dict(stages=[dict(start=0)], reducer=dict(name='icae')), uniform=blind))


PRUNING = 'dynamic_context_pruning'


def dynamic_context_pruning() -> dict:
  """Every layer votes; the logged `held/LAYER` are shares of earlier tokens that queries still find. About 2 minutes.

  Expected: short answers 95 %, long ones 98 % (the same weights run dense: 95 and 98), held 70, 63, 74 and 26 % in layers 0 to 3.
  `python -m dynllava_jax.held --checkpoint=...` draws what is held: layers 1 and 3 drop all patches without digits at once.
  """
  cfg = trained(110, dict(pruning=dict(dim=16, bias=4.0)), [dict(start=0, layers=dict(name=PRUNING))])
  cfg['optimizer'] |= dict(predictor_learning_rate=2e-3)
  return cfg | dict(pruning=dict(gamma=0.3, alpha_end=4.0))


CONFIGS = dict(
  dynamic_context_pruning=dynamic_context_pruning,
  dynamic_context_pruning_eval=lambda: evaluated(**{PRUNING: [dict(start=0, layers=dict(name=PRUNING))]}),
  dpn=dpn,
  dpn_eval=lambda: evaluated(dpn=pyramid()),
  moe_llava=moe_llava,
  moe_llava_eval=lambda: evaluated(uniform=[dict(start=0), dict(start=1, selector='uniform', image_tokens=19)]),
  icae=icae,
  icae_frozen=icae_frozen,
  icae_eval=icae_eval,
  deer=deer,
  deer_eval=deer_eval,
  videollm_mod=videollm_mod,
  videollm_mod_eval=lambda: evaluated(videollm_mod=of_depth('videollm_mod')),
  pmod=pmod,
  pmod_eval=lambda: evaluated(pmod=of_depth('pmod')),
)


def get_config(name: str = 'pmod') -> ConfigDict:
  """One of `CONFIGS`."""
  if name not in CONFIGS:
    raise ValueError(f'configs/methods.py has no {name!r}; expected one of {", ".join(CONFIGS)}')
  return ConfigDict(CONFIGS[name]())
