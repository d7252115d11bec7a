"""CDPruner: the record, what it must not be, and the way of a question from words to CLIP's text tower."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tower_records import RECORDS, base, case

import dynllava_jax
from dynllava_jax import checkpoint, methods, presets
from dynllava_jax.config import DENSE, ConfigError, Piece
from dynllava_jax.convert.convert import convert
from dynllava_jax.convert.export import export
from dynllava_jax.convert.source import Request, open_source
from dynllava_jax.data.tokenizer import train_tokenizer
from dynllava_jax.methods import __main__ as program
from dynllava_jax.methods import cdpruner, dpp
from dynllava_jax.methods.base import TowerOutput
from dynllava_jax.models.batch import question_segments
from dynllava_jax.models.clip_text import ClipText, pooled_place

ROWS = ('s0', 's1')


def recorded(name: str) -> list[np.ndarray]:
  return [case('cdpruner')[f'{row}/{name}'] for row in ROWS]


def tower(text: list[np.ndarray], patches: list[np.ndarray]) -> TowerOutput:
  """Both recorded rows as a batch."""
  most = max(map(len, text))
  padded = np.stack([np.concatenate([t, np.full((most - len(t), t.shape[1]), 9.0, np.float32)]) for t in text])
  there = np.arange(most) < np.asarray([[len(t)] for t in text])
  return TowerOutput(jnp.zeros(()), text_embeds=jnp.asarray(padded), has_text=jnp.asarray(there), patch_embeds=np.stack(patches))


@pytest.mark.slow
def test_every_recorded_quantity_agrees():
  """Alone and in a batch: rows are not coupled, as they are in the authors' code."""
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    assert program.verify(str(RECORDS / 'cdpruner'), None)
  assert printed.getvalue().splitlines()[-1] == 'verify: 40 of 40 passed'


def test_text_embeddings_as_recorded():
  """The text tower alone, from token ids; the second question is cut into two segments."""
  cfg = base().info.model
  question = question_segments(recorded('text_ids'), cfg.clip_text.num_positions)
  assert question.shape == (2, 2, 16) and (question[0, 1] == -1).all() and question[1, 1, -1] == 0
  embed = jax.jit(lambda q: ClipText(cfg.clip_text, cfg.vision).apply({'params': base().params['clip_text']}, q, method='text'))
  for ours, theirs in zip(embed(question), recorded('text_embeds')):
    np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=5e-6)


WRONG = {
  None: lambda text, patches: cdpruner.relevance(tower(text, patches)),
  'plus sign': lambda text, patches: cdpruner.relevance(tower([-t for t in text], patches)),
  'one segment': lambda text, patches: cdpruner.relevance(tower([t[:1] for t in text], patches)),
}


@pytest.mark.parametrize('wrong', WRONG)
def test_relevance_and_choice_as_recorded(wrong):
  relevant = np.asarray(WRONG[wrong](recorded('text_embeds'), recorded('image_embeds')))
  same = [np.allclose(a, b, atol=1e-5) for a, b in zip(relevant, recorded('relevance'))]
  assert same == {None: [True, True], 'one segment': [True, False]}.get(wrong, [False, False])
  if wrong is None:
    kernel = cdpruner.kernel(jnp.asarray(recorded('projected')), relevant)
    order, gain = jax.jit(dpp.greedy, static_argnums=1)(kernel, 14)
    assert order.tolist() == [x.tolist() for x in recorded('selection_order')] and (np.diff(gain) <= 1e-6).all()


def test_rows_without_question_and_patches_all_alike_give_numbers():
  text, patches = np.ones((1, 3), np.float32), np.ones((5, 3), np.float32)
  alike = cdpruner.relevance(tower([text, text[:0]], [patches, patches * np.arange(5, dtype=np.float32)[:, None]]))
  assert np.asarray(alike).tolist() == [[1.0] * 5] * 2


@pytest.mark.parametrize('end_id, places', [(7, [2, 0]), (None, [3, 1])])
def test_where_a_segment_is_summed_up(end_id, places):
  assert pooled_place(jnp.asarray([[1, 2, 7, 9, 0], [1, 9, 2, 9, 0]]), end_id).tolist() == places


def test_without_text_tower_it_is_refused():
  with pytest.raises(ConfigError, match="reducer cdpruner: needs CLIP's text tower, which this model has not"):
    methods.check_run(presets.LLAVA_1_5_7B, DENSE, PIECE)


PIECE = Piece('cdpruner', {'tokens': 14})
CLIP_BYTES = [*map(chr, (*range(33, 127), *range(161, 173), *range(174, 256))), *(chr(256 + i) for i in range(68))]


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """The recorded models with a tokenizer for each: a decoder's, and one of CLIP's form, of bytes alone."""
  folder = tmp_path_factory.mktemp('cdpruner')
  clip, source = folder / 'clip', folder / 'source'
  shutil.copytree(RECORDS / 'clip_deep', clip, copy_function=shutil.copyfile)
  shutil.copytree(RECORDS.parent / 'public_b' / 'checkpoint', source, copy_function=shutil.copyfile)
  for path in (clip, source):
    path.chmod(0o755)
  words = [*CLIP_BYTES, *(f'{c}</w>' for c in CLIP_BYTES), '<|startoftext|>', '<|endoftext|>']
  (clip / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (clip / 'merges.txt').write_text('#version: 0.2\n')
  (clip / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'CLIPTokenizer'}))
  weights = load_file(clip / 'model.safetensors')
  table = 'text_model.embeddings.token_embedding.weight'
  weights[table] = np.random.default_rng(0).normal(size=(len(words), 16)).astype(np.float32)
  save_file(weights, clip / 'model.safetensors')
  config = json.loads((clip / 'config.json').read_text())
  config['text_config'] |= {'vocab_size': len(words), 'eos_token_id': 2}
  (clip / 'config.json').write_text(json.dumps(config))
  draw = np.random.default_rng(0)
  text = [' '.join(''.join(draw.choice([*'abcdefgh'], 4)) for _ in range(9)) for _ in range(200)]
  (source / 'tokenizer.model').write_bytes(train_tokenizer(['USER: ASSISTANT: Which digit is it?\n,.:', *text], 512))
  convert(Request(src=source, vision=clip), folder / 'ours')
  return folder


@pytest.mark.slow
def test_the_text_tower_goes_both_ways(converted):
  info = checkpoint.read_info(converted / 'ours')
  assert info.model.clip_text.end_id is None and 'clip_text' in checkpoint.load_params(converted / 'ours')
  assert 'clip_text' not in checkpoint.load_params(converted / 'ours', stages=info.stages)
  export(converted / 'ours', converted / 'back', 'dynamic-llava')
  theirs, ours = (load_file(converted / name / 'clip' / 'model.safetensors') for name in ('.', 'back'))
  assert {k for k in theirs if not k.startswith('logit')} == ours.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in ours)
  assert (converted / 'back' / 'clip' / 'vocab.json').read_bytes() == (converted / 'clip' / 'vocab.json').read_bytes()
  assert open_source(Request(src=converted / 'back')).info == info


@pytest.mark.slow
def test_questions_in_words(converted):
  """From Python: another question keeps other patches, alone as beside others; without CLIP's words the run is refused."""
  model = dynllava_jax.load(converted / 'ours', stages='cdpruner_14', max_new_tokens=2, text_lengths=(256,))
  picture = np.random.default_rng(1).integers(0, 255, (112, 112, 3), np.uint8)
  asked = ['Which digit is it?', 'zzzzz, and then much more than fits in sixteen tokens', 'Hello']
  together = [r.kept_image for r in model.reply([picture, picture, None], asked)]
  alone = [model.reply(image, text).kept_image for image, text in zip([picture, picture, None], asked)]
  assert together == alone and together[0] != together[1] and len(together[0]) == 14 and together[2] == ()
  assert model.reply(picture, f'{asked[0]}\nAnswer the question using a single word or phrase.').kept_image == together[0]
  shutil.copytree(converted / 'ours', converted / 'wordless')
  assets = {n: c for n, c in checkpoint.read_assets(converted / 'ours').items() if 'vocab' not in n}
  info, tokenizer = checkpoint.read_info(converted / 'ours'), checkpoint.read_tokenizer(converted / 'ours')
  checkpoint.write_info(converted / 'wordless', info, tokenizer, assets)
  with pytest.raises(ConfigError, match="reducer cdpruner: the checkpoint has no tokenizer of CLIP's text tower"):
    dynllava_jax.load(converted / 'wordless', stages='cdpruner_14')
