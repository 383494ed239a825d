"""Offline RL and NLPO as whole runs: from a file to saved weights, killed and resumed, sampled, evaluated; and a small graph on
which the optimal Q is known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from absl import flags
from jaxalign import build, tree
from jaxalign.cli import eval as evaluate
from jaxalign.cli import main as cli
from jaxalign.cli import sample
from jaxalign.evals import policy
from jaxalign.models import decoder, heads
from jaxalign.objectives import ilql
from jaxalign.ops import nn
from jaxalign.train import checkpoint, optim, state, step
from jaxalign.train.log import read_jsonl
from jaxalign.types import Trajectories, UserError


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with runs.devices(2):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = runs.prepared(tmp_path_factory.mktemp("data"))
    r = np.random.default_rng(1)
    say = lambda: " ".join(r.choice(["bread", "soup", "tea"], 2))  # noqa: E731
    rows = [{"prompt": say() + ":", "completion": " " + (t := say()), "reward": float(t.count("e"))} for _ in range(20)]
    rows += [{"prompt": say(), "completion": " " + say(), "reward": 0.5, "terminal": False} for _ in range(4)]
    (directory / "episodes.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return directory


def config(name, data, **over):
    c = build.base(name, vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    more = dict(init=str(data / "start"), train=dict(steps=runs.STEPS, save_every=3), optim=dict(lr=3e-3, warmup=2))
    if name == "nlpo":
        of = dict(objective=dict(min_tokens_to_keep=3, top_mask=0.9, target_update_iterations=1), data=dict(path=f"{data}/prompts.jsonl", batch_size=8), sampling=dict(max_new=6))
        c.stage = build.stage(name, **of, rl=dict(reward="runs:length_reward", epochs=2, minibatches=2, beta=0.1), **more)
    else:
        path = f"{data}/episodes.jsonl"
        c.stage = build.stage(name, data=dict(path=path, eval_path=path, batch_size=8, standardise=True), **more)
    for k, v in over.items():
        at, *rest = c.stage, *k.split(".")
        for part in rest[:-1]:
            at = at[part]
        at[rest[-1]] = v
    return c


def test_held_out_returns_are_in_the_units_of_the_training_set(data, tmp_path):
    """Episodes that each earn 2 more are held-out returns 2 / std higher, not the same ones again."""
    rows = [json.loads(line) for line in (data / "episodes.jsonl").read_text().splitlines()]
    earned = np.array([r["reward"] for r in rows])
    (tmp_path / "better.jsonl").write_text("".join(json.dumps({**r, "reward": r["reward"] + 2}) + "\n" for r in rows))

    def returns(**over):
        c = config("mc_returns", data, **{"objective.gamma": 1.0}, **over)
        s = build.make_stage(build.world(c, tmp_path), "mc_returns", c.stage, tmp_path)
        return s.evaluate(s.begin()[0])["returns"]

    better = {"data.eval_path": str(tmp_path / "better.jsonl")}
    np.testing.assert_allclose(returns(**better) - returns(), 2 / earned.std(ddof=1), rtol=1e-4)
    best = np.sort(earned)[-12:]  # of the training set the half is kept, and its mean and std are those that count
    np.testing.assert_allclose(returns(**better, **{"data.top": 0.5}) - returns(**{"data.top": 0.5}), 2 / best.std(ddof=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["ilql", "nlpo"])
def test_killed_and_resumed(name, data, tmp_path, monkeypatch):
    """Death at 5, back to 3: with target heads, and a masking policy, that are neither those of the start nor the newest."""
    over = {"objective.target_every": 2, "objective.alpha": 0.5} if name == "ilql" else {}
    runs.train(config(name, data, **over), tmp_path / "straight")
    runs.killed(5, lambda: runs.train(config(name, data, **over), tmp_path / "killed"))
    s, params = runs.train(config(name, data, **over), tmp_path / "killed")
    assert [e["step"] for e in read_jsonl(tmp_path / "killed/events.jsonl") if e["kind"] == "resume"] == [3]
    for f in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / f).read_bytes() == (tmp_path / "straight" / f).read_bytes()
    assert runs.weights(tmp_path / "killed/params") == runs.weights(tmp_path / "straight/params")
    rows = read_jsonl(tmp_path / "killed/metrics.jsonl")
    if name == "ilql":
        assert {"trunk", "q", "v"} == set(params) and np.isfinite(rows[-1]["eval/nll"])
    else:
        first = rows[0]
        assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["logprob_gap"] < 1e-3 and 3 <= first["objective/allowed"] < 256
        assert "embed" in params


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """name -> the directory of a run of two steps."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            runs.train(config(name, data, **{"train.steps": 2}), done[name])
        return done[name]

    return run


def say(capsys, *args):
    fv = flags.FlagValues()
    sample.define(fv)
    sample.main(fv, cli.parse(fv, ["jaxalign sample", *args]))
    return [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]


def test_a_finished_stage_is_sampled_and_evaluated(data, trained, capsys):
    run = trained("ilql")
    asked = [f"--run={run}", "--prompt=soup:", "--json", "--max_new=8", "--temperature=0"]
    w, _, params = build.trained(str(run), beta=50.0)
    assert isinstance(w.model, heads.Guided) and w.model.beta == 50.0 and set(params) == {"trunk", "q", "v"}
    got = {beta: say(capsys, *asked, f"--beta={beta}") for beta in (0, 50)}
    trunk = build.trained(str(run), beta=0.0)
    alone = build.load_params(w, str(run), w.model.trunk.specs(), "where another stage starts")
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), alone, params["trunk"]))
    how = build.sampling(w, {}, max_new=8, temperature=0.0)
    plain = policy.sample(trunk[0].model.trunk, params["trunk"], how, build.prompt_rows(w, [{"prompt": "soup:"}], 1), w.decode, jax.random.key(0), w.mesh, score=False)
    assert got[0] == plain.completions and got[50] != got[0]
    c = config("ilql", data)
    out = evaluate.evaluate(build.world(c, run), None, c)
    assert np.isfinite(list(out["ilql"].values())).all() and {"nll", "loss/q", "loss/v"} <= set(out["ilql"])


@pytest.mark.parametrize("name", ["mc_returns", "advantage_weighted_bc", "filtered_bc"])
def test_the_others_run(name, trained, capsys):
    run = trained(name)
    assert say(capsys, f"--run={run}", "--prompt=soup:", "--json", "--max_new=4", "--beta=2")
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert np.isfinite(last["loss"]) and np.isfinite(last["eval/nll"])


def test_adapters_beside_the_heads(data, tmp_path):
    """The trunk is frozen but for its adapters; Q and V heads train whole, and are saved with the merged trunk."""
    s, params = runs.train(config("ilql", data, **{"train.steps": 1, "adapter.rank": 2}), tmp_path)
    assert all(k.startswith(("q/", "v/")) or k.endswith(("/a", "/b")) for k in tree.flat(s.params))
    assert set(checkpoint.structure(tmp_path / "params")) == {"trunk", "q", "v"} and (tmp_path / "adapter").is_dir()


def test_a_masking_policy_of_adapters(data, tmp_path):
    """What lags behind are the adapters alone; copied after the first rollout (4 steps), they are those of step 4."""
    s, params = runs.train(config("nlpo", data, **{"train.steps": 4, "adapter.rank": 2}), tmp_path)
    aux = checkpoint.Checkpoints(tmp_path / "checkpoints").structure(4)["state"]["aux"]
    assert all(k.endswith(("/a", "/b")) for k in tree.flat(aux["policy"])) and "embed" in params


@dataclasses.dataclass
class World:
    """Long answers are good ones."""

    seed: int = 0

    def gold_rewards(self, prompts, completions, records):
        return np.array([float(len(c)) for c in completions])


@pytest.mark.parametrize("mask", [("top_k", 2.0), ("learned_top_p", 1.0)], ids=["narrow", "everything"])
def test_a_policy_is_looked_at_through_its_mask(mask, data, tmp_path):
    """And without it, with the same draws: the two differ under a narrow mask, and are one where all is allowed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prompts_eval.jsonl").write_text('{"prompt": "soup:"}\n{"prompt": "tea:"}\n')
    c = config("nlpo", data, **{"train.steps": 2, "objective.mask_type": mask[0], "objective.top_mask": mask[1]})
    with c.unlocked():
        c.stages, c.order = {"nlpo": c.stage}, ("nlpo",)
        del c.stage
        c.world = {"name": "test_offline:World", "watch": {"each": 4, "reference": str(data / "start")}, "sampling": {"max_new": 6}}
    runs.train(c, tmp_path)
    row = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    through, without = ([row[f"eval/{k}{of}"] for k in ("gold", "gold_std", "length")] for of in ("/masked", ""))
    assert (through == without) == (mask[1] == 1) and np.isfinite([row["eval/kl"], row["eval/kl/masked"]]).all()
    if mask[0] == "top_k":
        assert row["val/allowed"] <= 2 + 4 and row["eval/kl/masked"] > 1  # two of 256, the special ones, and what stands there


def test_nlpo_refuses_old_rollouts(data, tmp_path):
    c = config("nlpo", data, **{"rl.staleness": 1})
    with pytest.raises(UserError, match="staleness"):
        build.make_stage(build.world(c, tmp_path), "nlpo", c.stage, tmp_path)


# -- a graph --------------------------------------------------------------------------------------------------------
# From 0 one moves to 1 or 2; from 1 to 3 or 4, from 2 to 3 or 6, from 4 to 3 or 5; 3, 5 and 6 are ends (then EOS, 7), worth
# 0, 1 and 0.5. The data's walks move at random. One leads from 0 to 5 in eight.

EOS, GAMMA = 7, 0.9
MOVES, WORTH = {0: (1, 2), 1: (3, 4), 2: (3, 6), 4: (3, 5)}, {3: 0.0, 5: 1.0, 6: 0.5}


def walks():
    """[(path with EOS, how often in eight)]."""
    def grow(path, share):
        if path[-1] in WORTH:
            return [(path + [EOS], share)]
        return [w for n in MOVES[path[-1]] for w in grow(path + [n], share / 2)]

    return [(p, round(8 * s)) for p, s in grow([0], 1.0)]


def optimal(node):
    """{move: Q*}: rewards come with EOS, discounted by GAMMA for every move before."""
    return {n: GAMMA * (WORTH[n] if n in WORTH else max(optimal(n).values())) for n in MOVES[node]}


def test_ilql_finds_the_optimal_q_and_beta_leads_to_it():
    paths = [p for p, n in walks() for _ in range(n)]
    T = max(map(len, paths))
    t = np.arange(T)
    real = np.stack([t < len(p) for p in paths])
    tokens = np.array([p + [0] * (T - len(p)) for p in paths], np.int32)
    rewards = np.where(tokens == EOS, np.array([WORTH[p[-2]] for p in paths])[:, None], 0).astype(np.float32)
    batch = Trajectories(tokens, (real & (t > 0)).astype(np.float32), real.astype(np.int32), np.where(real, t, 0).astype(np.int32), rewards, np.ones(len(paths), np.float32))
    model = heads.Guided(decoder.model(vocab=8, dim=32, layers=1, heads=2, hidden=64))
    # tau close to 1: at 0.5 V is the mean of Q over the data's moves, here the half of the best.
    objective = ilql.ilql(model, tau=0.98, gamma=GAMMA, cql_scale=1e-3, alpha=0.1, target_every=1)
    params = jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(0))
    tx, _ = optim.make(optim.Optim(lr=3e-3, schedule="linear", end=0.0), 800, params)
    st = state.create(params, tx, objective, 0)

    @jax.jit
    def train(st):
        def one(st, _):
            grads = step.gradient(objective, st.params, {}, st.aux, batch, st.key)[2]
            updates, opt = tx.update(grads, st.opt_state, st.params)
            params = jax.tree.map(jnp.add, st.params, updates)
            return st.replace(params=params, opt_state=opt, aux=objective.update_aux(st.aux, params, {}, st.step), step=st.step + 1), None

        return jax.lax.scan(one, st, None, length=800)[0]

    st = train(st)
    kept = objective.finish(st.params, st.aux)
    x = jax.jit(lambda p: model.hidden(p, tokens, batch.segments, batch.positions).x)(kept)
    q = np.asarray(heads.q_values(kept["q"], x).min(0))
    for b, p in enumerate(paths):
        for at, node in enumerate(p[:-2]):
            for move, want in optimal(node).items():
                assert abs(q[b, at, move] - want) < 0.06, (p, node, move, q[b, at, move], want)

    def worth(beta):
        """The expected reward of decoding, over all walks of the graph."""
        guided = heads.Guided(model.trunk, beta=beta)
        total = 0.0
        for row, p in enumerate(paths):
            logp = jax.nn.log_softmax(guided.next_logits(kept, x[row]).T)
            total += WORTH[p[-2]] * float(np.exp(sum(logp[i, n] for i, n in enumerate(p[1:])))) / paths.count(p)
        return total

    cloned, *rising = [worth(b) for b in (0.0, 2.0, 8.0, 100.0)]
    assert abs(cloned - (1 / 8 + 0.5 / 4)) < 0.05  # what the data earns
    assert cloned < rising[0] < rising[1] < rising[2] and rising[2] > 0.99
