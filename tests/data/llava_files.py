"""A small data set in LLaVA's layout, good and with one fault of each kind, for several tests."""

import json

import numpy as np
from PIL import Image

WORDS = ('a', 'red', 'bus', 'on', 'the', 'street', 'near', 'two', 'small', 'dogs', 'and', 'an', 'old', 'house', 'with', 'trees')


def turns(*texts):
  return [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]


def sample(number, image=True, words=4):
  text = ' '.join(WORDS[(number + k) % len(WORDS)] for k in range(words))
  out = {'id': f's{number}', 'conversations': turns(('<image>\n' if image else '') + f'What is it, {number}?', f'{text}.')}
  return out | ({'image': f'pictures/{number % 7}.jpg'} if image else {})


def write_pictures(root):
  (root / 'pictures').mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for k in range(7):
    Image.fromarray(rng.integers(0, 255, (30 + k, 40, 3), np.uint8)).save(root / 'pictures' / f'{k}.jpg')


def write_json(path, samples):
  if path.suffix == '.jsonl':
    path.write_text(''.join(json.dumps(s) + '\n' for s in samples))
  else:
    path.write_text(json.dumps(samples))
  return path


def faults(root):
  """reason -> a sample that must be reported under it; pictures that are broken are written below `root`."""
  good = sample(1)
  (root / 'pictures' / 'cut.jpg').write_bytes((root / 'pictures' / '1.jpg').read_bytes()[:-200])
  return {
    'malformed': {'id': 'bad', 'conversations': [{'from': 'human'}]},
    'wrong_roles': good | {'conversations': [good['conversations'][0]] * 2},
    'empty_question': {'conversations': turns('', 'An answer.')},
    'empty_answer': good | {'conversations': turns('<image>\nWhat?', '')},
    'separator_in_text': good | {'conversations': turns('<image>\nWhat?', 'It ends.</s> Or not?')},
    'no_supervised_token': good | {'conversations': turns('<image>\nWhat?')},
    'too_long': good | {'conversations': turns('<image>\nWhat?', 'tree ' * 400)},
    'image_without_placeholder': good | {'conversations': turns('What?', 'A bus.')},
    'placeholder_without_image': {'conversations': good['conversations']},
    'placeholder_in_answer': good | {'conversations': turns('<image>\nWhat?', 'This: <image>')},
    'several_images': good | {'conversations': turns('<image>\nWhat?', 'A bus.', '<image>\nAnd now?', 'Two.')},
    'missing_image': good | {'image': 'pictures/none.jpg'},
    'undecodable_image': good | {'image': 'pictures/cut.jpg'},
    'other_content': good | {'video': 'clips/1.mp4'},
    'outside_image': good | {'image': '../elsewhere.jpg'},
  }
