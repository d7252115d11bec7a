"""Where the time of a run goes, and how much of its chips it uses."""

import dataclasses

import numpy as np
import pytest
from test_step import CFG, batch

from dynllava_jax import presets
from dynllava_jax.config import LoraConfig, TrainConfig
from dynllava_jax.training import throughput
from dynllava_jax.training.throughput import Clock, model_flops, peak_flops


def test_the_longest_name_that_fits_is_the_chip():
  assert peak_flops('TPU v5 lite') == 197e12 and peak_flops('TPU v5p') == 459e12 == peak_flops('TPU v5')
  assert peak_flops('NVIDIA H100 PCIe') == 756e12 and peak_flops('NVIDIA H100 80GB HBM3') == 989e12
  assert peak_flops('cpu') is None


def test_flops_are_six_per_weight_and_token_and_less_where_nothing_is_trained():
  cfg = TrainConfig(model=presets.LLAVA_1_5_7B, frozen=('vision',))
  lengths = np.array([1024, 2048])
  whole, without = model_flops(cfg, lengths, 2), model_flops(cfg, lengths, 0)
  assert whole - without == pytest.approx(2 * 0.38e12, rel=0.1)  # a forward pass of the tower, frozen
  weights = 6.6e9
  assert without == pytest.approx(6 * weights * 3072, rel=0.15)
  lora = dataclasses.replace(cfg, lora=LoraConfig(), init_from='base')
  assert model_flops(lora, lengths, 0) == pytest.approx(without * 2 / 3)


def test_times_of_the_parts_add_up(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(throughput.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(throughput, 'peak_flops', lambda kind: 1e9)
  clock, rows = Clock(CFG, hosts=2), batch()
  assert clock.report() == {}
  for _ in range(2):
    with clock.spent_on('data'):
      now[0] += 1
    clock.saw(rows)
    now[0] += 5
  with clock.spent_on('save'):
    now[0] += 2
  values = clock.report()
  assert (values['data_seconds'], values['save_seconds'], values['step_seconds']) == (1, 1, 5)
  assert values['tokens_per_second'] == pytest.approx(2 * 2 * rows.length.sum() / 14)
  assert values['tokens_per_second_per_chip'] == pytest.approx(values['tokens_per_second'] / 8)
  assert values['mfu'] == pytest.approx(4 * model_flops(CFG, rows.length, 7) / 14 / 8 / 1e9)
  assert clock.report() == {}
