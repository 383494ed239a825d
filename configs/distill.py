"""A small model learns a larger one's distribution over every next token:

    jaxalign train --config=configs/distill.py --workdir=runs/distill \
        --config.stage.teacher=runs/teacher --config.tokenizer.path=runs/teacher/tokenizer --config.stage.data.path=train.jsonl

The teacher is a run directory, a stage or a Hugging Face directory with the same tokenizer. `--config=configs/distill.py:on_policy_distill`
learns on what the student itself answers to prompts; it starts from a trained student (`--config.stage.init=DIR`);
`--config.stage.rl.on_policy=0.5` takes about half of the batches, drawn by chance, from the file's own answers.
"""

from jaxalign import build


def get_config(arg=None):
    name = build.preset(arg, "distill", "on_policy_distill") or "distill"
    c = build.base(name, dim=256, layers=6, heads=8, hidden=688, vocab=0)
    if name == "distill":
        c.stage = build.stage(
            name,
            data=dict(path="train.jsonl", batch_size=16, seq_len=512),
            train=dict(steps=1000, save_every=200, log_every=10),
            optim=dict(lr=3e-4, warmup=50, schedule="cosine"),
        )
    else:
        c.stage = build.stage(
            name,
            data=dict(path="prompts.jsonl", batch_size=32, max_prompt_len=256),
            train=dict(steps=500, save_every=100, log_every=10),
            optim=dict(lr=1e-5, warmup=20),
            sampling=dict(max_new=128),
        )
    return c
