"""The peers' side of the benchmarks: torch, transformers and TRL, in the settings kindest to them.

TRL trains in bf16 with gradient checkpointing by default; on a CPU both only slow it down, so f32 without it is forced.
Nothing is logged, saved or evaluated. Imports nothing of jaxalign.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from pairing import Child
from work import Work, pairs, prompts, reward, rows

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402


def load(w: Work, name: str, dtype=torch.float32):
    kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
    model = kind.from_pretrained(os.path.join(w.weights, name), dtype=dtype, attn_implementation="sdpa")
    model.config.pad_token_id = 0
    return model.to("cuda" if w.gpu else "cpu")


def tokenizer(w: Work) -> PreTrainedTokenizerFast:
    """One word per id, so that the trainers find the ids that we mean."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    t = Tokenizer(models.WordLevel({**special, **{f"t{i}": i for i in range(4, w.vocab)}}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def text(ids) -> str:
    return " ".join(f"t{i}" for i in ids)


def sync(w: Work):
    if w.gpu:
        torch.cuda.synchronize()


def options(w: Work, rows_per_step: int) -> dict:
    return dict(
        output_dir=tempfile.mkdtemp(prefix="jaxalign-bench-"), per_device_train_batch_size=rows_per_step, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=not w.gpu, bf16=w.gpu, fp16=False, gradient_checkpointing=False, learning_rate=w.lr,
        optim="adamw_torch_fused", weight_decay=0.0, lr_scheduler_type="constant", seed=0, dataloader_pin_memory=False,
    )  # fmt: skip


def turns(w: Work, child: Child, seen: dict):
    """Ends a step of a trainer."""

    class Turn(TrainerCallback):
        def on_step_end(self, *_, **__):
            sync(w)
            child.done(**seen)

    return Turn()


def run_trainer(w: Work, child: Child, make):
    """make(callbacks) -> trainer. Its loss is read where the trainer computes it."""
    seen = {}
    trainer = make([turns(w, child, seen)])
    compute = trainer.compute_loss

    def compute_loss(*a, **k):
        out = compute(*a, **k)
        seen["loss"] = float((out[0] if isinstance(out, tuple) else out).detach())
        return out

    trainer.compute_loss = compute_loss
    trainer.train()


def run_sft(w: Work, child: Child):
    ids = rows(w)
    if w.peer == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"input_ids": ids.reshape(-1, w.seq).tolist()})
        args = SFTConfig(**options(w, w.batch), max_steps=w.total, max_length=w.seq, packing=False, train_sampling_strategy="sequential")
        return run_trainer(w, child, lambda c: SFTTrainer(model=load(w, "policy"), processing_class=tokenizer(w), train_dataset=data, args=args, callbacks=c))
    model = load(w, "policy").train()
    f = torch.compile(model) if w.peer == "compile" else model
    opt = torch.optim.AdamW(model.parameters(), lr=w.lr, weight_decay=0.0, fused=True)
    for batch in ids:
        x = torch.from_numpy(batch).long().to(model.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=w.gpu):
            loss = f(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        child.done(loss=loss.item())


def pair_data(w: Work):
    from datasets import Dataset

    p, c, r = (x.reshape(-1, x.shape[-1]) for x in pairs(w))
    # The trainers append the end of text themselves.
    completions = lambda x: [" " + text(row[:-1]) for row in x]
    return Dataset.from_dict({"prompt": [text(row) for row in p], "chosen": completions(c), "rejected": completions(r)})


def run_dpo(w: Work, child: Child):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**options(w, w.batch), max_steps=w.total, max_length=w.seq, beta=0.1, train_sampling_strategy="sequential", precompute_ref_log_probs=w.peer == "precompute")
    make = lambda c: DPOTrainer(
        model=load(w, "policy"), ref_model=load(w, "policy"), args=args, train_dataset=pair_data(w), processing_class=tokenizer(w), callbacks=c
    )
    run_trainer(w, child, make)


def run_reward(w: Work, child: Child):
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**options(w, w.batch), max_steps=w.total, max_length=w.seq, train_sampling_strategy="sequential")
    make = lambda c: RewardTrainer(model=load(w, "reward"), args=args, train_dataset=pair_data(w), processing_class=tokenizer(w), callbacks=c)
    run_trainer(w, child, make)


def run_sample(w: Work, child: Child):
    model = load(w, "policy", torch.bfloat16 if w.gpu else torch.float32).eval()
    cache = {"cache_implementation": "static"} if w.peer == "static" else {}

    def go(ids, new, **how):
        x = torch.from_numpy(ids).long().to(model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0, **how, **cache
            )
        assert out.shape == (w.samples, w.prompt + new)
        sync(w)
        return out

    for i, ids in enumerate(prompts(w)):
        go(ids, w.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        child.done(**({} if i else {"greedy": go(ids, 16, do_sample=False)[:, w.prompt :].tolist()}))


def run_ppo(w: Work, child: Child):
    from datasets import Dataset

    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as e:
        raise SystemExit("this TRL has no PPO trainer (1.13 dropped it): pip download --no-deps trl==1.10.0, unzip it, and give its directory as --trl110") from e
    data = Dataset.from_dict({"input_ids": prompts(w).reshape(-1, w.prompt).tolist()})
    args = PPOConfig(
        **options(w, w.samples), total_episodes=w.samples * w.total, response_length=w.new, num_ppo_epochs=w.epochs, num_mini_batches=1,
        num_sample_generations=0, temperature=1.0, kl_coef=0.05, local_rollout_forward_batch_size=w.samples,
    )  # fmt: skip
    policy = load(w, "policy")
    policy.generation_config.eos_token_id = None  # full length, as on our side
    PPOTrainer(
        args=args, processing_class=tokenizer(w), model=policy, ref_model=load(w, "policy"), reward_model=load(w, "reward"), value_model=load(w, "reward"),
        train_dataset=data, callbacks=[turns(w, child, {})],
    ).train()  # fmt: skip


def run_grpo(w: Work, child: Child):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_dict({"prompt": [text(row) for ids in prompts(w) for row in ids[: w.samples // w.group]]})
    args = GRPOConfig(
        **options(w, w.samples), max_steps=w.total, num_generations=w.group, max_completion_length=w.new, beta=w.beta, temperature=1.0, top_k=0, loss_type="grpo",
        shuffle_dataset=False, generation_kwargs=dict(min_new_tokens=w.new),
    )  # fmt: skip
    # Its reference is read from where the model came from; a path, as TRL has it.
    tokenizer(w).save_pretrained(os.path.join(w.weights, "policy"))
    GRPOTrainer(
        model=load(w, "policy"), reward_funcs=lambda completions, **_: [reward(c) for c in completions], args=args, train_dataset=data,
        processing_class=tokenizer(w), callbacks=[turns(w, child, {})],
    ).train()  # fmt: skip


def main():
    verb, w = sys.argv[1], Work(**json.loads(sys.argv[2]))
    transformers.logging.set_verbosity_error()
    if verb == "versions":
        import trl

        return print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}))
    globals()[f"run_{w.task}"](w, Child(torch.cuda.max_memory_allocated if w.gpu else None))


if __name__ == "__main__":
    main()
