"""Preparing a small data set, for the tests of several files."""

import dataclasses
import os

from conftest import GOLDEN

from dynllava_jax.config import DataConfig
from dynllava_jax.data import check, preparation
from dynllava_jax.data.store import Store
from dynllava_jax.data.tokenizer import read_files

TOKENIZER = GOLDEN / 'text' / 'tok_nonlegacy'
DATA = DataConfig(conversation='vicuna_v1', text_length=120, buckets=(60, 80), on_bad_sample='error')
SKIP = dataclasses.replace(DATA, on_bad_sample='skip')


def scan(root, json_files, **changes):
  settings = dict(json=json_files, images=root, data=DATA, tokenizer=read_files(TOKENIZER), num_patches=4, processes=1)
  return check.Scan(**settings | changes)


def run(what, out, **changes):
  settings = dict(only_check=False, image_bytes=True, shard_samples=30)
  return preparation.prepare(what, [1.0] * len(what.json), out, **settings | changes)


def ids(store):
  return [store.record(i)[0].id for i in range(len(store))]


def read_ids(path):
  store = Store(path)
  return os.getpid(), [store[i].id for i in range(len(store))]
