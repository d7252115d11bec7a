"""The server's page as a picture for the docs: a scene is asked about, dynamic and dense side by side.

    python -m dynllava_jax.serve --checkpoint=examples/digits --text_lengths=128 --max_new_tokens=72 --also=dense,dynamic_5 &
    python benchmarks/page.py --out=docs/page.png

Wants Chromium and playwright (requirements-dev.txt).
"""

import io
import shutil

import numpy as np
from absl import app, flags
from PIL import Image
from playwright import sync_api

URL = flags.DEFINE_string('url', 'http://127.0.0.1:8000', 'Where the server is.')
OUT = flags.DEFINE_string('out', 'docs/page.png', 'Picture to write.')
SCENE = flags.DEFINE_integer('scene', 3, 'Which of the test split.')
ASKED = ('How many digits are there?', 'Describe the whole scene.')


def main(_) -> None:
  """Asks, waits, draws."""
  from dynllava_jax.data.digits import Questions

  content = io.BytesIO()
  Image.fromarray(np.asarray(Questions('test', 0, SCENE.value + 1)[SCENE.value].image)).save(content, 'PNG')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
    page = browser.new_page(viewport={'width': 1100, 'height': 900})
    page.set_default_timeout(120_000)
    page.goto(URL.value)
    page.wait_for_function('document.getElementById("shown").textContent.includes("of 49")')
    page.set_input_files('#file', {'name': 'scene.png', 'mimeType': 'image/png', 'buffer': content.getvalue()})
    page.wait_for_selector('#drop[data-ready]')
    for words in ASKED:
      page.fill('#question', words)
      page.press('#question', 'Enter')
      page.wait_for_selector('.turn:last-child[data-done]')
    page.screenshot(path=OUT.value)
    browser.close()
  Image.open(OUT.value).convert('P', palette=Image.Palette.ADAPTIVE).save(OUT.value, optimize=True)


if __name__ == '__main__':
  app.run(main)
