"""Counting a compiled program from its text: against shapes worked out by hand, loops unrolled, and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxalign import shard
from jaxalign.plan import hlo

M, D, L = 24, 16, 5


def text(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def abstract(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def layers(unroll):
    return lambda x, w: jax.lax.scan(lambda h, a: (jnp.tanh(h @ a), None), x, w, unroll=unroll)[0]


@pytest.mark.parametrize("unroll", [1, L])
def test_a_loop_counts_as_often_as_it_runs(unroll):
    """L products of [M,D] and [D,D]: 2 M D D each, whether XLA sees a loop or not."""
    got = hlo.cost(text(layers(unroll), abstract(M, D), abstract(L, D, D)))
    assert got.flops == 2 * M * D * D * L


def test_against_xlas_own_count_where_there_is_no_loop():
    f = lambda x, w, v: jnp.einsum("bmd,bde->bme", jnp.tanh(jnp.einsum("bmd,df->bmf", x, w)), v).sum()
    args = abstract(3, M, D), abstract(D, 2 * D), abstract(3, 2 * D, 7)
    exe = jax.jit(f).lower(*args).compile()
    mine, xla = hlo.cost(exe.as_text()), exe.cost_analysis()
    products = 2 * 3 * M * D * 2 * D + 2 * 3 * M * 2 * D * 7
    assert mine.flops == products
    # XLA counts the tanh and the sum as well, a few per element; and it knows of no traffic that we do not.
    assert products <= xla["flops"] <= products + 4 * 3 * M * (2 * D + 7)
    assert 0.5 < mine.bytes / xla["bytes accessed"] < 2


def test_nested_loops_and_a_loop_without_a_known_end():
    def f(x, w):
        twice = lambda h, a: (jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ a), h), None)
        h = jax.lax.scan(twice, x, w)[0]
        return jax.lax.while_loop(lambda h: jnp.abs(h).sum() > 1, lambda h: h @ w[0], h)

    t = text(f, abstract(M, D), abstract(L, D, D))
    one = 2 * M * D * D
    assert hlo.cost(t).flops == one * (3 * L + 1)
    assert hlo.cost(t, unknown=9).flops == one * (3 * L + 9)


def test_collectives_inside_loops():
    mesh = shard.make_mesh({"data": 1, "fsdp": 4}, jax.devices()[:4])

    def each(x, w):
        def body(h, a):
            whole = jax.lax.all_gather(a, "fsdp", axis=0, tiled=True)
            return jax.lax.psum(jnp.tanh(h @ whole), "fsdp"), None

        return jax.lax.scan(body, x, w)[0]

    f = jax.shard_map(each, mesh=mesh, in_specs=(P(), P(None, "fsdp")), out_specs=P(), check_vma=False)
    x = abstract(M, D, sharding=NamedSharding(mesh, P()))
    w = abstract(L, D, D, sharding=NamedSharding(mesh, P(None, "fsdp")))
    got = hlo.cost(text(f, x, w))
    assert got.by_kind() == {"all-gather": (L, 4.0 * D * D * L), "all-reduce": (L, 4.0 * M * D * L)}
    assert got.flops == 2 * M * D * D * L


def test_a_slice_is_no_read_of_the_whole():
    """A scan reads its weights once, however many layers: L slices of [D,D], never L times [L,D,D]."""
    got = hlo.cost(text(layers(1), abstract(M, D), abstract(64, D, D)))
    weights = 64 * D * D * 4
    assert weights <= got.bytes < 8 * weights + 64 * 8 * M * D * 4


# As a TPU's compiler writes it: no trip count, a counter that grows by two, a comparison in a fusion, a product as a
# convolution, and operands in on-chip memory, S(1).
TPU = """HloModule jit_f, is_scheduled=true

%fused_lt (param_0: s32[], param_1: s32[]) -> pred[] {
  %param_0 = s32[]{:T(128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%param_0, %param_1), direction=LT
}

%cond (p: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(13)
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %test = pred[]{:T(512)} fusion(%i, %limit), kind=kLoop, calls=%fused_lt
}

%body (q: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %q = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %h = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%q), index=1
  %sent = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%h), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %got = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%sent)
  %product = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} convolution(%h, %got), dim_labels=bf_oi->bf
  %next = s32[]{:T(128)} add(%j, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %product)
}

ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %here = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %begin = s32[]{:T(128)} constant(3)
  %start = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) tuple(%begin, %here)
  %loop = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) while(%start), condition=%cond, body=%body
  %result = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
  ROOT %back = bf16[8,64]{1,0:T(8,128)(2,1)} copy(%result)
}
"""


def test_as_a_tpu_writes_it():
    """From 3 below 13 by 2: 5 times. The product has 64 terms for each of 8 x 8; main memory is touched twice, in and out."""
    got = hlo.cost(TPU)
    assert got.by_kind() == {"collective-permute": (5, 5 * 8 * 64 * 2)}
    assert got.bytes == 2 * 8 * 64 * 2
    assert got.flops == 5 * 2 * 8 * 64 * 64


FUSED = """HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (a: f32[8,64]) -> f32[2,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[8,64]{1,0} all-reduce(%a), channel_id=1, replica_groups=mesh['x'=4] {'x'}, to_apply=%add
  ROOT %mine = f32[2,64]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,64}
}

%begins (a.1: f32[2,64]) -> (f32[2,64], f32[8,64]) {
  %a.1 = f32[2,64]{1,0} parameter(0)
  %gathered = f32[8,64]{1,0} all-gather(%a.1), channel_id=2, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
  ROOT %s = (f32[2,64]{1,0}, f32[8,64]{1,0}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a.2: f32[2,64]) -> f32[8,64] {
  %a.2 = f32[2,64]{1,0} parameter(0)
  ROOT %again = f32[8,64]{1,0} all-gather(%a.2), channel_id=2, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %part = f32[2,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[2,64]{1,0}, f32[8,64]{1,0}) fusion(%part), kind=kCustom, calls=%begins
  %g = f32[2,64]{1,0} get-tuple-element(%start), index=0
  ROOT %end = f32[8,64]{1,0} fusion(%g), kind=kCustom, calls=%async_collective_fusion.1
}
"""


def test_collectives_in_a_tpus_fusions():
    """A reduction of which each keeps a piece is a reduce-scatter; one gather that runs on beside a product is one gather."""
    got = hlo.cost(FUSED)
    assert got.collectives == {("reduce-scatter", "mesh['x'=4] {'x'}"): (1, 2048.0), ("all-gather", "mesh['x'=4] {'x'}"): (1, 2048.0)}


@pytest.mark.parametrize("case", [dict(batch=3, m=5, k=7, n=4), dict(batch=1, m=2, k=3, n=2)])
def test_a_batched_product_written_as_a_dilated_convolution(case):
    """Only the taps that meet a number count: batch x m x k x n multiply-adds, not batch squared."""
    b, m, k, n = case.values()
    op = hlo.Op("c", "convolution", (hlo.Array("f32", (b, m, n)),), ("x", "y"), f", window={{size={b} stride={max(b - 1, 1)} lhs_dilate={b}}}, dim_labels=0bf_0io->0bf")
    assert hlo._convolution(op, hlo.Array("f32", (b, m, k)), hlo.Array("f32", (b, k, n))) == pytest.approx(2 * b * m * k * n)


def test_pieces_of_a_roofline():
    """Two instructions, one bound by arithmetic and one by memory: each takes its own longer time."""
    cost = hlo.Cost()
    cost.add(hlo.Cost(10.0, 1.0, pieces=[(1, 10.0, 1.0)]), 3)
    cost.add(hlo.Cost(0.0, 8.0, pieces=[(1, 0.0, 8.0)]))
    assert cost.seconds(peak=1.0, bandwidth=1.0) == 3 * 10 + 8
    assert np.isclose(cost.flops, 30)
