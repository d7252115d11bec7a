"""An engine whose layers prune their context: whoever comes when gets what the generator gives to the prompt alone."""

import dataclasses

import jax
import numpy as np
import pytest
from test_engine import CFG, EOS, NEW, TEXT, Letters, P, arrive, options, rows

from dynllava_jax.config import Piece, PruningConfig, Stage
from dynllava_jax.generate import Generator
from dynllava_jax.serving.engine import Engine

EVEN = (0, 2, 4, 6)  # those that draw nothing by chance


@pytest.mark.slow
@pytest.mark.parametrize('tokens', [0, 9], ids=['room for all', 'too small'])
def test_replies_of_slots_are_those_of_the_generator_alone(tiny_params, tokens):
  model = dataclasses.replace(CFG, predictor=None, pruning=PruningConfig(dim=8))
  rng, layers = np.random.default_rng(0), CFG.llama.num_layers
  maps = {n: rng.normal(0, CFG.llama.hidden_size**-0.5, (layers, CFG.llama.hidden_size, 8)).astype(np.float32) for n in 'qk'}
  params = {name: tiny_params[name] for name in ('vision', 'projector', 'llama')}
  params |= {'pruning': {'layers': maps | {'bias': np.ones((layers, 1), np.float32)}}}
  stages = (Stage(layers=Piece('dynamic_context_pruning', {'tokens': tokens})),)
  generator = Generator(model, stages, params, max_new_tokens=NEW, eos_id=EOS)
  engine = Engine(generator, Letters(), text_length=TEXT, slots=3, steps=4, prefill_rows=1)
  replies, evicted = arrive(engine, EVEN, seed=0), 0
  for number in EVEN:
    prompt = rows(number).prompt
    prompt = dataclasses.replace(prompt, tokens=np.pad(prompt.tokens, [(0, 0), (0, TEXT + P - prompt.tokens.shape[1])]))
    alone, wanted = jax.device_get(generator(prompt, rows(number).pixels)), options(number).max_tokens or NEW
    assert list(replies[number].tokens) == alone.tokens[0, : min(wanted, alone.length[0])].tolist()
    evicted += int(alone.evicted[0])
    if wanted == NEW:
      assert replies[number].evicted == alone.evicted[0]
  assert (evicted > 0) == bool(tokens)
