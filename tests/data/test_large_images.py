"""Pictures whose padded or scaled square is far larger than themselves: the same pixels, within a bound of memory."""

import io
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from dynllava_jax.config import VisionConfig
from dynllava_jax.data import images
from dynllava_jax.data.images import decode, preprocess
from dynllava_jax.data.samples import DataError

SIZES = [(1, 1), (1, 50), (50, 1), (3, 57), (97, 41), (41, 97), (200, 199), (199, 200), (640, 480), (301, 700)]
SIZES += [(20, 56), (2, 900), (900, 2), (350, 701), (351, 701)]


def noise(width, height, kind):
  rng = np.random.default_rng(width * 1000 + height)
  values = rng.integers(0, 2, (height, width, 3)) * 255 if kind == 'extreme' else rng.integers(0, 256, (height, width, 3))
  return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize('aspect', ['pad', 'square'])
@pytest.mark.parametrize('kind', ['extreme', 'even'])
def test_without_the_canvas_it_is_the_same_bit_by_bit(monkeypatch, aspect, kind):
  for size in (14, 56, 336):
    for width, height in SIZES:
      picture, cfg = noise(width, height, kind), VisionConfig(image_size=size)
      whole = preprocess(picture, cfg, aspect)
      with monkeypatch.context() as patch:
        patch.setattr(images, 'CANVAS', 0)
        patch.setattr(images, 'BAND', 5000)
        np.testing.assert_array_equal(preprocess(picture, cfg, aspect), whole, err_msg=f'{width}x{height} to {size}')


MEASURED = """
import resource, sys
import numpy as np
from PIL import Image
from dynllava_jax.config import VisionConfig
from dynllava_jax.data.images import preprocess
width, height, aspect = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
picture = Image.new('RGB', (width, height), (10, 200, 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = preprocess(picture, VisionConfig(), aspect)
assert out.shape == (336, 336, 3) and (aspect == 'pad' or (out == (10, 200, 30)).all())
assert aspect == 'square' or (out == (122, 116, 104)).all(-1).mean() > 0.95
assert aspect == 'square' or min(width, height) == 1 or (out[168, 168] != (122, 116, 104)).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize('aspect', ['pad', 'square'])
@pytest.mark.parametrize('width, height', [(65500, 300), (300, 65500), (1, 200_000), (200_000, 1)])
def test_thin_pictures_take_little_memory(width, height, aspect):
  """The original's square of the first takes 17 GB."""
  command = [sys.executable, '-c', MEASURED, str(width), str(height), aspect]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 700_000, 'kilobytes'


def test_longer_sides_and_bombs_are_refused_before_they_are_decoded():
  header = b'P5\n%d %d\n255\n'
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for width, height, expected in ((300_000, 1, 'sides of at most 262,144'), (1, 300_000, 'sides of'), (90_000, 90_000, 'bomb')):
    with pytest.raises(DataError, match=f'photo: .*{expected}') as caught:
      decode(header % (width, height) + b'x', 'photo')
    assert caught.value.reason == 'undecodable_image'
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_between_warning_and_limit_a_picture_is_read_without_a_word():
  code = """if True:
    import io
    from PIL import Image
    from dynllava_jax.data.images import decode
    Image.MAX_IMAGE_PIXELS, out = 100, io.BytesIO()
    Image.new('RGB', (15, 10), (1, 2, 3)).save(out, 'PNG')
    assert decode(out.getvalue(), 'x').getpixel((14, 9)) == (1, 2, 3)
  """
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize('kind', ['JPEG2000', 'AVIF', 'ICO', 'TGA', 'PCX', 'SGI', 'DDS', 'QOI', 'PPM', 'MPO'])
def test_what_pillow_opens_is_read(kind):
  if kind not in images.FORMATS and kind != 'MPO':
    pytest.skip(f'this Pillow does not read {kind}')
  out = io.BytesIO()
  Image.new('RGB', (16, 16), (200, 100, 50)).save(out, kind, **({'quality': 100} if kind in ('AVIF', 'MPO') else {}))
  pixel = np.asarray(decode(out.getvalue(), 'x'))[8, 8].astype(int)
  assert np.abs(pixel - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(
  'content',
  [
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n',  # would be run by Ghostscript
    b'<html>404</html>' * 40,
    bytes(4096),
    b'\x00\x00\x01\xba' * 300,
    b'RIFF\x00\x10\x00\x00AVI LIST' + bytes(200),
    b'\x00\x00\x00\x18ftypmp42' + bytes(400),
    b'%PDF-1.4\n' * 30,
  ],
  ids=['eps', 'html', 'zeros', 'mpeg', 'avi', 'mp4', 'pdf'],
)
def test_what_is_no_picture_is_refused(content):
  with pytest.raises(DataError, match='photo.jpg: ') as caught:
    decode(content, 'photo.jpg')
  assert caught.value.reason == 'undecodable_image'
