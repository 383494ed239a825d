"""Schedules against closed forms, optimizers against numpy, and the regexes over parameter paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxalign import shard, tree
from jaxalign.models import decoder, gpt2
from jaxalign.ops import nn
from jaxalign.train import optim, state
from jaxalign.train.optim import Optim
from jaxalign.types import Objective, UserError

CONFIG = decoder.Config(vocab=16, dim=8, layers=2, heads=2, hidden=12)
SHAPES = jax.eval_shape(lambda: nn.init(decoder.specs(CONFIG), jax.random.key(0)))
GPT2 = jax.eval_shape(lambda: nn.init(gpt2.specs(gpt2.Config(vocab=16, dim=8, layers=2, heads=2)), jax.random.key(0)))


def closed(kind, t, lr, warmup, end, steps):
    if t < warmup:
        return lr * (t + 1) / warmup
    x = min((t - warmup) / max(steps - warmup, 1), 1)
    return {"constant": lr, "linear": lr * (1 - (1 - end) * x), "cosine": lr * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * x)))}[kind]


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules(kind, warmup):
    rate = optim.schedule(Optim(lr=0.3, schedule=kind, warmup=warmup, end=0.1), 20)
    t = np.arange(25)
    got = jax.jit(lambda t: jnp.broadcast_to(rate(t), t.shape))(t)
    np.testing.assert_allclose(got, [closed(kind, i, 0.3, warmup, 0.1, 20) for i in t], rtol=1e-5)
    # by hand: the first step of four is lr/4; the last value is lr or a tenth of it
    np.testing.assert_allclose(got[0], 0.075 if warmup else 0.3, rtol=1e-6)
    np.testing.assert_allclose(got[20], 0.3 if kind == "constant" else 0.03, rtol=1e-5)


def walk(o, grads, w0, steps=10):
    """w after each gradient; a schedule that stays constant."""
    tx, _ = optim.make(o, steps, w0)

    @jax.jit
    def run(w, s, g):
        updates, s = tx.update(g, s, w)
        return jax.tree.map(jnp.add, w, updates), s

    w, s, out = w0, tx.init(w0), []
    for g in grads:
        w, s = run(w, s, g)
        out.append(jax.tree.map(np.asarray, w))
    return out


def gradients(n=5):
    # of very different sizes, 1e-6 to 1: there eps shows
    scale = np.array([[1e-6, 1e-4], [1e-2, 1.0]])
    return [{"w": (np.random.default_rng(i).standard_normal((2, 2)) * scale).astype(np.float32)} for i in range(n)]


@pytest.mark.parametrize("name", ["adamw", "adam_tf"])
def test_adam(name):
    """TensorFlow: w -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v)+eps). Ours by default: w -= lr mhat/(sqrt(vhat)+eps)."""
    b1, b2, eps, lr = 0.9, 0.99, 1e-5, 0.1
    w, m, v, got = np.ones((2, 2)), 0, 0, walk(Optim(name=name, lr=lr, schedule="constant", b1=b1, b2=b2, eps=eps), gradients(), {"w": jnp.ones((2, 2))})
    for t, g in enumerate(gradients(), 1):
        g = g["w"].astype(np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if name == "adam_tf":
            w = w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        else:
            w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        np.testing.assert_allclose(got[t - 1]["w"], w, rtol=1e-5)


def test_tensorflow_steps_are_smaller_early():
    """A gradient of eps at t = 1: optax moves lr eps/(eps+eps) = lr/2; TF moves lr 0.1 eps/(0.1 eps + eps) = lr/11 with
    b2 = 0.99, since sqrt(v) = sqrt(0.01) eps and the rate is sqrt(0.01)/0.1 = 1 times m = 0.1 eps."""
    g = [{"w": np.full((2, 2), 1e-5, np.float32)}]
    moved = {n: -walk(Optim(name=n, lr=1.0, schedule="constant", b2=0.99, eps=1e-5), g, {"w": jnp.zeros((2, 2))})[0]["w"][0, 0] for n in ("adamw", "adam_tf")}
    np.testing.assert_allclose([moved["adamw"], moved["adam_tf"]], [1 / 2, 1 / 11], rtol=1e-4)


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_every_optimizer_goes_downhill(name):
    """w -> w - something of w's sign on f(w) = w^2 / 2."""
    w = walk(Optim(name=name, lr=0.05, schedule="constant"), [{"w": np.array([[3.0, -2.0], [1.0, -1.0]], np.float32)}], {"w": jnp.array([[3.0, -2.0], [1.0, -1.0]])})[0]["w"]
    assert (np.abs(w) < [[3, 2], [1, 1]]).all()


def test_decay_takes_matrices_only():
    """Norm scales and biases do not decay, also when stacked over layers ([L,D] is a vector a layer)."""
    on = {n for n, x in tree.flat(optim.decayed(Optim(), SHAPES)).items() if x}
    assert on == {"embed", *(f"layers/{k}" for k in ("q", "k", "v", "o", "gate", "up", "down"))}
    on = {n for n, x in tree.flat(optim.decayed(Optim(), GPT2)).items() if x}
    assert on == {"embed", "positions", *(f"layers/{k}/w" for k in ("qkv", "o", "up", "down"))}
    named = tree.flat(optim.decayed(Optim(decay=(r"^embed$", "layers/q")), SHAPES))
    assert {n for n, x in named.items() if x} == {"embed", "layers/q"}


def test_decay_is_decoupled():
    """AdamW: with a zero gradient a matrix shrinks by lr * decay, a vector stays."""
    w0 = {"layers": {"norm": jnp.ones((2, 3)), "q": jnp.ones((2, 3, 3))}, "b": jnp.ones(3)}
    out = walk(Optim(lr=0.1, schedule="constant", weight_decay=0.2), [jax.tree.map(jnp.zeros_like, w0)] * 2, w0)
    np.testing.assert_allclose(out[1]["layers"]["q"], 0.98**2, rtol=1e-6)
    assert (out[1]["layers"]["norm"] == 1).all() and (out[1]["b"] == 1).all()


def test_learning_rates_by_path():
    """A leaf at scale 0.1 moves a tenth, decay included; unmatched leaves move as before."""
    w0 = {"policy": jnp.ones((2, 2)), "value": jnp.ones((2, 2))}
    g = [jax.tree.map(lambda x: 0.5 * x, w0)]
    o = dict(lr=0.1, schedule="constant", weight_decay=0.2)
    plain, scaled = walk(Optim(**o), g, w0)[0], walk(Optim(**o, lr_scale=(("value", 0.1),)), g, w0)[0]
    np.testing.assert_allclose(1 - scaled["value"], 0.1 * (1 - plain["value"]), rtol=1e-4)
    np.testing.assert_array_equal(scaled["policy"], plain["policy"])


def test_freezing_by_path():
    train = tree.flat(optim.trainable(Optim(freeze=("^embed", "layers/(q|k)$")), SHAPES))
    assert {n for n, x in train.items() if not x} == {"embed", "layers/q", "layers/k"}
    a, b = tree.split(SHAPES, optim.trainable(Optim(freeze=("^embed",)), SHAPES))
    assert list(b) == ["embed"] and "embed" not in a and jax.tree.structure(tree.merge(a, b)) == jax.tree.structure(SHAPES)


@pytest.mark.parametrize("field", ["freeze", "lr_scale", "decay"])
def test_patterns_must_match_once(field):
    give = lambda *names: Optim(**{field: tuple((n, 0.5) for n in names) if field == "lr_scale" else names}, weight_decay=0.1)
    use = (lambda o: optim.trainable(o, SHAPES)) if field == "freeze" else (lambda o: optim.make(o, 10, SHAPES))
    with pytest.raises(UserError, match="'lm_head' matches no parameter"):
        use(give("lm_head"))
    with pytest.raises(UserError, match="'layers/q' is matched by 'layers' and by 'q\\$'"):
        use(give("layers", "q$"))
    use(give("layers/q", "gate"))


@pytest.mark.parametrize(
    "wrong, message",
    [(dict(lr=float("nan")), "optim.lr must be a finite number"), (dict(weight_decay=-1.0), "weight_decay"), (dict(max_grad_norm=0.0), "max_grad_norm must be > 0"), (dict(schedule="cosin"), "'cosin' is unknown"), (dict(name="adam"), "'adam' is unknown")],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Optim(**wrong)


@pytest.mark.parametrize("name", ["adamw", "adam_tf", "lion", "rmsprop"])
def test_moments_are_sharded_like_their_parameters(name):
    """On data 2 x fsdp 2 x tensor 2: every leaf of the optimizer's state that has a parameter's shape lies like it."""
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = shard.init(decoder.specs(CONFIG), jax.random.key(0), mesh)
    tx, _ = optim.make(Optim(name=name, weight_decay=0.1, lr_scale=(("embed", 0.5),)), 10, params)
    averages = Objective(None, init_aux=lambda p: jax.tree.map(jnp.zeros_like, p))
    s = state.create(params, tx, averages, 0, mesh)
    moments = [x for x in jax.tree.leaves(s.opt_state, is_leaf=lambda x: isinstance(x, dict)) if isinstance(x, dict)]
    assert len(moments) == (2 if "adam" in name else 1)
    for m in (*moments, s.aux):
        assert jax.tree.map(lambda x: x.sharding, m) == jax.tree.map(lambda x: x.sharding, params)
        assert m["layers"]["gate"].sharding.spec == P(None, "fsdp", "tensor") and m["layers"]["gate"].addressable_shards[0].data.shape == (2, 4, 6)
    assert s.step.sharding == shard.replicated(mesh) and s.key.sharding.is_fully_replicated


def test_an_average_of_the_params():
    """a <- d a + (1 - d) w from a = w0 on; `averaged` gives it, and training goes on from w."""
    w0 = {"w": jnp.ones((2, 2))}
    o = Optim(name="sgd", lr=0.1, schedule="constant", ema=0.9)
    tx, _ = optim.make(o, 5, w0)
    s = state.create(w0, tx, Objective(lambda *a: None), 0)
    average, w = np.ones((2, 2)), np.ones((2, 2))
    for g in gradients():
        updates, opt = tx.update(g, s.opt_state, s.params)
        s = s.replace(params=jax.tree.map(jnp.add, s.params, updates), opt_state=opt)
        w = w - 0.1 * g["w"]
        average = 0.9 * average + 0.1 * w
    np.testing.assert_allclose(s.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.averaged(s)["w"], average, rtol=1e-5)
    assert optim.make(Optim(name="sgd"), 5, w0)[0] and state.averaged(s.replace(opt_state=optim.make(Optim(name="sgd"), 5, w0)[0].init(w0))) is s.params
    with pytest.raises(UserError, match="optim.ema"):
        Optim(ema=1.0)
