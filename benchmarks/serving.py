"""A server under load: how fast, how late, and whether anything is lost or answered otherwise than alone.

    python -m dynllava_jax.serve --checkpoint=examples/digits --text_lengths=32 --max_new_tokens=72 &
    python benchmarks/serving.py --checkpoint=examples/digits --clients=64 --seconds=60

Clients ask questions about digit scenes one after the other, every second one as a stream. Prints JSON: requests, what was lost (by
the error that the client saw), answers that are not those of `Model.answer` to the question alone, accuracy, seconds from asking to
the first token and to the end (p50, p95), tokens per second; the same for one client; and of the server its resident memory and
compilations before, after, and `--every` so many seconds. Start it with --offline= to compare with nothing, as one under a
controller. `--engine` also runs the checkpoint's engine here with as many slots as clients, before and after, without a server:
what a server adds to a token, as a share of the engine's time for it (it wants as many --slots). With --restarts=N the program
starts the server itself, with the flags behind `--`, and kills it N times under load:

    python benchmarks/serving.py --restarts=3 --url=http://127.0.0.1:8000 -- --text_lengths=32 --max_new_tokens=72
"""

import base64
import collections
import contextlib
import http.client
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import checkout  # noqa: F401
import numpy as np
from absl import app, flags
from PIL import Image

URL = flags.DEFINE_string('url', 'http://127.0.0.1:8000', 'Where the server is.')
MODEL = flags.DEFINE_string('model', 'digits', 'Which of its models.')
CHECKPOINT = flags.DEFINE_string('checkpoint', 'examples/digits', 'That it serves.')
OFFLINE = flags.DEFINE_string('offline', 'own', 'How it runs it: "own", or a value of --stages; empty compares with nothing.')
CLIENTS = flags.DEFINE_integer('clients', 64, 'At once.', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', 60.0, 'For so long new questions are asked.')
ALONE = flags.DEFINE_float('alone', 15.0, 'And for so long by one client; 0 leaves it out.')
QUESTIONS = flags.DEFINE_integer('questions', 24, 'Different ones.', lower_bound=1)
LONG = flags.DEFINE_bool('long', False, 'Only questions with long answers.')
EVERY = flags.DEFINE_float('every', 0.0, 'Seconds between looks at the memory and compilations of the server; 0 for none.')
ENGINE = flags.DEFINE_bool('engine', False, 'Compare with the engine alone.')
RESTARTS = flags.DEFINE_integer('restarts', 0, 'Kill the server (SIGKILL) so often under load, and start it again.', lower_bound=0)
TIMEOUT = flags.DEFINE_float('timeout', 60.0, 'Seconds after which a client takes itself for hung.')
TEXT, LONGEST = 32, 72


def asked():
  """(question, picture as PNG, expected answer, task) of the test split."""
  from dynllava_jax.data.digits import Questions
  from dynllava_jax.evals.benchmarks.digits import LONG_TASKS

  source, out, i = Questions('test', 0, 50 * QUESTIONS.value), [], 0
  while len(out) < QUESTIONS.value:
    sample, i = source[i], i + 1
    if LONG.value and sample.task not in LONG_TASKS:
      continue
    content = io.BytesIO()
    Image.fromarray(np.asarray(sample.image)).save(content, 'PNG')
    words = sample.conversations[0]['value'].replace('<image>\n', '')
    out.append((words, content.getvalue(), sample.conversations[1]['value'], sample.task))
  return out


def offline(questions):
  """Answers of `Model.answer`, by question; None if nothing is to be compared."""
  if not OFFLINE.value:
    return None
  import dynllava_jax as dl

  stages = None if OFFLINE.value == 'own' else OFFLINE.value
  model = dl.load(CHECKPOINT.value, stages=stages, max_new_tokens=LONGEST, text_lengths=(TEXT,))
  return model.answer([picture for _, picture, _, _ in questions], [words for words, _, _, _ in questions])


def engine_alone(questions, seconds):
  """Tokens per second of an engine whose slots are all taken, pictures decoded before."""
  import dynllava_jax as dl
  from dynllava_jax.serving import questions as forms
  from dynllava_jax.serving.engine import Engine
  from dynllava_jax.serving.request import Request

  stages = None if OFFLINE.value in ('', 'own') else OFFLINE.value
  model = dl.load(CHECKPOINT.value, stages=stages, max_new_tokens=LONGEST, text_lengths=(TEXT,))
  engine = Engine(model.generator, model.loaded.tokenizer, text_length=TEXT, slots=CLIENTS.value, steps=8)
  asked = [forms.question(i, picture, words) for i, (words, picture, _, _) in enumerate(questions)]
  rows = forms.lay_out(model.loaded, asked, (TEXT,), [0] * len(asked))
  requests = itertools.cycle([Request(f'question {i}', row) for i, row in enumerate(rows)])
  engine.warm([next(requests)])
  live, made, begun = [], 0, time.monotonic()
  while time.monotonic() - begun < seconds:
    live += [engine.submit(next(requests)) for _ in range(CLIENTS.value - len(live))]
    engine.step()
    made += sum(len(t.output.tokens) for t in live if t.finish)
    live = [t for t in live if not t.finish]
  return made / (time.monotonic() - begun)


def ask(place, body, stream):
  """(text, usage, seconds to the first token or None) of a request; raises what a client would see."""
  connection = http.client.HTTPConnection(place, timeout=TIMEOUT.value)
  start = time.monotonic()
  try:
    connection.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})
    response = connection.getresponse()
    if response.status != 200:
      raise RuntimeError(f'HTTP {response.status}: {json.load(response)["error"]["message"]}')
    if not stream:
      answer = json.load(response)
      return answer['choices'][0]['message']['content'], answer['usage'], None
    text, usage, first = '', None, None
    for line in response:
      if not line.startswith(b'data: ') or line == b'data: [DONE]\n':
        continue
      chunk = json.loads(line[6:])
      if 'error' in chunk:
        raise RuntimeError(f'in the stream: {chunk["error"]["message"]}')
      piece = ''.join(choice['delta'].get('content', '') for choice in chunk['choices'])
      first = first or (time.monotonic() - start if piece else None)
      text, usage = text + piece, chunk.get('usage') or usage
    if usage is None:
      raise RuntimeError('the stream ended early')
    return text, usage, first
  finally:
    connection.close()


def load(clients, seconds, questions, expected):
  """What so many clients saw."""
  from dynllava_jax.evals.benchmarks.digits import score

  place = urllib.parse.urlsplit(URL.value).netloc
  bodies = []
  for words, picture, _, _ in questions:
    url = 'data:image/png;base64,' + base64.b64encode(picture).decode()
    content = [{'type': 'image_url', 'image_url': {'url': url}}, {'type': 'text', 'text': words}]
    body = {'model': MODEL.value, 'messages': [{'role': 'user', 'content': content}], 'temperature': 0, 'seed': 0}
    bodies.append([json.dumps(body), json.dumps(body | {'stream': True, 'stream_options': {'include_usage': True}})])
  done, lost, other, rungs = [], collections.Counter(), [], collections.Counter()
  end = time.monotonic() + seconds

  def client(number):
    turn = number
    while time.monotonic() < end:
      i, stream, turn = turn % len(bodies), number % 2, turn + 1
      start = time.monotonic()
      try:
        text, usage, first = ask(place, bodies[i][stream], stream)
      except TimeoutError:
        lost['hung'] += 1
        continue
      except (OSError, http.client.HTTPException, RuntimeError, ValueError) as e:
        lost[f'{type(e).__name__}: {e}'[:120]] += 1
        time.sleep(0.2)
        continue
      if expected is not None and text != expected[i]:
        other.append((questions[i][0], expected[i], text))
      rungs[usage['rung']] += 1
      right = score(questions[i][3], questions[i][2], text)
      done.append((time.monotonic() - start, first, usage['completion_tokens'], right))

  begun = time.monotonic()
  threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  took = time.monotonic() - begun
  if not done:
    return {'clients': clients, 'answered': 0, 'lost': dict(lost)}
  total, first = [d[0] for d in done], [d[1] for d in done if d[1] is not None]
  quantiles = lambda values: [round(float(q), 3) for q in np.quantile(values, [0.5, 0.95])] if values else None
  return {
    'clients': clients,
    'seconds': round(took, 1),
    'answered': len(done),
    'lost': dict(lost),
    'answered otherwise': None if expected is None else len(other),
    'examples': other[:3],
    'accuracy': round(100 * float(np.mean([d[3] for d in done])), 2),
    'seconds to the end, p50 and p95': quantiles(total),
    'seconds to the first token, p50 and p95': quantiles(first),
    'tokens per second': round(sum(d[2] for d in done) / took, 1),
    'requests per second': round(len(done) / took, 2),
    'rungs': dict(rungs),
  }


def server():
  """Resident MiB and compilations."""
  connection = http.client.HTTPConnection(urllib.parse.urlsplit(URL.value).netloc, timeout=30)
  connection.request('GET', '/metrics')
  text = connection.getresponse().read().decode()
  resident = re.search(r'^process_resident_memory_bytes (\S+)', text, re.M)
  compiled = re.findall(r'^dynllava_compilations\{.*\} (\S+)', text, re.M)
  return {'resident MiB': round(float(resident[1]) / 2**20, 1), 'compilations': sum(map(float, compiled))}


def looks(found, over):
  """Fills `found` with what the server takes, from time to time, until it is `over`."""
  while not over.wait(EVERY.value):
    with contextlib.suppress(OSError, TypeError):  # it may just be starting
      found.append(server())


def started(command):
  """A server that answers."""
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  while process.poll() is None:
    with contextlib.suppress(OSError, TypeError):
      server()
      return process
    time.sleep(0.2)
  raise SystemExit(f'error: {" ".join(command)}: ended with {process.returncode}')


class Restarted:
  """A server that is killed and started again, evenly over the time of the load; `down`: seconds without one, each time."""

  def __init__(self, flags_of_server):
    port = urllib.parse.urlsplit(URL.value).port
    more = [f'--checkpoint={CHECKPOINT.value}', f'--name={MODEL.value}', f'--port={port}', *flags_of_server]
    self.command, self.down = [sys.executable, '-m', 'dynllava_jax.serve', *more], []
    self.process = started(self.command)

  def run(self, over):
    """Until it is `over`."""
    for _ in range(RESTARTS.value):
      if over.wait(SECONDS.value / (RESTARTS.value + 1)):
        return
      self.process.kill()
      self.process.wait()
      begun = time.monotonic()
      self.process = started(self.command)
      self.down.append(round(time.monotonic() - begun, 1))


def main(args) -> None:
  """Prints what was found."""
  restarted = Restarted(args[1:]) if RESTARTS.value else None
  try:
    questions = asked()
    expected = offline(questions)
    out = {'before': server()}
    if ALONE.value:
      out['alone'] = load(1, ALONE.value, questions, expected)
    found, over = [], threading.Event()
    beside = [threading.Thread(target=looks, args=(found, over))] * bool(EVERY.value)
    beside += [threading.Thread(target=restarted.run, args=(over,))] * bool(restarted)
    for thread in beside:
      thread.start()
    alone = [engine_alone(questions, SECONDS.value / 2)] if ENGINE.value else []
    out['together'] = load(CLIENTS.value, SECONDS.value, questions, expected)
    over.set()
    if alone:
      alone.append(engine_alone(questions, SECONDS.value / 2))
      out['engine alone, tokens per second'] = [round(a, 1) for a in alone]
      out["the server's share beside the engine's time"] = round(np.mean(alone) / out['together']['tokens per second'] - 1, 4)
    for thread in beside:
      thread.join()
    out |= {'meanwhile': found} if found else {}
    out |= {'killed and started again, seconds without a server': restarted.down} if restarted else {}
    out['after'] = server()
    print(json.dumps(out, indent=1))
  finally:
    if restarted:
      restarted.process.terminate()
      restarted.process.wait()


if __name__ == '__main__':
  app.run(main)
