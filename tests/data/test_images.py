"""Pixels are the recorded ones, bit by bit; what does not fit into 8-bit RGB is refused by name."""

import hashlib
import io
import json
import struct

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from dynllava_jax.config import CLIP_MEAN, CLIP_STD, VisionConfig
from dynllava_jax.data.images import decode, preprocess
from dynllava_jax.data.samples import DataError

FILES = np.load(GOLDEN / 'text' / 'images.npz')
META = json.loads((GOLDEN / 'text' / 'images_meta.json').read_text())['images']
ASPECTS = {'pad': 'pad', 'none': 'square'}  # the recording's names
# transformers 4.37 takes an array of height 3 for channels-first.
AXES_MIXED_UP = ('tiny_png', 'none')


def floats(pixels):
  """float32[3, R, R] by CLIPImageProcessor's arithmetic: times 1/255 in double, then float32."""
  scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
  return np.ascontiguousarray(((scaled - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1))


def file(name):
  return FILES[f'{name}/file'].tobytes()


@pytest.mark.parametrize('name', META)
def test_pixels_are_the_recorded_ones(name):
  image = decode(file(name), name)
  assert hashlib.sha256(image.tobytes()).hexdigest() == META[name]['rgb_sha256']
  compared = 0
  for kind, aspect in ASPECTS.items():
    for size in (56, 112):
      key = f'{name}/{kind}{size}'
      if key in FILES and (name, kind) != AXES_MIXED_UP:
        np.testing.assert_array_equal(floats(preprocess(image, VisionConfig(image_size=size), aspect)), FILES[key])
        compared += 1
  assert compared


@pytest.mark.parametrize('kind', ASPECTS)
@pytest.mark.parametrize('name', META)
def test_digest_at_336_is_the_recorded_one(name, kind):
  if (name, kind) == AXES_MIXED_UP:
    pytest.skip('recorded with mixed up axes')
  pixels = floats(preprocess(decode(file(name), name), VisionConfig(), ASPECTS[kind]))
  digest = hashlib.sha256(pixels.astype('<f4').tobytes()).hexdigest()
  assert digest == META[name][f'{kind}336']['sha256_le_float32']


def test_arrays_and_pillow_images_give_the_same():
  image = decode(file('portrait_png'), 'x')
  cfg = VisionConfig(image_size=56)
  np.testing.assert_array_equal(preprocess(image, cfg), preprocess(np.asarray(image), cfg))


def test_rotation_is_off_unless_asked_for():
  name = 'exif6_jpeg'
  assert META[name]['exif_orientation'] == 6
  plain, turned = decode(file(name), name), decode(file(name), name, rotate=True)
  assert plain.size == (120, 80) and turned.size == (80, 120)
  np.testing.assert_array_equal(np.rot90(np.asarray(plain), -1), np.asarray(turned))


def encoded(image, kind='PNG', **options):
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


@pytest.mark.parametrize('height', [1, 3])
@pytest.mark.parametrize('aspect', ['pad', 'square'])
def test_flat_images_keep_their_colours(height, aspect):
  picture = Image.new('RGB', (9, height), (200, 100, 50))
  out = preprocess(decode(encoded(picture), 'x'), VisionConfig(image_size=126), aspect)
  np.testing.assert_allclose(out[62, 62], (200, 100, 50), atol=0 if aspect == 'square' else 3)  # pad: a thin line, resampled


@pytest.mark.parametrize(
  'mode, colour, expected',
  [
    ('L', 90, (90, 90, 90)),
    ('1', 1, (255, 255, 255)),
    ('RGBA', (10, 20, 30, 0), (10, 20, 30)),  # transparent: the colour under it
    ('LA', (90, 0), (90, 90, 90)),
  ],
)
def test_modes_become_rgb(mode, colour, expected):
  out = decode(encoded(Image.new(mode, (8, 8), colour)), 'x')
  assert out.mode == 'RGB' and out.getpixel((4, 4)) == expected


def test_palette_with_transparency_shows_its_colours():
  palette = Image.new('P', (8, 8), 1)
  palette.putpalette([0, 0, 0, 9, 8, 7])
  assert decode(encoded(palette, transparency=1), 'x').getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize('bits', [np.uint16, np.float32])
def test_more_than_8_bits_are_refused_by_name(bits):
  picture = Image.fromarray(np.full((8, 8), 3000, bits))
  with pytest.raises(DataError, match='photo.tif: .* of mode (I;16|F), expected 8 bits') as caught:
    decode(encoded(picture, 'TIFF'), 'photo.tif')
  assert caught.value.reason == 'undecodable_image'


def tiff_of_a_rational_offset():
  """A fraction where Pillow's reader expects an integer."""
  content = encoded(Image.new('RGB', (8, 8)), 'TIFF')
  at = content.index(struct.pack('<H', 273))  # tag: where the pixels begin
  return content[:at] + struct.pack('<HHII', 273, 5, 1, len(content)) + content[at + 12 :] + struct.pack('<II', 4, 1)


@pytest.mark.parametrize(
  'content',
  [b'', b'GIF89a', b'<svg></svg>', file('large_jpeg')[:-2000], file('gray_png')[:200], tiff_of_a_rational_offset()],
  ids=['empty', 'header', 'svg', 'jpeg', 'png', 'tiff'],
)
def test_broken_files_are_refused_by_name(content):
  with pytest.raises(DataError, match='photo.jpg: ') as caught:
    decode(content, 'photo.jpg')
  assert caught.value.reason == 'undecodable_image'


def test_padding_has_the_mean_colour():
  cfg = VisionConfig(image_size=56)
  out = preprocess(np.full((20, 40, 3), 255, np.uint8), cfg)
  np.testing.assert_array_equal(out[0, 28], [int(255 * m) for m in cfg.image_mean])
  np.testing.assert_array_equal(out[28, 28], [255, 255, 255])
