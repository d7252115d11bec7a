"""Adapters that were trained here on their way to PyTorch: merged, and as PEFT keeps them."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_fine_tuning import DATA, fine_tuned  # noqa: F401

from dynllava_jax import checkpoint
from dynllava_jax.config import LoraConfig, PredictorConfig, SparsityConfig, Stage
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.readers import ConversionError
from dynllava_jax.convert.source import Request
from dynllava_jax.stored import by_name
from dynllava_jax.training import loop

LORA = LoraConfig(rank=4, alpha=6.0, dropout=0.0, targets=('q', 'v', 'o', 'gate', 'down'), base='float32')


@pytest.fixture(scope='module')
def adapted(fine_tuned):  # noqa: F811
  """A dynamic LoRA run of two steps on the dense model that `dense` holds for PyTorch."""
  folder, cfg = fine_tuned
  model = dataclasses.replace(cfg.model, predictor=PredictorConfig(d_model=16, num_heads=2, num_layers=1, mlp_dim=16))
  stages = (Stage(), Stage(start=1, selector='dynamic', image_keep_rate=0.2))
  optimizer = dataclasses.replace(cfg.optimizer, learning_rate=0.05, warmup_share=0.0)
  sparsity = SparsityConfig(min_answer_len=20)
  cfg = dataclasses.replace(cfg, model=model, stages=stages, lora=LORA, optimizer=optimizer, sparsity=sparsity, steps=3)
  loop.train(cfg, folder / 'lora')
  return folder


def equal(a, b, atol=0.0):
  a, b = by_name(a), by_name(b)
  assert a.keys() == b.keys()
  for name, leaf in a.items():
    np.testing.assert_allclose(leaf, b[name], rtol=0, atol=atol, err_msg=name)


def test_merged_weights_come_back_as_they_are_loaded_here(adapted):
  source = adapted / 'lora' / loop.CHECKPOINTS
  export(source, adapted / 'merged', 'dynamic-llava')
  convert(Request(src=adapted / 'merged'), adapted / 'merged_back')
  equal(checkpoint.load_params(adapted / 'merged_back'), checkpoint.load_params(source), atol=1e-6)


def test_adapter_and_what_was_trained_whole_come_back_on_their_base(adapted):
  source = adapted / 'lora' / loop.CHECKPOINTS
  export(source, adapted / 'peft', 'peft')
  names = {p.name for p in (adapted / 'peft').iterdir()}
  assert {'adapter_config.json', 'adapter_model.safetensors', 'non_lora_trainables.safetensors', 'config.json'} <= names
  held = load_file(adapted / 'peft' / 'adapter_model.safetensors')
  assert len(held) == 2 * len(LORA.targets) * checkpoint.read_info(source).model.llama.num_layers
  assert held['base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'].shape[0] == LORA.rank
  whole = load_file(adapted / 'peft' / 'non_lora_trainables.safetensors')
  assert {k.split('.')[3] for k in whole} == {'mm_projector', 'image_score_predictor', 'output_text_score_predictor'}
  convert(Request(src=adapted / 'peft', base=adapted / 'dense'), adapted / 'peft_back')
  equal(checkpoint.load_params(adapted / 'peft_back'), checkpoint.load_params(source), atol=1e-6)
  info, back = checkpoint.read_info(source), checkpoint.read_info(adapted / 'peft_back')
  assert (back.model, back.stages) == (info.model, info.stages)


def test_peft_loads_the_adapter_and_merges_to_the_same_weights(adapted):
  torch = pytest.importorskip('torch', reason='PEFT needs torch')
  peft = pytest.importorskip('peft', reason='see requirements-torch.txt')
  from transformers import LlamaConfig, LlamaForCausalLM

  for name, layout in (('peft', 'peft'), ('merged', 'dynamic-llava')):
    if not (adapted / name).exists():
      export(adapted / 'lora' / loop.CHECKPOINTS, adapted / name, layout)
  config = json.loads((adapted / 'dense' / 'config.json').read_text())
  model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in ('model_type', 'architectures')}))
  of_decoder = lambda tensors: {k: torch.from_numpy(v) for k, v in tensors.items() if k in model.state_dict()}
  model.load_state_dict(of_decoder(load_file(adapted / 'dense' / 'model.safetensors')))
  loaded = peft.PeftModel.from_pretrained(model, str(adapted / 'peft'))
  adapters = [m for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
  assert len(adapters) == len(LORA.targets) * model.config.num_hidden_layers
  merged, before = loaded.merge_and_unload().state_dict(), of_decoder(load_file(adapted / 'dense' / 'model.safetensors'))
  for key, value in of_decoder(load_file(adapted / 'merged' / 'model.safetensors')).items():
    torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6, msg=key)
    adapted_here = any(f'.{t}_proj.' in key for t in LORA.targets)
    assert adapted_here == bool((value != before[key]).any()), key


def test_a_whole_model_is_no_adapter(adapted, tmp_path):
  with pytest.raises(ConversionError, match='--export=peft: the checkpoint holds a whole model and no adapters'):
    export(adapted / 'start', tmp_path / 'out', 'peft')
