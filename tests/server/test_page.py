"""The page, in a browser without a screen: a picture is chosen, a question asked, and what was kept is drawn."""

import os
import shutil

import paced
import pytest
from paced import KEPT, png

sync = pytest.importorskip('playwright.sync_api', reason='requirements-dev.txt is not installed')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
  path = shutil.which('chromium') or shutil.which('google-chrome')
  with sync.sync_playwright() as playwright:
    if path is None and not os.path.exists(playwright.chromium.executable_path):
      pytest.skip('no Chromium; apt-get install chromium, or playwright install chromium')
    made = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
    yield made
    made.close()


@pytest.fixture
def page(browser):
  with paced.serving(also=['dense', 'dynamic_3']) as served:
    opened = browser.new_page()
    opened.problems, opened.asked = [], []
    opened.on('pageerror', lambda e: opened.problems.append(str(e)))
    opened.on('request', lambda r: opened.asked.append(r.url))
    opened.goto(served.url)
    opened.served = served
    yield opened
    opened.close()


def ask(page, words):
  page.fill('#question', words)
  page.press('#question', 'Enter')
  page.wait_for_selector('.turn:last-child[data-done]', timeout=20_000)
  return page.locator('.turn').last


def test_a_conversation_about_a_picture(page):
  page.wait_for_function('document.getElementById("shown").textContent.includes("of 49")')
  page.set_input_files('#file', {'name': 'scene.png', 'mimeType': 'image/png', 'buffer': png()})
  page.wait_for_selector('#drop[data-ready]')
  turn = ask(page, 'How many <b>digits</b> are there?')
  assert turn.locator('.asked').inner_text() == 'How many <b>digits</b> are there?'  # words, not markup
  assert turn.locator('.side').count() == 2 and turn.locator('canvas').count() == 2  # beside dense
  assert turn.locator('.error').count() == 0 and 'ms' in turn.locator('.way').nth(1).inner_text()
  assert turn.locator('.side').first.locator('.dropped').count() == 4
  bright = turn.locator('canvas').first.evaluate(
    """(canvas, side) => { const size = canvas.width / side, pen = canvas.getContext('2d'); let out = [];
      for (let i = 0; i < side * side; i++) {
        const at = pen.getImageData((i % side + .5) * size, (Math.floor(i / side) + .5) * size, 1, 1).data;
        if (at[0] > 60) out.push(i);
      } return out; }""",
    7,
  )
  assert bright == KEPT
  # The budget takes effect on the next question, and the conversation goes on.
  page.evaluate('document.getElementById("budget").value = 0; document.getElementById("budget").dispatchEvent(new Event("input"))')
  assert '(digits:dynamic_3)' in page.locator('#shown').inner_text()
  page.uncheck('#beside')
  turn = ask(page, 'And the largest?')
  assert turn.locator('.side').count() == 1 and turn.locator('.way').first.inner_text() == 'digits:dynamic_3'
  # A stream that ends early is an .error of its turn; Chromium calls streams aborted that were read to their end.
  assert page.locator('.error').count() == 0 and page.problems == []
  assert page.asked and all(url.startswith((page.served.url, 'data:', 'blob:')) for url in page.asked)


def test_refusals_are_shown(page):
  page.wait_for_function('document.getElementById("shown").textContent.includes("of 49")')
  turn = ask(page, 'words ' * 100)
  assert 'text tokens, the largest of text_lengths is 64' in turn.locator('.error').first.inner_text()
  page.served.engine.pace = 0.2
  page.fill('#question', 'And now?')
  page.press('#question', 'Enter')
  page.wait_for_selector('.turn:last-child .text')
  page.served.driver.stop()
  page.wait_for_selector('.turn:last-child[data-done]', timeout=20_000)
  assert page.locator('.turn').last.locator('.error').count() >= 1
