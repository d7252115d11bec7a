"""What clients meet: answers in OpenAI's form, refusals with a reason, keys, limits, and ends that nobody is left waiting for."""

import concurrent.futures
import http.client
import json
import random
import shutil
import socket
import subprocess
import time

import paced
import pytest
from paced import ANSWER, data_url, png

from dynllava_jax.server.protocol import RefusedError, parse

ASKED = {'model': 'digits', 'messages': [{'role': 'user', 'content': 'How many digits are there?'}]}


@pytest.fixture(scope='module')
def served():
  with paced.serving() as server:
    yield server


@pytest.fixture(scope='module')
def client(served):
  openai = pytest.importorskip('openai', reason='requirements-dev.txt is not installed')
  return openai.OpenAI(base_url=f'{served.url}/v1', api_key='none', max_retries=0, timeout=30)


def post(served, body, path='/v1/chat/completions', headers=()):
  """Status and JSON, or text, of a request with these bytes."""
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  connection = http.client.HTTPConnection('127.0.0.1', served.port, timeout=30)
  connection.request('POST', path, content, {'Content-Type': 'application/json', **dict(headers)})
  response = connection.getresponse()
  text = response.read()
  connection.close()
  return response.status, json.loads(text)


def refused(served, **changes):
  status, body = post(served, ASKED | changes)
  assert set(body) == {'error'}, body
  return status, body['error']['message']


def asked_with(*parts):
  return [{'role': 'user', 'content': list(parts)}]


def picture(url):
  return {'type': 'image_url', 'image_url': {'url': url}}


WORDS = {'type': 'text', 'text': 'How many digits are there?'}


def test_the_official_client_gets_whole_answers_and_streams(client):
  assert [m.id for m in client.models.list()] == ['digits', 'digits:dense']
  assert client.models.retrieve('digits:dense').id == 'digits:dense'
  messages = asked_with(WORDS, picture(data_url(png())))
  whole = client.chat.completions.create(model='digits', messages=messages, logprobs=True)
  (choice,) = whole.choices
  assert choice.finish_reason == 'length' and choice.message.role == 'assistant' and choice.message.content
  assert [t.logprob for t in choice.logprobs.content] == [-0.5] * ANSWER
  assert whole.usage.completion_tokens == ANSWER and whole.usage.image_tokens == 49 and whole.usage.prompt_tokens > 49
  assert whole.usage.kept_completion_tokens == 4  # of those that were fed back
  options = dict(stream=True, stream_options={'include_usage': True}, logprobs=True)
  *chunks, last = client.chat.completions.create(model='digits', messages=messages, **options)
  assert ''.join(c.choices[0].delta.content or '' for c in chunks) == choice.message.content
  assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == ANSWER
  assert chunks[-1].choices[0].finish_reason == 'length' and last.usage == whole.usage


def test_conversations_limits_and_stops_are_passed_on(client, served):
  say = lambda *texts, **more: client.chat.completions.create(
    model='digits', messages=[{'role': r, 'content': t} for r, t in zip(('user', 'assistant') * 3, texts)], **more
  )
  alone = say('How many digits are there?')
  later = say('Are there any?', 'yes.', 'How many digits are there?')
  assert later.usage.prompt_tokens > alone.usage.prompt_tokens
  assert say('And?', max_completion_tokens=3).usage.completion_tokens == 3
  assert say('And?', max_tokens=2).choices[0].finish_reason == 'length'
  text = alone.choices[0].message.content
  stopped = say('How many digits are there?', stop=[text[2:4]])
  assert stopped.choices[0].finish_reason == 'stop' and stopped.choices[0].message.content == text[:2].rstrip()
  system = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'And?'}]
  body = parse(json.dumps(ASKED | {'messages': system}).encode())
  assert body.question('x', 10).text == ('Be brief.\nAnd?',)


def test_curl(served):
  if not shutil.which('curl'):
    pytest.skip('curl is not installed')
  command = ['curl', '-sN', f'{served.url}/v1/chat/completions', '-H', 'Content-Type: application/json', '-d']
  run = lambda *command: subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
  events = [line.removeprefix('data: ') for line in run(*command, json.dumps(ASKED | {'stream': True})).splitlines() if line]
  assert events[-1] == '[DONE]' and json.loads(events[0])['choices'][0]['delta']['role'] == 'assistant'
  assert run('curl', '-s', f'{served.url}/health') == '{"status":"ready"}'


@pytest.mark.parametrize(
  'changes, status, message',
  [
    (dict(model='gpt'), 404, "model: 'gpt' is not here, expected one of digits, digits:dense"),
    (dict(n=2), 400, 'n: Input should be 1, got 2'),
    (dict(tools=[{}]), 400, 'tools: is not known to this server'),
    (dict(temperature=-1.0), 400, 'temperature: -1.0, expected a number from 0'),
    (dict(top_p=0.0), 400, 'top_p'),
    (dict(seed=-1), 400, 'seed: -1'),
    (dict(stop=['']), 400, 'stop'),
    (dict(top_logprobs=2), 400, 'top_logprobs: Input should be 0'),
    (dict(presence_penalty=0.5), 400, 'presence_penalty'),
    (dict(logit_bias={'3': 1.0}), 400, 'logit_bias'),
    (dict(response_format={'type': 'json_object'}), 400, 'response_format.type'),
    (dict(max_tokens=13), 400, 'max_tokens: 13, and this server has room for 12 of an answer'),
    (dict(max_tokens=0), 400, 'max_tokens: 0'),
    (dict(stream='yes'), 400, 'stream: Input should be a valid boolean'),
    (dict(messages=[]), 400, 'messages'),
    (dict(messages=[{'role': 'tool', 'content': 'x'}]), 400, 'messages.0.role'),
    (dict(messages=[{'role': 'assistant', 'content': 'x'}]), 400, "messages[0]: role 'assistant', expected 'user'"),
    (dict(messages=[{'role': 'user', 'content': ''}]), 400, 'messages[0]: the question is'),
    (dict(messages=[{'role': 'user', 'content': 'a <image> b'}]), 400, 'messages[0]: the text names the image itself'),
    (dict(messages=[{'role': 'user', 'content': 'x'}] * 2), 400, "messages[1]: role 'user', expected 'assistant'"),
    (dict(messages=[{'role': 'user', 'content': 'many words ' * 60}]), 400, 'text tokens, the largest of text_lengths is 64'),
    (dict(messages=[{'role': 'user', 'content': 'a</s>b'}]), 400, 'separator'),
    (dict(messages=asked_with(WORDS, picture('https://example.com/a.png'))), 400, 'this server fetches nothing'),
    (dict(messages=asked_with(WORDS, picture('file:///etc/passwd'))), 400, 'this server fetches nothing'),
    (dict(messages=asked_with(WORDS, picture('data:image/png;base64,@@'))), 400, 'no base64'),
    (dict(messages=asked_with(WORDS, picture(data_url(b'no picture')))), 400, 'is no picture in PNG'),
    (dict(messages=asked_with(WORDS, picture(data_url(png()[:-40])))), 400, 'cannot be decoded'),
    (dict(messages=asked_with(WORDS, *[picture(data_url(png()))] * 2)), 400, 'messages[0]: 2 pictures'),
    (dict(messages=asked_with(WORDS, picture(data_url(png(1001, 1000))))), 400, '1001 x 1000 pixels, at most 1,000,000'),
    (dict(messages=asked_with(WORDS, {'type': 'input_audio'})), 400, 'messages.0.content'),
  ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(served, changes, status, message):
  found, said = refused(served, **changes)
  assert found == status and message in said and '\n' not in said


def test_a_picture_that_is_small_as_a_file_and_huge_unpacked_is_not_unpacked(served):
  bomb = png(20_000, 1).replace((20_000).to_bytes(4, 'big') + (1).to_bytes(4, 'big'), (30_000).to_bytes(4, 'big') * 2)
  start = time.monotonic()
  status, message = refused(served, messages=asked_with(WORDS, picture(data_url(bomb))))
  assert status == 400 and ('30000 x 30000 pixels' in message or 'is no picture' in message) and time.monotonic() - start < 5


@pytest.mark.parametrize('chunked', [False, True])
def test_a_body_that_is_too_large_is_not_read(served, chunked):
  connection = http.client.HTTPConnection('127.0.0.1', served.port, timeout=10)
  try:
    if chunked:
      connection.request('POST', '/v1/chat/completions', (b' ' * 2**16 for _ in range(64)), encode_chunked=True)
    else:
      connection.putrequest('POST', '/v1/chat/completions')
      connection.putheader('Content-Length', str(2**40))
      connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and '1,048,576 bytes' in json.load(response)['error']['message']
  except (BrokenPipeError, ConnectionResetError):
    assert chunked  # closed while it was still being sent
  connection.close()
  assert post(served, ASKED)[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(served):
  with socket.create_connection(('127.0.0.1', served.port), timeout=10) as slow:
    slow.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{')
    assert b' 408 ' in slow.recv(4096).split(b'\r\n')[0]


def mutations(count, seed=0):
  """Bodies that are wrong in ways of their own: bytes changed, cut, doubled; values of other types, deep, huge."""
  rng = random.Random(seed)
  whole = json.dumps(ASKED | {'temperature': 0.5, 'stop': ['x'], 'messages': asked_with(WORDS, picture(data_url(png(20, 20))))})
  values = [None, True, -1, 10**30, 1e400, [], {}, [[]], {'a': 1}, 'x' * 5000, '\ud800', '\x00', 'NaN', '😀' * 50, 2.5, [None] * 50]
  for i in range(count):
    kind = i % 5
    if kind == 0:
      text = whole[: rng.randrange(len(whole))]
    elif kind == 1:
      marks = [at for at, c in enumerate(whole) if c in '{}[],']
      at = rng.choice(marks)
      text = whole[:at] + rng.choice('{}[]:,x') * 2 + whole[at:]
    elif kind == 2:
      tree = json.loads(whole)
      place, key = rng.choice([(tree, 'model'), (tree, 'messages'), (tree, 'messages'), (tree, 'nonsense'),
                               (tree['messages'][0], 'role'), (tree['messages'][0]['content'][0], 'type'),
                               (tree['messages'][0]['content'][1], 'image_url'),
                               (tree['messages'][0]['content'][1]['image_url'], 'url')])  # fmt: skip
      place[key] = rng.choice(values)
      text = json.dumps(tree)
    elif kind == 3:
      text = rng.choice(
        ['[' * 5000, '{"a":' * 3000, '9' * 6000, '"' + 'a' * 9000, 'NaN', '-', 'nul', '\ufeff' + whole, '[1]', '""']
      )
    else:
      yield bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300)))
      continue
    yield text.encode('utf-8', 'surrogatepass')


def test_500_malformed_bodies_are_each_refused_and_the_next_one_is_answered(served):
  for i, body in enumerate(mutations(500)):
    status, answer = post(served, body)
    assert 400 <= status < 500 and answer['error']['message'], (body[:200], status, answer)
    if i % 100 == 0:
      assert post(served, ASKED)[0] == 200
  assert post(served, ASKED)[0] == 200


def test_other_requests_are_refused_in_the_same_form(served):
  assert post(served, ASKED, '/v1/completions')[0] == 404
  connection = http.client.HTTPConnection('127.0.0.1', served.port, timeout=10)
  connection.request('GET', '/v1/chat/completions')
  response = connection.getresponse()
  assert response.status == 405 and json.load(response)['error']['message'] == 'GET /v1/chat/completions: Method Not Allowed'


def test_who_goes_away_is_cancelled(served):
  served.engine.pace = 0.05
  try:
    for stream in (True, False):
      before = len(served.engine.cancelled)
      with socket.create_connection(('127.0.0.1', served.port), timeout=10) as gone:
        body = json.dumps(ASKED | {'stream': stream}).encode()
        head = f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'
        gone.sendall(head.encode() + body)
        if stream:
          assert b' 200 ' in gone.recv(4096)
        else:
          time.sleep(0.15)
      deadline = time.monotonic() + 5
      while len(served.engine.cancelled) == before and time.monotonic() < deadline:
        time.sleep(0.01)
      assert len(served.engine.cancelled) == before + 1, stream
  finally:
    served.engine.pace = 0.0


def test_more_than_may_wait_are_told_to_come_back(served):
  served.engine.pace = 0.05
  try:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      found = list(pool.map(lambda _: post(served, ASKED), range(12)))
  finally:
    served.engine.pace = 0.0
  assert {status for status, _ in found} == {200, 429}
  assert all('which is the limit; try again later' in body['error']['message'] for status, body in found if status == 429)


def test_metrics(served):
  post(served, ASKED | {'messages': asked_with(WORDS, picture(data_url(png())))})
  connection = http.client.HTTPConnection('127.0.0.1', served.port, timeout=10)
  connection.request('GET', '/metrics')
  lines = dict(line.rsplit(' ', 1) for line in connection.getresponse().read().decode().splitlines() if not line.startswith('#'))
  assert float(lines['dynllava_slots{model="digits"}']) == 2 and float(lines['dynllava_waiting{model="digits"}']) == 0
  assert float(lines['dynllava_kv_slots{model="digits"}']) > float(lines['dynllava_kv_slots_used{model="digits"}']) == 0
  assert float(lines['dynllava_requests_total{finish="length",model="digits",rung=""}']) >= 1
  assert 0 < float(lines['dynllava_kept_share{of="answer"}']) < 1
  assert any(name.startswith('dynllava_first_token_seconds_bucket') for name in lines)
  assert float(lines['dynllava_refused_total{status="400"}']) >= 1


def test_keys():
  with paced.serving(keys=['one', 'two']) as served:
    for headers in ((), {'Authorization': 'Bearer three'}, {'Authorization': 'Basic one'}, {'Authorization': 'Bearer é'.encode()}):
      status, body = post(served, ASKED, headers=headers)
      assert status == 401 and body['error']['message'] == 'Authorization: expected Bearer and a key of this server'
    for key in ('one', 'two'):
      assert post(served, ASKED, headers={'Authorization': f'Bearer {key}'})[0] == 200


def test_an_answer_that_takes_too_long_is_given_up():
  with paced.serving(timeout=0.2) as served:
    served.engine.pace = 0.1
    status, body = post(served, ASKED)
    assert status == 504 and body['error']['message'].startswith('no answer within 0.2 s')


@pytest.mark.parametrize('drain, status', [(5.0, 200), (0.1, 503)])
def test_sigterm_lets_answers_end_or_says_so(drain, status):
  with paced.serving(drain=drain) as served:
    served.engine.pace = 0.05
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
      waiting = [pool.submit(post, served, ASKED) for _ in range(3)]
      while served.driver.count() < 3:
        time.sleep(0.01)
      served.terminate()
      assert {w.result()[0] for w in waiting} == {status}
    served.thread.join(10)
    assert not served.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
      post(served, ASKED)


def test_a_fault_of_an_engine_reaches_everybody_and_ends_the_server():
  with paced.serving() as served:
    served.engine.broken = RuntimeError('out of memory, say')
    status, body = post(served, ASKED)
    assert status == 500 and body['error']['message'] == 'the server failed; its log says how'
    served.thread.join(10)
    assert not served.thread.is_alive() and served.driver.failed is served.engine.broken


def test_the_parser_says_what_is_wrong_first():
  with pytest.raises(RefusedError, match=r'nonsense: is not known to this server \(and 1 more\)'):
    parse(b'{"model": "x", "messages": [], "nonsense": 1}')
