"""Reward functions of every temper, named by import path in test_rewards.py."""

import os
import re
import time

import numpy as np


def count(prompt, completion, record):
    return len(completion.split()) + record["id"] / 100


def slow_first(prompt, completion, record):
    """The earlier the row, the longer it takes: processes finish in the opposite order."""
    time.sleep(0.02 * (7 - record["id"] % 8))
    return record["id"]


def raises(prompt, completion, record):
    if record["id"] == 3:
        raise ValueError("no such thing")
    print("this is no answer")
    return 1.0


def hangs(prompt, completion, record):
    if record["id"] == 2:
        time.sleep(600)
    return 1.0


def backtracks(prompt, completion, record):
    """Inside C, with the interpreter's lock held."""
    if record["id"] == 2:
        re.match(r"(a+)+$", "a" * 64 + "b")
    return 1.0


def always_hangs(prompt, completion, record):
    time.sleep(600)


def dies(prompt, completion, record):
    if record["id"] == 5:
        os._exit(7)
    return 1.0


def of_group(prompts, completions, records):
    """None where the id is odd; the others are compared with one another."""
    rank = np.argsort(np.argsort([len(c) for c in completions]))
    return [None if r["id"] % 2 else float(k) for k, r in zip(rank, records)]


def by_field(completions, prompts, id, **kwargs):  # as TRL writes them: fields of the record by name
    assert kwargs["records"][0]["id"] == id[0] and len(kwargs["completion_ids"]) == len(prompts)
    return np.asarray(id, np.float32)


def of_trl(completions, **kwargs):  # the least of TRL's signatures, and an attribute that says what the name says already
    return [float(i) for i in kwargs["id"]]


def of_trl_with_a_field(completions, id):
    return [float(i) if isinstance(c, str) else -1.0 for c, i in zip(completions, id)]


of_trl_with_a_field.group = True


def of_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def names_of_its_own(asked, said):
    return [float(len(s.split())) for s in said]


names_of_its_own.group = True


def of_tokens(prompts, completions, records, completion_ids):
    return [[float(t % 5) for t in ids] for ids in completion_ids]


def short(prompts, completions):
    return [1.0]


def none(prompts, completions):
    return [None for _ in prompts]


def group_raises(prompts, completions):
    raise ValueError("for all of them")
