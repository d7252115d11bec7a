"""SparseVLM by its definition: clusters, raters and whole rows in plain numpy with grouped heads; what its stages hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_decoder import layer

from dynllava_jax import costs, presets
from dynllava_jax.config import Stage
from dynllava_jax.convert.records.runs import Asked, Runner
from dynllava_jax.methods import Rows, sparsevlm

CFG = presets.TINY.llama
P = presets.TINY.vision.num_patches


@pytest.mark.parametrize(
  'budgets, present, average',
  [((300, 200, 110), (309, 204, 113), 206.5), ((303, 110, 36), None, 145.4), ((66, 30, 17), None, 82.3)],
)
def test_a_stage_holds_its_means_too(budgets, present, average):
  """The published budgets on LLaVA-1.5: what costs count is what is there."""
  stages = (Stage(), *(Stage(start=s, selector='sparsevlm', image_tokens=n) for s, n in zip((3, 7, 16), budgets)))
  counts = costs.paper_setting(presets.LLAVA_1_5_7B, stages).tokens_per_layer
  assert present is None or (counts[2], counts[3], counts[7], counts[16]) == (576, *present)
  assert np.mean(counts) == pytest.approx(average, abs=0.05)


def plain_cluster(x, count):
  """Centres and the cluster of each of x [Q, D], one token after the other."""
  distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) / x.shape[1] ** 0.5
  density = [np.exp(-(np.sort(row)[:count] ** 2).mean()) for row in distance]
  separation = []
  for i, mine in enumerate(density):
    denser = [distance[i, j] for j, other in enumerate(density) if other > mine or (other == mine and j < i)]
    separation.append(min(denser, default=distance.max()))
  centers = np.argsort(-np.array(separation) * density, kind='stable')[:count]
  assign = distance[:, centers].argmin(1)
  assign[centers] = np.arange(count)
  return centers, assign


@pytest.mark.parametrize('count', [2, 3])
def test_clusters(count):
  """The second row has two mutual nearest neighbours everywhere: densities tie, and the lower index is the denser one."""
  rng = np.random.default_rng(count)
  pairs = np.repeat(rng.integers(-3, 4, (6, 4)), 2, 0) + np.tile([0, 1], 6)[:, None]
  x = np.stack([rng.normal(0, 1, (12, 4)), pairs]).astype(np.float32)
  centers, assign = sparsevlm.cluster(jnp.asarray(x), count)
  for row in range(2):
    expected = plain_cluster(x[row], count)
    np.testing.assert_array_equal(centers[row], expected[0])
    np.testing.assert_array_equal(assign[row], expected[1])


def test_raters_stand_behind_the_image():
  """Rows: text on both sides; no image; one token behind the image, which is not above the mean; none."""
  rng = np.random.default_rng(0)
  rows = Rows(jnp.array([9, 6, 5, 4]), jnp.array([2, -1, 1, 1]), jnp.broadcast_to(jnp.arange(3), (4, 3)))
  x = jnp.asarray(rng.normal(0, 3, (4, 12, 4)), jnp.float32)
  weights = np.asarray(sparsevlm.rater_weights(x, rows, None))
  assert weights[0].sum() == pytest.approx(1) and not weights[0, :5].any() and not weights[0, 9:].any()
  assert not weights[1].any() and not weights[3].any()
  assert weights[2, 4] == 1 and weights[2].sum() == 1


def plain_sparsevlm(x, start, cuts, llama):
  """x float64[S, D], image at `start`; cuts: layer -> budget. The stream behind the last layer, and the kept tokens of each cut."""
  image, behind = x[start : start + P], x[start + P :]
  match = np.exp(image @ behind.T)
  scores = (match / match.sum(1, keepdims=True)).mean(0)
  raters, present, sets = np.flatnonzero(scores > scores.mean()), P, []
  for index in range(CFG.num_layers):
    x, weights, _, _ = layer(x, llama, index, CFG, np.arange(len(x)))
    if index in cuts:
      scores = weights[:, start + present + raters, start : start + present].mean((0, 1))
      order = np.argsort(-scores, kind='stable')
      kept, left = np.sort(order[: cuts[index]]), order[cuts[index] :]
      recycled = x[start + left[: int(0.3 * len(left)) + 1]]
      centers, assign = plain_cluster(recycled, len(recycled) // 10 + 1)
      means = [recycled[assign == i].sum(0) / ((assign == i).sum() + 1e-6) for i in range(len(centers))]
      x = np.concatenate([x[:start], x[start + kept], means, x[start + present :]])
      present = len(kept) + len(means)
      sets.append(kept)
  return x, sets


def test_whole_rows_with_grouped_heads(tiny_params):
  """In a batch with a longer row and one without image, which is that of a dense run."""
  rng = np.random.default_rng(4)
  ids = np.array([1, 5, 9, -200, 11, 3, 2, 40, 17, 23, 31, 8])
  images = rng.normal(0, 1, (2, P, CFG.hidden_size)).astype(np.float32)
  text = np.array([1, 7, 4, 30])
  asked = [Asked(text, None), Asked(ids, images[0]), Asked(np.r_[ids[:1], -200, ids[4:], ids[4:]], images[1])]
  cuts = {0: 9, 2: 5}
  stages = (Stage(), *(Stage(start=at + 1, selector='sparsevlm', image_tokens=n) for at, n in cuts.items()))
  answers = Runner(presets.TINY, tiny_params, stages).answer(asked, 1)
  llama, embedding = tiny_params['llama'], np.asarray(tiny_params['llama']['embedding'], np.float64)
  x = embedding[text]
  for index in range(CFG.num_layers):
    x, _, _, _ = layer(x, llama, index, CFG, np.arange(len(x)))
  np.testing.assert_allclose(answers[0].hidden, x, atol=1e-4)
  for prompt, answer in zip(asked[1:], answers[1:]):
    start = int(np.flatnonzero(prompt.ids == -200)[0])
    x = np.concatenate([embedding[prompt.ids[:start]], prompt.image, embedding[prompt.ids[start + 1 :]]])
    x, sets = plain_sparsevlm(x, start, cuts, llama)
    for trace, kept in zip(answer.traces[1:], sets):
      np.testing.assert_array_equal(trace.of_selector['kept'], kept)
    np.testing.assert_allclose(answer.hidden, x, atol=1e-4)
  assert jax.tree.all(jax.tree.map(lambda a: np.isfinite(a).all(), answers[0].traces[-1].of_selector))
