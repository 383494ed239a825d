"""Tunix's side of the benchmark: its PeftTrainer on all weights of its own Llama, f32, the same optimizer as the others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys

from pairing import Child
from work import SIZES, Work, rows

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.models.llama3 import params  # noqa: E402
from tunix.sft import peft_trainer, utils  # noqa: E402


def run_sft(w: Work, child: Child):
    dim, layers, heads, kv, hidden, vocab = SIZES[w.size]
    config = llama.ModelConfig(
        num_layers=layers, vocab_size=vocab, embed_dim=dim, hidden_dim=hidden, num_heads=heads, head_dim=dim // heads, num_kv_heads=kv, rope_theta=10_000,
        norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = params.create_model_from_safe_tensors(os.path.join(w.weights, "policy"), config, mesh, jnp.float32)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(w.lr, b2=0.999, weight_decay=0.0))
        how = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=w.total + 1, max_inflight_computations=1)
        trainer = peft_trainer.PeftTrainer(model, tx, how).with_gen_model_input_fn(
            lambda x: {
                "input_tokens": x.input_tokens,
                "input_mask": x.input_mask,
                "positions": utils.build_positions_from_mask(x.input_mask),
                "attention_mask": utils.make_causal_attn_mask(x.input_mask),
            }
        )

        def batches():
            """Its metrics are a step late, to overlap; a step ends here when the weights are there."""
            for ids in rows(w):
                yield peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones(ids.shape, bool))
                jax.block_until_ready(nnx.state(model))
                child.done(loss=float(trainer._prev_buffered_train_metrics.loss))

        trainer.train(batches())


def main():
    verb, w = sys.argv[1], Work(**json.loads(sys.argv[2]))
    if verb == "versions":
        return print(json.dumps({"tunix": importlib.metadata.version("google-tunix"), "tunix's jax": jax.__version__}))
    run_sft(w, Child())


if __name__ == "__main__":
    main()
