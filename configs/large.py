"""Llama-3 shapes at the size of pods, for `jaxalign plan` and, with data and weights in place, for `jaxalign train`:

    jaxalign plan --config=configs/large.py:1b_sft --topology=v5e:4x4
    jaxalign plan --config=configs/large.py:8b_dpo --topology=v5p:4x4x4
    jaxalign plan --config=configs/large.py:8b_ppo --topology=v5p:4x4x4
    jaxalign plan --config=configs/large.py:70b_sft --topology=v5p:4x8x8

bf16 activations, f32 weights and moments, one activation kept per layer, packed rows. A plan reads neither weights nor
data; training wants --config.model.path, --config.stage.data.path and, for PPO, a reward model in --config.stage.rl.reward.
"""

from jaxalign import build

# Llama 3.2 1B, Llama 3 8B and 70B (2407.21783, table 3).
SHAPES = {
    "1b": dict(dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192, tied=True),
    "8b": dict(dim=4096, layers=32, heads=32, kv_heads=8, hidden=14336, tied=False),
    "70b": dict(dim=8192, layers=80, heads=64, kv_heads=8, hidden=28672, tied=False),
}
# (data, tensor) by preset; fsdp takes the rest. Sampling reads every weight for every token, and should gather few of them.
PRESETS = {"1b_sft": (1, 1), "8b_dpo": (1, 1), "8b_ppo": (4, 4), "70b_sft": (1, 4)}


def get_config(arg=None):
    arg = build.preset(arg, *PRESETS) or next(iter(PRESETS))
    c = build.base("large", vocab=128256, rope_theta=500000.0, max_len=8192, dtype="bfloat16", scan=True, remat="full", **SHAPES[arg.split("_")[0]])
    c.mesh.fsdp, (c.mesh.data, c.mesh.tensor) = -1, PRESETS[arg]
    warm = dict(lr=2e-5, warmup=20, schedule="cosine")
    c.stage = {
        "1b_sft": lambda: build.stage("lm", data=dict(path="train.jsonl", batch_size=64, seq_len=4096), train=dict(steps=1000), optim=warm),
        "8b_dpo": lambda: build.stage("dpo", init="sft", data=dict(path="pairs.jsonl", batch_size=64, max_len=2048), train=dict(steps=1000), optim=dict(warm, lr=5e-7)),
        "8b_ppo": lambda: build.stage(
            "ppo",
            init="sft",
            data=dict(path="prompts.jsonl", batch_size=256, max_prompt_len=512),
            train=dict(steps=1000),
            optim=dict(lr=1e-6, schedule="linear", end=0.0),
            rl=dict(reward="reward", value="reward", epochs=2, minibatches=2, beta=0.05),
            sampling=dict(max_new=512),
        ),
        "70b_sft": lambda: build.stage("lm", data=dict(path="train.jsonl", batch_size=256, seq_len=4096), train=dict(steps=1000), optim=warm),
    }[arg]()
    return c
