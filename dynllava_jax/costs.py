"""What a run costs, by arithmetic: FLOPs and KV-cache bytes of one sample.

Two conventions of FLOPs, both stated wherever they are printed:
* `decoder_flops`, `sample_flops`: every matrix product of this architecture, 2 FLOPs per multiply-add, true dimensions; of a whole
  sample those too by which methods choose and merge (attention rows, similarities), as each method's `flops` says;
* `paper_flops`: the paper's count, 32 C^2 per token and layer + 4 N^2 C, image tokens only (section 4.1).
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

from dynllava_jax import cache as kv
from dynllava_jax import methods
from dynllava_jax.config import ModelConfig, Piece, Stage, judges_instructions
from dynllava_jax.methods.base import row_flops
from dynllava_jax.methods.exits import QUESTION, decided_per
from dynllava_jax.models.stacks import stacks_of


def layer_flops(model: ModelConfig, tokens: float, keys: float, no_mlp: float = 0, experts: bool = False) -> float:
  """One decoder layer over `tokens` queries.

  Args:
    model: what is run; tokens: queries; keys: number of visible keys, summed over them.
    no_mlp: queries that do not pass the MLP; experts: whether that is a choice among experts.
  """
  llama = model.llama
  attention = llama.head_dim * (2 * llama.num_heads + 2 * llama.num_kv_heads)
  mlp = 3 * llama.mlp_dim * llama.experts.top_k + llama.experts.count if experts else 3 * llama.mlp_dim
  linear = 2 * llama.hidden_size * (attention * tokens + mlp * (tokens - no_mlp))
  return linear + 4 * llama.num_heads * llama.head_dim * keys


def vision_flops(model: ModelConfig, reducer: Piece | None = None) -> float:
  """Vision tower up to the selected layer, and the projector on the tokens that it sees, for one image."""
  v, width = model.vision, model.llama.hidden_size
  needs = methods.tower_needs(model, reducer)
  tokens, blocks = v.num_patches + 1, 0.0
  for merged in needs.merges or (0,) * v.layers_run:  # what is merged passes the attention, not the MLP
    blocks += 8 * tokens * v.hidden_size**2 + 4 * tokens**2 * v.hidden_size
    tokens -= merged
    blocks += 4 * tokens * v.hidden_size * v.mlp_dim
  if needs.next_block:
    blocks += 2 * tokens * v.hidden_size**2
  patches = 2 * v.num_patches * 3 * v.patch_size**2 * v.hidden_size
  all_projected = reducer is None or methods.get(reducer.name, 'reducer').projects_all
  projected = model.num_image_tokens if all_projected else methods.num_image_tokens(model, reducer)
  projector = 2 * projected * (v.hidden_size * width + (model.projector_depth - 1) * width**2)
  if model.packer:  # keys and values of every patch, and each token's query
    of_patches = 2 * (len(model.packer.levels) + 2) * v.hidden_size**2 + 2 * v.hidden_size
    projector += 2 * v.num_patches * of_patches + 2 * projected * 3 * v.hidden_size**2
  return patches + blocks + projector


def reducer_flops(model: ModelConfig, reducer: Piece | None) -> float:
  """What a reducer adds to tower and projector for one image: attention rows of the class token, and its own products."""
  kind, options = methods.bound(reducer, 'reducer')
  if kind is None:
    return 0.0
  rows = len(methods.tower_needs(model, reducer).class_attention)
  return 2 * rows * (model.vision.num_patches + 1) * model.vision.hidden_size + kind.flops(model, options)


def ranking_flops(model: ModelConfig, stage: Stage, rows: int, reached: int, budget: int) -> float:
  """What the selector of a stage costs: the attention that it ranks by, and its own products.

  Args:
    model, stage: what is run; rows: of the stream that reaches the stage, text and image.
    reached: image tokens among them; budget: those that it keeps.
  """
  llama, (kind, options) = model.llama, methods.selector_of(stage)
  asked = rows if kind.query_weight else 1
  total = kind.flops(llama, rows, reached, budget, options)
  if kind.attention:
    total += row_flops(llama, asked, rows)
  if kind.attention == 'entering':  # keys and queries once more, of what has not been cut yet
    total += 2 * llama.hidden_size * llama.head_dim * (rows * llama.num_kv_heads + asked * llama.num_heads)
  return total


def revisit_flops(model: ModelConfig, stage: Stage, candidates: int) -> float:
  """What it costs a generated token to choose among `candidates` image tokens, keys and queries of learned scores included."""
  llama, relevance = model.llama, model.relevance
  if methods.get(stage.revisit.name, 'revisit').keys is None:
    return 2 * llama.hidden_size * (llama.num_heads * llama.head_dim + candidates)
  weights = methods.get(relevance.score, 'revisit').weights(llama.hidden_size, relevance)
  return 2 * sum(a * b for a, b in weights.values()) + 2 * candidates * relevance.width


def predictor_flops(model: ModelConfig, image_tokens: int, text_tokens: float) -> float:
  """Vision predictor over `image_tokens` once, text predictor over `text_tokens`."""
  p, width = model.predictor, model.llama.hidden_size
  head = 2 * (p.d_model**2 / 2 + p.d_model**2 / 8 + p.d_model / 2)
  block = 2 * image_tokens * (4 * p.d_model**2 + 2 * p.d_model * p.mlp_dim) + 4 * image_tokens**2 * p.d_model
  shared = 2 * width * p.d_model + head
  return image_tokens * shared + p.num_layers * block + text_tokens * shared


def sample_flops(
  model: ModelConfig,
  stages: tuple[Stage, ...],
  text_tokens: int,
  kept: Sequence[bool],
  spec: kv.CacheSpec,
  image: bool = True,
  reducer: Piece | None = None,
  depths: Sequence[int] = (),
) -> float:
  """FLOPs to answer one question with a cache: tower, prefill and every generated token.

  Args:
    model, stages: what is run.
    text_tokens: prompt tokens besides the image's.
    kept: for each token fed after the prompt, whether gated stages kept it.
    spec: of the cache, which holds no more than its budget of them.
    image: whether the question has one; without, neither tower nor image tokens are counted.
    reducer: of the run.
    depths: decoder layers that each generated token was drawn behind, the first of them by the prompt; () for all of them.
  """
  depths = depths or [model.llama.num_layers] * (1 + len(kept))
  per = decided_per(stages)
  num_image = methods.num_image_tokens(model, reducer) if image else 0
  unmerged = methods.unmerged_tokens(model, reducer) if image else 0
  total = vision_flops(model, reducer) + reducer_flops(model, reducer) if image else 0.0
  gated, budget_share, reached = False, 1.0, num_image
  ends = [s.start for s in stages[1:]] + [model.llama.num_layers]
  for stage, end, image_tokens in zip(stages, ends, methods.stage_image_tokens(stages, num_image)):
    layers, kinds = end - stage.start, collections.Counter(map(model.llama.has_experts, range(stage.start, end)))
    if per == QUESTION and depths[0] <= stage.start:
      break
    kind, options = methods.bound(stage.layers, 'layers', methods.LayerKind())
    compressor, settings = methods.bound(stage.compressor, 'compressor')
    total += ranking_flops(model, stage, text_tokens + reached, reached, stage.kept_image_tokens(num_image)) if image else 0.0
    if methods.judges(stage):
      gated, budget_share = True, stage.text_keep_budget
    if methods.get(stage.selector).text_margin:
      judged = text_tokens + num_image if image and judges_instructions((stage,)) else 0  # computed of every row that arrives
      total += predictor_flops(model, num_image, len(kept) + judged)
    budget = kv.generated_budget(gated, budget_share, spec)
    prompt, places = text_tokens + image_tokens, text_tokens + image_tokens + unmerged
    for layer in range(stage.start, end):
      keys, rows = kind.saves(model.llama, layer, image_tokens, options)
      waiting = image_tokens - methods.passing_image_tokens(stage, layer, model.llama.num_layers, image_tokens)
      seen = places - waiting
      total += layer_flops(model, prompt - waiting, seen * (seen + 1) / 2 - keys, rows, model.llama.has_experts(layer))
      total += 2 * image_tokens * model.llama.hidden_size if waiting else 0.0  # its router
      total += compressor.flops(model.llama, text_tokens, image_tokens, settings) if compressor else 0.0
      total += kind.voting.flops(model, prompt, prompt * (prompt - 1) / 2, options) if kind.voting else 0.0
    reached = image_tokens
    cached = sum(stage_slots(model, stage, end, text_tokens, image_tokens)) / layers + unmerged
    if stage.revisit and image:
      cached -= image_tokens - methods.seen_image_tokens((stage,), methods.num_image_tokens(model, reducer))
      total += len(kept) * revisit_flops(model, stage, image_tokens)
    held, most = 0, most_held(stage)
    for keep, depth in zip(kept, depths[1:]):
      seen = min(cached + held, most)  # of layers that vote the most that it can be
      if depth > stage.start:
        total += sum(layer_flops(model, 1, seen + 1, experts=of) * number for of, number in kinds.items())
        total += layers * kind.voting.flops(model, 1, seen, options) if kind.voting else 0.0
      else:  # keys and values alone
        total += layers * 4 * model.llama.hidden_size * model.llama.head_dim * model.llama.num_kv_heads
      held = min(held + (1 if keep or not gated else 0), budget)
  head = 2 * model.llama.hidden_size * model.llama.vocab_size
  asked = depths[:1] if per == QUESTION else depths
  return total + head * (1 + len(kept) + sum(exits_asked(stages, ends, depth) for depth in asked if per))


def exits_asked(stages: tuple[Stage, ...], ends: Sequence[int], depth: int) -> int:
  """How often the exit head speaks until a row leaves behind layer `depth`, besides for the token itself."""
  compares = [s.exit is not None and methods.get(s.exit.name, 'exit').compares for s in stages] + [False]
  return sum(end <= depth for stage, end, of_next in zip(stages, ends, compares[1:]) if stage.exit or of_next)


def stage_slots(model: ModelConfig, stage: Stage, end: int, text: int, image: int) -> list[int]:
  """Cache slots that a prompt takes up in each layer of a stage that ends before layer `end`."""
  layers = model.llama.num_layers
  return [methods.prompt_slots(stage, layer, layers, text, image) for layer in range(stage.start, end)]


def number_bytes(model: ModelConfig, plain: int, int8: bool) -> float:
  """Bytes of a number in the cache, `plain` of them unless it is held as int8: then 1, and its share of a head's float32 scale."""
  return 1 + 4 / model.llama.head_dim if int8 else plain


def most_held(stage: Stage) -> float:
  """Tokens that a layer of the stage may hold, whatever comes; infinity if all."""
  kind, options = methods.bound(stage.layers, 'layers', methods.LayerKind())
  return (kind.voting.holds(options) if kind.voting else 0) or math.inf


def cache_bytes(
  model: ModelConfig,
  stages: tuple[Stage, ...],
  text_length: int,
  spec: kv.CacheSpec,
  bytes_per_number: float,
  reducer: Piece | None = None,
) -> list[int]:
  """Allocated bytes of one row's keys and values, per stack of layers (`models.stacks`), for a text bucket of `text_length`."""
  llama, num_image = model.llama, methods.num_image_tokens(model, reducer)
  unmerged = methods.unmerged_tokens(model, reducer)
  image_tokens = methods.stage_image_tokens(stages, num_image)
  sizes, gate, budget_share = [], False, 1.0
  for stack in stacks_of(stages, llama.num_layers):
    stage, text_image = stages[stack.stage], (text_length, image_tokens[stack.stage])
    if methods.judges(stage):
      gate, budget_share = True, stage.text_keep_budget
    budget = kv.generated_budget(gate, budget_share, spec)
    most = max(methods.prompt_slots(stage, layer, llama.num_layers, *text_image) for layer in stack.layers)
    slots, numbers = kv.capacity(most + unmerged, budget, gate, spec), 2 * llama.num_kv_heads * llama.head_dim
    kind, options = methods.bound(stage.layers, 'layers', methods.LayerKind())
    if kind.voting:
      slots, numbers = min(slots, most_held(stage)), numbers + kind.voting.numbers(model, options)
    sizes.append(round(len(stack.layers) * slots * numbers * bytes_per_number))
  return sizes


@dataclasses.dataclass(frozen=True)
class PaperSetting:
  """Layers, width and image tokens per layer: all that the paper's formula looks at."""

  width: int
  tokens_per_layer: tuple[int, ...]


def paper_setting(model: ModelConfig, stages: tuple[Stage, ...], reducer: Piece | None = None) -> PaperSetting:
  """The paper's view of a run."""
  ends = [s.start for s in stages[1:]] + [model.llama.num_layers]
  num_image = methods.num_image_tokens(model, reducer)
  present = methods.stage_image_tokens(stages, num_image)
  passing = lambda stage, layer, image: methods.passing_image_tokens(stage, layer, model.llama.num_layers, image)
  counts = [passing(s, layer, n) for n, s, e in zip(present, stages, ends) for layer in range(s.start, e)]
  return PaperSetting(model.llama.hidden_size, tuple(counts))


def paper_flops(setting: PaperSetting) -> float:
  """Prefill FLOPs over image tokens: sum over layers of 32 N C^2 + 4 N^2 C (paper section 4.1)."""
  c = setting.width
  return float(sum(32 * n * c**2 + 4 * n**2 * c for n in setting.tokens_per_layer))


def decoder_flops(model: ModelConfig, stages: tuple[Stage, ...], reducer: Piece | None = None) -> float:
  """As `paper_flops` with this decoder's true dimensions (LLaMA's mlp is not 4 C wide)."""
  setting = paper_setting(model, stages, reducer)
  return float(sum(layer_flops(model, n, n * n) for n in setting.tokens_per_layer))
