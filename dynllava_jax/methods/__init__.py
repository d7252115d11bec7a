"""Methods by name, one file each; the tables say at which site a piece acts, `base.py` what a piece is."""

from typing import Any

from dynllava_jax.config import DENSE, ConfigError, ModelConfig, Piece, Stage, check_stages, judges_instructions
from dynllava_jax.methods import (
  base,
  cdpruner,
  confidence,
  deer,
  divprune,
  dpn,
  dpp,
  dymu,
  dynamic,
  dynamic_context_pruning,
  everything,
  expected_attention,
  fastervlm,
  fastv,
  frequency,
  icae,
  keydiff,
  knorm,
  lagkv,
  look_m,
  novelty,
  observed_attention,
  pmod,
  pool,
  prumerge,
  pyramiddrop,
  pyramidkv,
  random,
  recency,
  redundancylens,
  revisit,
  snapkv,
  sparsevlm,
  streaming_llm,
  surprisal,
  tova,
  uniform,
  videollm_mod,
  visionzip,
  vispruner,
  vscan,
)
from dynllava_jax.methods.base import (
  Chosen,
  Compressed,
  Compressor,
  Depth,
  LayerKind,
  Observed,
  Origin,
  Reduced,
  Reducer,
  Rotation,
  Rows,
  Selector,
  SelectorInputs,
  TowerNeeds,
  TowerOutput,
)
from dynllava_jax.methods.exits import Exit, check_exits, decided_per
from dynllava_jax.methods.gate import Gate, check_gate
from dynllava_jax.methods.routing import Routing, check_routing
from dynllava_jax.methods.voting import check_voting

REDUCERS: dict[str, Reducer] = {
  'cdpruner': cdpruner.REDUCER,
  'divprune': divprune.REDUCER,
  'dpp': dpp.REDUCER,
  'dymu': dymu.REDUCER,
  'fastervlm': fastervlm.REDUCER,
  'icae': icae.REDUCER,
  'pool': pool.REDUCER,
  'prumerge': prumerge.REDUCER,
  'prumerge_plus': prumerge.PLUS,
  'visionzip': visionzip.REDUCER,
  'vispruner': vispruner.REDUCER,
  'vscan': vscan.REDUCER,
}
SELECTORS: dict[str, Selector] = {
  'all': everything.SELECTOR,
  'dpn': dpn.SELECTOR,
  'dpn_routed': dpn.ROUTED,
  'dynamic': dynamic.SELECTOR,
  'fastv': fastv.SELECTOR,
  'pyramiddrop': pyramiddrop.SELECTOR,
  'random': random.SELECTOR,
  'sparsevlm': sparsevlm.SELECTOR,
  'uniform': uniform.SELECTOR,
}
LAYER_KINDS: dict[str, LayerKind] = {
  'pmod': pmod.LAYERS,
  'dynamic_context_pruning': dynamic_context_pruning.LAYERS,
  'redundancylens': redundancylens.LAYERS,
  'videollm_mod': videollm_mod.LAYERS,
}
COMPRESSORS: dict[str, Compressor] = {
  'expected_attention': expected_attention.COMPRESSOR,
  'keydiff': keydiff.COMPRESSOR,
  'knorm': knorm.COMPRESSOR,
  'lagkv': lagkv.COMPRESSOR,
  'look_m': look_m.COMPRESSOR,
  'observed_attention': observed_attention.COMPRESSOR,
  'pyramidkv': pyramidkv.COMPRESSOR,
  'snapkv': snapkv.COMPRESSOR,
  'streaming_llm': streaming_llm.COMPRESSOR,
  'tova': tova.COMPRESSOR,
}
REVISITS = revisit.REVISITS
EXITS: dict[str, Exit] = {
  'confidence': confidence.EXIT,
  'deer': deer.EXIT,
}
GATES: dict[str, Gate] = {
  'entropy': surprisal.ENTROPY,
  'frequency': frequency.GATE,
  'novelty': novelty.GATE,
  'predictor': dynamic.GATE,
  'random': random.GATE,
  'recency': recency.GATE,
  'surprisal': surprisal.SURPRISAL,
}
METHODS = {  # by site
  'reducer': REDUCERS,
  'selector': SELECTORS,
  'layers': LAYER_KINDS,
  'compressor': COMPRESSORS,
  'revisit': REVISITS,
  'gate': GATES,
  'exit': EXITS,
}


def get(name: str, site: str = 'selector') -> Any:
  """The piece called `name` at a site of `METHODS`; ConfigError with the known names otherwise."""
  known = METHODS[site]
  if name not in known:
    raise ConfigError(f'{site} {name!r} is unknown; expected one of {", ".join(sorted(known)) or "none, there is none yet"}')
  return known[name]


def options_of(piece: Piece, site: str) -> Any:
  """The settings of a piece, as its method's dataclass; ConfigError for one that is unknown or impossible."""
  return get(piece.name, site).read_options(piece, site)


def bound(piece: Piece | None, site: str, default: Any = None) -> tuple[Any, Any]:
  """The piece type that `piece` names and its settings; `default` and None for no piece."""
  return (get(piece.name, site), options_of(piece, site)) if piece is not None else (default, None)


def selector_of(stage: Stage) -> tuple[Selector, Any]:
  """The selector of a stage and its settings."""
  return bound(Piece(stage.selector, stage.options), 'selector')


def num_image_tokens(model: ModelConfig, reducer: Piece | None = None) -> int:
  """Image tokens that the language model of a run sees; ConfigError if the reducer cannot run on the model."""
  if reducer is None:
    return model.num_image_tokens
  if model.packer is not None:
    raise ConfigError(
      f'reducer {reducer.name}: gives the projector single patches, and this model has {model.projector}, which needs all of them'
    )
  return _tokens_left(model, reducer)


def _tokens_left(model: ModelConfig, reducer: Piece) -> int:
  kind, options = bound(reducer, 'reducer')
  try:
    return kind.num_tokens(model, options)
  except ConfigError as e:
    raise ConfigError(f'reducer {reducer.name}: {e}') from None


def stage_image_tokens(stages: tuple[Stage, ...], num_image: int) -> tuple[int, ...]:
  """Image tokens in each stage of a row that begins with `num_image` (0 without image), with those that selectors add."""
  counts, reached = [], num_image
  for stage in stages:
    selector, options = selector_of(stage)
    budget = min(stage.kept_image_tokens(num_image), reached)
    reached = budget + (selector.num_more(reached, budget, options) if num_image else 0)
    counts.append(reached)
  return tuple(counts)


def seen_image_tokens(stages: tuple[Stage, ...], num_image: int) -> int:
  """Image tokens that a generated token sees in the last stage of a run that begins with `num_image`."""
  last = stages[-1]
  return bound(last.revisit, 'revisit')[1].count(num_image) if last.revisit else stage_image_tokens(stages, num_image)[-1]


def prompt_slots(stage: Stage, layer: int, layers: int, text: int, image: int) -> int:
  """Cache slots that a prompt of `text` and `image` tokens in a stage takes up in one of its layers, of `layers` in the decoder."""
  compressor, options = bound(stage.compressor, 'compressor')
  if compressor is None:
    return text + passing_image_tokens(stage, layer, layers, image)
  return compressor.slots(text, image, layer, layers, options)


def routing_of(stage: Stage) -> tuple[Routing | None, Any]:
  """The routers of a stage's layers and their settings; None without."""
  kind, options = bound(stage.layers, 'layers')
  return (None, None) if kind is None else (kind.routing, options)


def passing_image_tokens(stage: Stage, layer: int, layers: int, image: int) -> int:
  """Of `image` tokens that reach a stage, how many pass one of its layers; the decoder has `layers`."""
  routing, options = routing_of(stage)
  return image if routing is None else routing.passing(layer, layers, image, options)


def unmerged_tokens(model: ModelConfig, reducer: Piece | None) -> int:
  """Places of a full image that a reducer's tokens leave over and the decoder attends over all the same; 0 unless it unmerges."""
  kind, options = bound(reducer, 'reducer')
  return model.vision.num_patches - _tokens_left(model, reducer) if kind is not None and kind.unmerges(options) else 0


def tower_needs(model: ModelConfig, reducer: Piece | None) -> TowerNeeds:
  """What the tower has to give to the run's reducer or to the projector; ConfigError if it has no such block."""
  vision = model.vision
  if reducer is None:
    return TowerNeeds(states=tuple(level - 1 for level in model.packer.levels) if model.packer else ())
  needs = get(reducer.name, 'reducer').needs(vision, options_of(reducer, 'reducer'))
  for block in (*needs.class_attention, *needs.key_mean, *needs.states):
    if not 0 <= block < vision.layers_run:
      raise ConfigError(
        f'reducer {reducer.name}: looks at block {block} of the vision tower, of which {vision.layers_run} blocks are run '
        f'(select_layer {vision.select_layer})'
      )
  return needs


def needs_tail(model: ModelConfig, reducer: Piece | None) -> bool:
  """Whether a reducer looks at what is stored beside the tower that LLaVA runs: blocks and a norm above it, the text tower."""
  needs = tower_needs(model, reducer)
  return needs.next_block or needs.question


def check_tail(model: ModelConfig, reducer: Piece | None, there: bool) -> None:
  """Raises ConfigError if a reducer looks at what lies above the blocks of the tower that are run, and that is not there."""
  if not there and needs_tail(model, reducer):
    looks = "at CLIP's text tower and at" if tower_needs(model, reducer).question else 'at'
    raise ConfigError(
      f'reducer {reducer.name}: looks {looks} the block of the vision tower above the features, and the parameters have no '
      '`vision_tail`; it is in checkpoints that were converted from a whole CLIP tower'
    )


def check_run(model: ModelConfig, stages: tuple[Stage, ...], reducer: Piece | None = None) -> None:
  """Raises ConfigError, one line with the reason, unless this model can be run so."""
  check_stages(stages, model, num_image_tokens(model, reducer))
  tower_needs(model, reducer)
  if unmerged_tokens(model, reducer) and stages != DENSE:
    raise ConfigError(f'reducer {reducer.name}: unmerging needs a dense decoder; leave the cuts out, or set unmerge to False')
  ends = [s.start for s in stages[1:]] + [model.llama.num_layers]
  for stage, end in zip(stages, ends):
    at = f'stage at layer {stage.start}'
    selector, _ = selector_of(stage)
    if judges_instructions((stage,)) and not model.predictor.instruct:
      raise ConfigError(f'{at}: {stage.selector} is to judge instructions, and this model has no instruction predictor')
    if selector.attention == 'previous' and stage.start == 0:
      raise ConfigError(f'{at}: {stage.selector} ranks by the attention of the layer before, and there is none')
    kind, options = bound(stage.layers, 'layers', LayerKind())
    for name, marks in kind.flags(model.llama.num_layers, options).items():
      outside = [i for i, mark in enumerate(marks) if mark and not stage.start <= i < end]
      if outside:
        raise ConfigError(f'{at}: {stage.layers.name} names {name} layers {outside}, the stage has {stage.start} to {end - 1}')
    bound(stage.compressor, 'compressor')
    if kind.mlp is not None and any(map(model.llama.has_experts, range(stage.start, end))):
      raise ConfigError(f'{at}: {stage.layers.name} goes by the channels of an MLP, and this model has experts in its place')
  judging = [s for s in stages if judges(s)]
  check_gate(model, judging, {s.start: bound(s.gate, 'gate')[0] for s in stages if s.gate})
  for i, reached in enumerate(stage_image_tokens(stages, num_image_tokens(model, reducer))):
    ranks_next = i + 1 < len(stages) and selector_of(stages[i + 1])[0].attention == 'previous'
    if model.llama.experts and routing_of(stages[i])[0] is not None:
      raise ConfigError(f'stage at layer {stages[i].start}: {stages[i].layers.name} does not go together with layers of experts')
    check_routing(model, stages[i], *routing_of(stages[i]), range(stages[i].start, ends[i]), reached, ranks_next)
  check_exits(model, stages, [bound(s.exit, 'exit') for s in stages])
  num_image, unmerges = num_image_tokens(model, reducer), unmerged_tokens(model, reducer) > 0
  votes = [bound(s.layers, 'layers', LayerKind())[0].voting is not None for s in stages]
  check_voting(model, stages, votes, [selector_of(s)[0].attention for s in stages], judging, unmerges)
  for stage, reached in zip(stages, stage_image_tokens(stages, num_image)):
    if stage.revisit is not None:
      revisit.check_revisit(model, stage, *bound(stage.revisit, 'revisit'), reached, num_image, unmerges)


def judges(stage: Stage) -> bool:
  """Whether generated tokens are judged at the entry of a stage: by its gate, or as its selector does."""
  return stage.gate is not None or get(stage.selector).text_margin is not None


def trained_by(stages: tuple[Stage, ...]) -> str:
  """How a run of these stages is trained: by 'choices', by 'exits', else as its cuts or layers have it, '' if there is none."""
  if any(s.revisit for s in stages):
    return 'choices'
  if decided_per(stages):
    return 'exits'
  return next((how for s in stages if (how := get(s.selector).training or _layers_training(s))), '')


def _layers_training(stage: Stage) -> str:
  return bound(stage.layers, 'layers', LayerKind())[0].training


def check_training(stages: tuple[Stage, ...], adapters: bool) -> None:
  """Raises ConfigError unless these stages can be trained: dense, one cut that is trained by masks, or cuts and layers that gather.

  `adapters`: whether the run trains adapters beside the decoder.
  """
  cuts = [s for s in stages if s.selector != 'all']
  chooses = [s for s in stages if s.revisit]
  if chooses and (cuts or len(chooses) > 1 or dict(chooses[0].revisit.options).get('each_layer')):
    raise ConfigError(
      f'stage at layer {chooses[-1].start}: revisit is trained with all image tokens as candidates, in one stage and with one '
      'choice for its layers; leave selectors and each_layer out'
    )
  if decided_per(stages) and cuts:
    raise ConfigError(f'stage at layer {cuts[0].start}: exits are trained on whole sequences; leave {cuts[0].selector} out')
  ways = [get(s.selector).training for s in cuts] + [how for s in stages if (how := _layers_training(s))]
  if not all(ways) or len(set(ways)) > 1 or ways.count('masks') > 1:
    raise ConfigError(
      f'stages: only a dense run, one with a single dynamic stage or with {trained_with("gathers")} alone can be trained, got '
      f'{[s.selector for s in stages]}'
    )
  for stage in stages:
    for piece in (stage.compressor, None if _layers_training(stage) else stage.layers, stage.gate):
      if piece is not None:
        raise ConfigError(
          f'stage at layer {stage.start}: {piece.name} acts in generation only, training knows nothing of it; leave it out'
        )
  if adapters and any(get(s.selector).attention for s in cuts):
    raise ConfigError(f'lora: {cuts[0].selector} ranks by weights that adapters change; train the whole decoder, or leave it out')


def trained_with(how: str) -> str:
  """Names of the selectors that are trained so."""
  return ', '.join(sorted(name for name, piece in SELECTORS.items() if piece.training == how))


def text_room(stages: tuple[Stage, ...], num_image: int, layers: int) -> int:
  """Places of the image that a training row without image may fill with text: all, or as few as some of the `layers` leaves."""
  if trained_by(stages) != 'gathers':
    return num_image
  stage_of = {layer: i for i, stage in enumerate(stages) for layer in range(stage.start, layers)}
  reached = stage_image_tokens(stages, num_image)
  return min(passing_image_tokens(stages[i], layer, layers, reached[i]) for layer, i in stage_of.items())


__all__ = [
  'COMPRESSORS',
  'EXITS',
  'GATES',
  'LAYER_KINDS',
  'METHODS',
  'REDUCERS',
  'REVISITS',
  'SELECTORS',
  'Chosen',
  'Compressed',
  'Compressor',
  'Depth',
  'LayerKind',
  'Observed',
  'Origin',
  'Reduced',
  'Reducer',
  'Rotation',
  'Rows',
  'Selector',
  'SelectorInputs',
  'TowerNeeds',
  'TowerOutput',
  'base',
  'bound',
  'check_run',
  'check_tail',
  'check_training',
  'get',
  'judges',
  'needs_tail',
  'num_image_tokens',
  'options_of',
  'prompt_slots',
  'seen_image_tokens',
  'selector_of',
  'stage_image_tokens',
  'text_room',
  'tower_needs',
  'trained_by',
  'unmerged_tokens',
]
