"""Every registered method at a budget: its row fits the model, has the tokens it was set for, and stands in the docs."""

import dataclasses
import runpy

import numpy as np
import pytest
from conftest import ROOT

from dynllava_jax import costs, methods, presets
from dynllava_jax.config import ClipTextConfig, ConfigError, EvalConfig, ModelConfig, from_config_dict
from dynllava_jax.evals import budgets, published
from dynllava_jax.evals.benchmarks import suite

# Recycled tokens come on top of SparseVLM's published lists; a pool and a smaller picture have a whole number along each side.
OFF = {'sparsevlm': 0.35, 'pool': 0.3, 'smaller_image': 0.06}


def layer_average(model: ModelConfig, run) -> float:
  if run.image_size:
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=run.image_size))
  methods.check_run(model, run.stages, run.reducer)
  return float(np.mean(costs.paper_setting(model, run.stages, run.reducer).tokens_per_layer))


def config(file: str, arg: str) -> EvalConfig:
  return from_config_dict(EvalConfig, runpy.run_path(str(ROOT / 'configs' / file))['get_config'](arg))


WITH_TEXT = dataclasses.replace(presets.LLAVA_1_5_7B, clip_text=ClipTextConfig())


@pytest.mark.parametrize(
  'arg, model', [('methods', presets.LLAVA_1_5_7B), ('methods,13b', presets.LLAVA_1_5_13B), ('methods,7b+text', WITH_TEXT)]
)
def test_every_training_free_method_has_rows_with_the_budget_as_layer_average(arg, model):
  cfg = config('eval.py', f'pope,{arg}')
  trained = {name for name, why in budgets.NO_BUDGET.items() if 'trained' in why}
  without = {'all', *trained, *(() if model.clip_text else budgets.BY_QUESTION)}
  assert {r.method for r in cfg.runs.values()} == {*budgets.registered(), 'dense', 'smaller_image'} - without
  for name, run in cfg.runs.items():
    kept = layer_average(model, run)
    if any(s.compressor for s in run.stages):
      image = [methods.prompt_slots(s, s.start, model.llama.num_layers, 0, 576) for s in run.stages]
      assert kept == 576, name
      if run.method not in ('look_m', 'pyramidkv'):
        assert image == [run.budget], name
    else:
      assert kept == pytest.approx(run.budget, rel=OFF.get(run.method, 0.005)), name


def test_published_settings_are_met():
  rows = budgets.rows(budgets.Setting(model=presets.LLAVA_1_5_7B), (192, 128, 64))
  counts = lambda name: [s['image_tokens'] for s in rows[name]['stages'][1:]]
  assert [counts(f'fastv_{b}') for b in (192, 128, 64)] == [[166], [98], [30]]
  assert [rows[f'visionzip_{b}']['reducer']['contextual'] for b in (192, 128, 64)] == [30, 20, 10]
  if 'sparsevlm' in budgets.registered():
    assert [counts(f'sparsevlm_{b}') for b in (192, 128, 64)] == [[300, 200, 110], [303, 110, 36], [66, 30, 17]]
  if 'vscan' in budgets.registered():
    assert rows['vscan_64']['reducer']['tokens'] == 96 and counts('vscan_64') == [32]
    assert rows['vscan_64']['reducer']['window'] == 6 and rows['vscan_64']['reducer']['shallow'] == 5


def test_the_digits_model_runs_every_row_of_its_table():
  cfg = config('digits.py', 'methods')
  model = from_config_dict(ModelConfig, runpy.run_path(str(ROOT / 'configs' / 'digits.py'))['MODEL'] | dict(predictor={}))
  for name, run in cfg.runs.items():
    assert layer_average(model, run) <= 49, name
  assert [cfg.runs[f'dynamic_{n}'].stages[1].image_tokens for n in (9, 19)] == [9, 19]
  assert cfg.runs['fastv_9'].stages[1].image_tokens == 9


def test_a_budget_that_the_first_layers_use_up_is_refused():
  with pytest.raises(ConfigError, match='9 image tokens on average over 32 layers: the first 2 take more than that'):
    budgets.rows(budgets.Setting(model=presets.LLAVA_1_5_7B), (9,))


def test_recipes_are_of_methods_and_published_figures_of_benchmarks():
  missing = set(budgets.registered()) - budgets.RECIPES.keys() - budgets.NO_BUDGET.keys()
  assert not missing, f'evals/budgets.py: how are {sorted(missing)} run at a budget?'
  for (lineage, _), of_methods in published.TABLE.items():
    names = published.BENCHMARKS[lineage]
    assert all(len(figures) == len(names) for figures in of_methods.values())
    assert all(suite.get(name) for name in names)
  assert published.figures('gqa', 'divprune', 64) == [published.Figure('A', 57.8), published.Figure('B', 57.5)]
  assert published.figures('gqa', 'divprune', 65) == published.figures('digits', 'divprune', 64) == []


def test_every_method_has_its_paragraph_with_what_the_registry_says():
  text = (ROOT / 'docs' / 'methods.md').read_text()
  sections = {s.split('`')[0]: s for s in text.split('### `')[1:]}
  for site, pieces in methods.METHODS.items():
    for name, piece in pieces.items():
      assert name in sections, f'docs/methods.md: {site} {name} has no paragraph'
      body = ' '.join(sections[name].split())
      for fact in (piece.source, piece.verified, *(f.name for f in dataclasses.fields(piece.options))):
        assert fact in body, f'docs/methods.md: {name}: expected {fact!r}, as in the registry'
