"""What is measured: sizes, shapes and data, the same for jaxalign and its peers. Needs numpy only.

Ids are drawn from [4, vocab); 0 is padding, 1 begins, 2 ends a text. Everything has its full length: no side gains from
how it pads.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np

EOS = 2
# dim, layers, heads, key-value heads, hidden, vocab
SIZES = {
    "tiny": (128, 4, 4, 4, 344, 2048),  # 1 M
    "small4k": (288, 6, 6, 6, 768, 4096),  # 7 M
    "small": (288, 6, 6, 6, 768, 32000),  # 15 M, the shape of stories15M
    "medium": (768, 12, 12, 12, 2048, 50257),  # 124 M
    "0.5b": (896, 24, 14, 2, 4864, 151936),  # Qwen2.5-0.5B
    "1b": (2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B
}
TASKS = ("sft", "dpo", "reward", "sample", "ppo", "grpo")


@dataclasses.dataclass(frozen=True)
class Work:
    task: str
    peer: str = ""  # raw | compile | trl | precompute | generate | static
    size: str = "small"
    steps: int = 5  # measured
    warmup: int = 2  # not measured, the first of which compiles
    gpu: bool = False  # bf16 activations (weights too when sampling); f32 without
    weights: str = ""  # directory that holds policy/ and reward/, Hugging Face format
    batch: int = 8  # rows, or pairs
    seq: int = 256  # of which a quarter is the prompt of a pair
    samples: int = 16  # of sampling, PPO and GRPO
    prompt: int = 32
    new: int = 96
    epochs: int = 4  # of PPO
    group: int = 8  # answers to one prompt, of GRPO
    beta: float = 0.04  # of GRPO
    lr: float = 1e-4
    remat: str = "none"  # ours alone
    optimizer: str = "adamw"

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    @property
    def vocab(self) -> int:
        return SIZES[self.size][-1]

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def shapes(task: str, gpu: bool) -> dict:
    """The batch of a task where it is not the default."""
    if not gpu:
        return {}
    return {"seq": 2048 if task == "sft" else 1024, "samples": 64, "prompt": 128, "new": 384}


def units(w: Work) -> tuple[int, str]:
    """What one step does: (how many, of what)."""
    return {
        "sft": (w.batch * w.seq, "tokens"),
        "dpo": (w.batch, "pairs"),
        "reward": (w.batch, "pairs"),
        "sample": (w.samples * w.new, "tokens"),
        "ppo": (w.samples * w.new, "tokens"),
        "grpo": (w.samples * w.new, "tokens"),
    }[w.task]


def flops(w: Work) -> float | None:
    """Model FLOPs of a training step: 2 per weight and token forward (the whole head), 2 L D T for causal attention, counted
    half; backward twice that; a reference that runs in the step forward once. No recomputation, nothing saved by either side."""
    dim, layers, heads, kv, hidden, vocab = SIZES[w.size]
    attention = layers * (2 * dim * dim + 2 * dim * dim * kv // heads)
    forward = 2 * (attention + layers * 3 * dim * hidden) + 2 * layers * dim * w.seq
    tokens, head = w.batch * w.seq, 2 * dim * vocab
    if w.task == "sft":
        return 3 * (forward + head) * tokens
    if w.task == "dpo":
        return (3 if w.peer == "precompute" else 4) * (forward + head) * 2 * tokens
    return 3 * forward * 2 * tokens if w.task == "reward" else None


def _draw(w: Work, *shape: int) -> np.ndarray:
    return np.random.default_rng([7, *shape]).integers(4, w.vocab, shape).astype(np.int32)


def rows(w: Work) -> np.ndarray:
    """i32[steps, B, T]"""
    return _draw(w, w.total + 1, w.batch, w.seq)


def pairs(w: Work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt i32[steps, B, P], chosen i32[steps, B, C], rejected): completions end with EOS."""
    ids = _draw(w, 2, w.total + 1, w.batch, w.seq)
    p = w.seq // 4
    ids[..., -1] = EOS
    return ids[0, ..., :p], ids[0, ..., p:], ids[1, ..., p:]


def prompts(w: Work) -> np.ndarray:
    """i32[steps, B, P]"""
    return _draw(w, w.total + 1, w.samples, w.prompt)


def reward(text: str) -> float:
    """Of GRPO: any number that depends on the completion."""
    return float(len(text) % 97) / 97
