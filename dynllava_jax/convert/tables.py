"""Which torch tensor becomes which part of which parameter: a table, not code.

A rule maps every source key that matches `source` (`#` stands for a layer number) to one slot of the target
leaf: `path`, then the slot's index on the leaf's leading axes (layer number and, in fused weights, the
part). `transform` turns the torch tensor into the slot's shape and back. Keys are those of the authors' LLaVA
layout, the tower's those of CLIP; `layouts.py` translates from and to the others.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from dynllava_jax.config import LlamaConfig, MemoryConfig, ModelConfig, PyramidConfig, RoutersConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """Pure re-arrangement of numbers, both ways.

  Attributes:
    torch_shape: slot shape -> shape that the torch tensor must have.
    apply: (torch tensor, slot shape) -> slot.
    invert: slot -> torch tensor.
  """

  torch_shape: Callable[[Shape], Shape]
  apply: Callable[[np.ndarray, Shape], np.ndarray]
  invert: Callable[[np.ndarray], np.ndarray]


BLOCK = 256  # rows transposed at a time
CACHE_LINE = 64  # bytes


def swap_last(x: np.ndarray) -> np.ndarray:
  """[..., A, B] -> contiguous [..., B, A], block by block: 6x faster than numpy's copy of a large `x.T`."""
  bits = x.view(f'u{x.itemsize}')  # numpy holds the interpreter lock while it copies dtypes that it does not know
  rows, columns = x.shape[-2:]
  out = np.empty((*x.shape[:-2], columns, rows), bits.dtype)
  # Rows of a power of two of bytes share a few places of the CPU's L1 cache; one more line in each spreads them.
  spread = np.empty((min(BLOCK, rows), columns + CACHE_LINE // x.itemsize), bits.dtype)[:, :columns]
  for matrix, swapped in zip(bits.reshape(-1, rows, columns), out.reshape(-1, columns, rows)):
    for i in range(0, rows, BLOCK):
      block = spread[: rows - i]
      block[...] = matrix[i : i + BLOCK]
      swapped[:, i : i + BLOCK] = block.T
  return out.view(x.dtype)


def _joined(x: np.ndarray, axes: int) -> np.ndarray:
  """The first `axes` axes as one."""
  return x.reshape(-1, *x.shape[axes:])


COPY = Transform(lambda s: s, lambda x, s: x, lambda y: y)
LINEAR = Transform(lambda s: (s[1], s[0]), lambda x, s: swap_last(x), swap_last)  # [out, in] -> [in, out]
HEADS = Transform(
  lambda s: (s[0] * s[2], s[1]),  # [N*H, D] -> [N, D, H]
  lambda x, s: swap_last(x.reshape(s[0], s[2], s[1])),
  lambda y: _joined(swap_last(y), 2),
)
HEADS_BIAS = Transform(lambda s: (s[0] * s[1],), lambda x, s: x.reshape(s), lambda y: y.reshape(-1))  # [N*H] -> [N, H]
HEADS_OUT = Transform(  # [D, N*H] -> [N, H, D]
  lambda s: (s[2], s[0] * s[1]), lambda x, s: swap_last(x).reshape(s), lambda y: swap_last(_joined(y, 2))
)
ROW = Transform(lambda s: (1, *s), lambda x, s: x.reshape(s), lambda y: y[None])  # [1, D] -> [D]
NUMBER = Transform(lambda s: (1,), lambda x, s: x.reshape(s), lambda y: y.reshape(1))  # [1] -> []
LOW_OUT = Transform(  # [N*H, R] -> [R, N, H]
  lambda s: (s[1] * s[2], s[0]), lambda x, s: swap_last(x).reshape(s), lambda y: swap_last(y.reshape(y.shape[0], -1))
)
FUSED_BIAS = Transform(lambda s: (s[0] * s[1] * s[2],), lambda x, s: x.reshape(s), lambda y: y.reshape(-1))  # [3*N*H] -> [3, N, H]
FUSED_HEADS = Transform(
  lambda s: (s[0] * s[1] * s[3], s[2]),  # [3*N*H, D] -> [3, N, D, H]
  lambda x, s: swap_last(x.reshape(s[0], s[1], s[3], s[2])),
  lambda y: _joined(swap_last(y), 3),
)


def patches(size: int) -> Transform:
  """A patch convolution [D, 3, p, p] as a matrix [p*p*3, D] over flattened patches."""
  return Transform(
    lambda s: (s[1], 3, size, size),
    lambda x, s: np.ascontiguousarray(x.transpose(2, 3, 1, 0)).reshape(s),
    lambda y: np.ascontiguousarray(y.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)),
  )


@dataclasses.dataclass(frozen=True)
class Rule:
  """See the module docstring. `part` is the index on the axis after the layer, for fused leaves.

  `first_layer` is subtracted from the layer number, `layers` bounds it (layers outside do not match). With `only` no other layers
  have such a tensor; their slots stay zeros.
  """

  source: str
  path: tuple[str, ...]
  transform: Transform
  part: int | None = None
  first_layer: int = 0
  layers: int | None = None
  only: tuple[int, ...] = ()

  def match(self, key: str) -> tuple[int, ...] | None:
    """The slot index that `key` fills, or None if the rule is not about it."""
    found = re.fullmatch(re.escape(self.source).replace(r'\#', r'(\d+)'), key)
    if not found:
      return None
    index = tuple(int(g) - self.first_layer for g in found.groups())
    if self.layers is not None and index and not 0 <= index[0] < self.layers:
      return None
    if self.only and index[0] not in self.only:
      return None
    return index if self.part is None else (*index, self.part)

  @property
  def slot_axes(self) -> int:
    """Leading axes of the leaf that number its slots: the layer, the part of a fused weight."""
    return ('#' in self.source) + (self.part is not None)

  def keys(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(source key, slot index) of every slot the rule fills in a leaf of `layers` layers."""
    part = () if self.part is None else (self.part,)
    if '#' not in self.source:
      yield self.source, part
      return
    for i in self.only or range(layers):
      yield self.source.replace('#', str(i + self.first_layer)), (i, *part)


def _dense(source: str, path: tuple[str, ...], **kw) -> list[Rule]:
  return [Rule(f'{source}.weight', (*path, 'kernel'), LINEAR, **kw), Rule(f'{source}.bias', (*path, 'bias'), COPY, **kw)]


def _norm(source: str, path: tuple[str, ...], **kw) -> list[Rule]:
  return [Rule(f'{source}.weight', (*path, 'scale'), COPY, **kw), Rule(f'{source}.bias', (*path, 'bias'), COPY, **kw)]


def _clip_layers(tower: str, target: tuple[str, ...], first: int, count: int) -> list[Rule]:
  prefix = f'{tower}.encoder.layers.#'
  kw = dict(first_layer=first, layers=count)
  rules = []
  for part, name in enumerate(('q_proj', 'k_proj', 'v_proj')):
    rules += [
      Rule(f'{prefix}.self_attn.{name}.weight', (*target, 'qkv'), HEADS, part, **kw),
      Rule(f'{prefix}.self_attn.{name}.bias', (*target, 'qkv_bias'), HEADS_BIAS, part, **kw),
    ]
  rules += [
    Rule(f'{prefix}.self_attn.out_proj.weight', (*target, 'out'), HEADS_OUT, **kw),
    Rule(f'{prefix}.self_attn.out_proj.bias', (*target, 'out_bias'), COPY, **kw),
  ]
  for name in ('layer_norm1', 'layer_norm2'):
    rules += _norm(f'{prefix}.{name}', (*target, name), **kw)
  for name in ('fc1', 'fc2'):
    rules += _dense(f'{prefix}.mlp.{name}', (*target, name), **kw)
  return rules


def vision_rules(cfg: ModelConfig) -> list[Rule]:
  """A CLIP vision model as transformers stores it; layers above `select_layer` go to `vision_tail`."""
  vision = cfg.vision
  rules = [
    Rule('vision_model.embeddings.class_embedding', ('vision', 'class_embedding'), COPY),
    Rule('vision_model.embeddings.patch_embedding.weight', ('vision', 'patch_embedding'), patches(vision.patch_size)),
    Rule('vision_model.embeddings.position_embedding.weight', ('vision', 'position_embedding'), COPY),
  ]
  rules += _norm('vision_model.pre_layrnorm', ('vision', 'pre_layernorm'))  # the misspelling is theirs
  rules += _norm('vision_model.post_layernorm', ('vision_tail', 'post_layernorm'))
  rules += _clip_layers('vision_model', ('vision', 'layers'), 0, vision.layers_run)
  rules += _clip_layers('vision_model', ('vision_tail', 'layers'), vision.layers_run, vision.num_layers - vision.layers_run)
  return rules + (clip_text_rules(cfg.clip_text.num_layers) if cfg.clip_text else [])


def clip_text_rules(layers: int) -> list[Rule]:
  """The text side of a CLIP model as transformers stores it."""
  group = 'clip_text'
  rules = [
    Rule(f'text_model.embeddings.{name}_embedding.weight', (group, f'{name}_embedding'), COPY) for name in ('token', 'position')
  ]
  rules += [Rule(f'{name}_projection.weight', (group, f'{name}_projection'), LINEAR) for name in ('text', 'visual')]
  rules += _norm('text_model.final_layer_norm', (group, 'final_layer_norm'))
  return rules + _clip_layers('text_model', (group, 'layers'), 0, layers)


def llava_rules(cfg: ModelConfig) -> list[Rule]:
  """The authors' LLaVA layout: decoder, projector and, if the model has them, predictors."""
  rules = [
    Rule('model.embed_tokens.weight', ('llama', 'embedding'), COPY),
    Rule('model.norm.weight', ('llama', 'norm', 'scale'), COPY),
  ]
  if not cfg.llama.tie_embeddings:
    rules.append(Rule('lm_head.weight', ('llama', 'head'), LINEAR))
  for run in cfg.llama.runs:
    rules += _decoder_rules(cfg.llama, run)
  if cfg.exit_head:  # names of this project's text form of DeeR, which has none for a text decoder
    rules += [
      Rule('exit.norm.weight', ('exit_head', 'norm', 'scale'), COPY),
      Rule('exit.head.weight', ('exit_head', 'head'), LINEAR),
    ]
  rules += projector_rules(cfg) + (predictor_rules(cfg.predictor.instruct) if cfg.predictor else [])
  rules += memory_rules(cfg.memory) if cfg.memory else []
  rules += router_rules(cfg.routers) if cfg.routers else []
  rules += pruning_rules() if cfg.pruning else []
  return rules + (pyramid_rules(cfg.dpn) if cfg.dpn else [])


def pruning_rules() -> list[Rule]:
  """Interaction weights of Dynamic Context Pruning, by its authors' names inside a LLaMA's attention."""
  source, target = 'model.layers.#.self_attn', ('pruning', 'layers')
  rules = [Rule(f'{source}.{name}_int.weight', (*target, name), LINEAR) for name in 'qk']
  return [*rules, Rule(f'{source}.int_bias', (*target, 'bias'), COPY)]


def pyramid_rules(pyramid: PyramidConfig) -> list[Rule]:
  """Routers of a Dynamic Pyramid Network; the authors pool behind a layer, we in front of the next."""
  rules = []
  for layer in pyramid.layers:
    source, target = f'model.layers.{layer - 1}.pooling_router', ('dpn', f'router_{layer}')
    rules += _norm(f'{source}.mlp1.0', (*target, 'norm'))
    rules += [
      Rule(f'{source}.mlp1.1.weight', (*target, 'down'), LINEAR),
      Rule(f'{source}.predictor.weight', (*target, 'predictor'), LINEAR),
    ]
  return rules


def _decoder_rules(llama: LlamaConfig, run: range) -> list[Rule]:
  """Layers that are alike; experts by MoE-LLaVA's names, which are deepspeed's."""
  layer, bounds = 'model.layers.#', dict(first_layer=run.start, layers=len(run)) if len(llama.runs) > 1 else {}
  target = ('llama', f'layers_{run.start}' if bounds else 'layers')
  rules = [
    Rule(f'{layer}.input_layernorm.weight', (*target, 'attention_norm', 'scale'), COPY, **bounds),
    Rule(f'{layer}.post_attention_layernorm.weight', (*target, 'mlp_norm', 'scale'), COPY, **bounds),
    Rule(f'{layer}.self_attn.o_proj.weight', (*target, 'o'), HEADS_OUT, **bounds),
  ]
  rules += [Rule(f'{layer}.self_attn.{n}_proj.weight', (*target, n), HEADS, **bounds) for n in 'qkv']
  names = ('gate', 'up', 'down')
  if not llama.has_experts(run.start):
    return rules + [Rule(f'{layer}.mlp.{n}_proj.weight', (*target, n), LINEAR, **bounds) for n in names]
  source = f'{layer}.mlp.deepspeed_moe'
  rules.append(Rule(f'{source}.gate.wg.weight', (*target, 'router'), LINEAR, **bounds))
  each = [(f'{source}.experts.deepspeed_experts.{e}', e) for e in range(llama.experts.count)]
  return rules + [Rule(f'{of}.{n}_proj.weight', (*target, 'experts', n), LINEAR, e, **bounds) for of, e in each for n in names]


def router_rules(routers: RoutersConfig) -> list[Rule]:
  """Routers of mixture of depths, by p-MoD's names."""
  source, target = 'model.layers.#.router.router', ('routers', 'layers')
  rules = [Rule(f'{source}.weight', (*target, 'kernel'), ROW, only=routers.layers)]
  return rules + ([Rule(f'{source}.bias', (*target, 'bias'), NUMBER, only=routers.layers)] if routers.bias else [])


def memory_rules(memory: MemoryConfig) -> list[Rule]:
  """Memory tokens of ICAE and their adapter, by the names of the authors' class and of PEFT."""
  rules, target = [Rule('memory_token_embed.weight', ('memory', 'embedding'), COPY)], ('memory_adapter', 'layers')
  for name in memory.targets:
    source = f'model.layers.#.{"self_attn" if name in "qkvo" else "mlp"}.{name}_proj'
    rules.append(Rule(f'{source}.lora_A.weight', (*target, f'{name}_a'), HEADS_OUT if name == 'o' else LINEAR))
    rules.append(Rule(f'{source}.lora_B.weight', (*target, f'{name}_b'), LOW_OUT if name in 'qkv' else LINEAR))
  return rules


def projector_rules(cfg: ModelConfig) -> list[Rule]:
  """What stands between tower and decoder."""
  if cfg.packer:
    return packer_rules()
  rules = []
  for i in range(cfg.projector_depth):
    source = 'model.mm_projector' if cfg.projector == 'linear' else f'model.mm_projector.{2 * i}'
    rules += _dense(source, ('projector', f'linear_{i}'))
  return rules


def packer_rules() -> list[Rule]:
  """TokenPacker; torch's MultiheadAttention holds the projections of query, key and value as one matrix, as ours does."""
  source = 'model.mm_projector'
  rules = [Rule(f'{source}.q_proj_1.weight', ('projector', 'query'), LINEAR)]
  for letter, name in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    rules += _norm(f'{source}.ln_{letter}_1', ('projector', f'{name}_norm'))
    for i in range(2) if letter != 'q' else ():
      rules += _dense(f'{source}.{letter}_proj_1.{2 * i}', ('projector', f'{name}_{i}'))
  for i in range(2):
    rules += _dense(f'{source}.mlp.{2 * i}', ('projector', f'linear_{i}'))
  return [
    *rules,
    Rule(f'{source}.clip_attn.in_proj_weight', ('projector', 'qkv'), FUSED_HEADS),
    Rule(f'{source}.clip_attn.in_proj_bias', ('projector', 'qkv_bias'), FUSED_BIAS),
    Rule(f'{source}.clip_attn.out_proj.weight', ('projector', 'out'), HEADS_OUT),
    Rule(f'{source}.clip_attn.out_proj.bias', ('projector', 'out_bias'), COPY),
  ]


def predictor_rules(instruct: bool = False) -> list[Rule]:
  """The vision and output-text predictors of Dynamic-LLaVA, and the instruction predictor if there is one."""
  image = 'model.image_score_predictor'
  block, target = f'{image}.transformer.#', ('image_predictor', 'blocks')
  rules = _norm(f'{image}.down_mlp.0', ('image_predictor', 'norm')) + _dense(f'{image}.down_mlp.1', ('image_predictor', 'down'))
  rules += [Rule(f'{block}.attn.qkv.weight', (*target, 'qkv'), FUSED_HEADS)]
  rules += _dense(f'{block}.attn.proj', (*target, 'proj'))
  for name in ('norm1', 'norm2'):
    rules += _norm(f'{block}.{name}', (*target, name))
  for name in ('fc1', 'fc2'):
    rules += _dense(f'{block}.mlp.{name}', (*target, name))
  for i in range(3):
    rules += _dense(f'{image}.output_mlp.{2 * i}', ('image_predictor', 'head', f'linear_{i}'))
  texts = {'text_predictor': 'model.output_text_score_predictor.output_mlp'}
  if instruct:
    texts['instruct_predictor'] = 'model.instruct_score_predictor.output_mlp'
  for group, name in texts.items():
    rules += _norm(f'{name}.0', (group, 'norm')) + _dense(f'{name}.1', (group, 'down'))
    for i in range(3):
      rules += _dense(f'{name}.{2 * i + 3}', (group, 'head', f'linear_{i}'))
  return rules
