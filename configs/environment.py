"""PPO with an environment that takes turns with the policy, yours or an embedded one:

    jaxalign train --config=configs/environment.py --workdir=runs/turns \
        --config.model.path=HF_DIR --config.tokenizer.template=hf --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.environment=my_package.games:Maze

Two games with everything they need, each cloned from demonstrations first (`clone`) and then played:

    jaxalign pipeline --config=configs/environment.py:calculator --workdir=runs/calculator
    jaxalign pipeline --config=configs/environment.py:wordle --workdir=runs/wordle
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "wordle", "calculator")
    if arg:
        return _calculator() if arg == "calculator" else _wordle()
    c = build.base("environment", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        "ppo",
        data=dict(path="prompts.jsonl", batch_size=32),
        train=dict(steps=400, save_every=40),
        optim=dict(lr=1e-6, schedule="constant", warmup=10, b2=0.999, eps=1e-5),
        rl=dict(turns=6, context=2048, beta=0.02),
        sampling=dict(max_new=256),
    )
    return c


def _game(name, **model):
    c = build.base(name, vocab=0, tied=False, **model)
    c.tokenizer.template = "human_assistant"  # of bytes: every turn costs its letters and two headers
    c.order = ("clone", "play")
    return c


def _calculator():
    c = _game("calculator", max_len=160, dim=96, layers=2, heads=4, hidden=256)
    c.world = {"name": "jaxalign.tasks.calculator:World", "sizes": {"demonstrations": 4000, "demonstrations_eval": 100, "prompts": 2000}}
    c.stages = {
        "clone": build.stage(
            "lm",
            data=dict(path="data/demonstrations.jsonl", eval_path="data/demonstrations_eval.jsonl", batch_size=32, seq_len=160),
            train=dict(steps=300, save_every=150),
            optim=dict(lr=3e-3, warmup=20),
        ),
        "play": build.stage(
            "grpo",
            init="clone",
            data=dict(path="data/prompts.jsonl", batch_size=16),
            train=dict(steps=40, save_every=20),
            optim=dict(lr=5e-4, schedule="constant", warmup=3),
            rl=dict(environment="jaxalign.tasks.calculator:Calculator", turns=2, context=160, group=8),
            sampling=dict(max_new=24),
        ),
    }
    return c


def _wordle():
    c = _game("wordle", max_len=288, dim=128, layers=3, heads=4, hidden=344)
    c.world = {"name": "jaxalign.tasks.wordle:World", "sizes": {"demonstrations": 12000, "demonstrations_eval": 100, "prompts": 4000}}
    c.stages = {
        "clone": build.stage(
            "lm",
            data=dict(path="data/demonstrations.jsonl", eval_path="data/demonstrations_eval.jsonl", batch_size=32, seq_len=288),
            train=dict(steps=1500, save_every=500),
            optim=dict(lr=3e-3, schedule="linear", end=0.0, warmup=50),
        ),
        "play": build.stage(
            "ppo",
            init="clone",
            data=dict(path="data/prompts.jsonl", batch_size=64),
            train=dict(steps=240, save_every=40),
            optim=dict(lr=1e-4, schedule="constant", b2=0.999, eps=1e-5, warmup=4),
            rl=dict(environment="jaxalign.tasks.wordle:Wordle", turns=6, context=288, epochs=4, beta=0.02),
            sampling=dict(max_new=8),
        ),
    }
    return c
