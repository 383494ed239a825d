"""Names, selection by regex, the split into trainable and frozen."""

import jax
import numpy as np
import pytest
from jaxalign import tree
from jaxalign.types import UserError

PARAMS = {"embed": np.ones((3, 2)), "layers": {"attn": {"q": np.ones(4), "k": np.ones(5)}, "mlp": np.ones(6)}}


def test_names_and_round_trip():
    assert list(tree.flat(PARAMS)) == ["embed", "layers/attn/k", "layers/attn/q", "layers/mlp"]
    assert jax.tree.structure(tree.unflat(tree.flat(PARAMS))) == jax.tree.structure(PARAMS)
    assert tree.size(PARAMS) == 6 + 4 + 5 + 6
    got = tree.map_named(lambda n, x, y: (n, x.size + y), PARAMS, jax.tree.map(lambda _: 1, PARAMS))
    assert got["layers"]["attn"]["q"] == ("layers/attn/q", 5)


def test_select():
    got = tree.select(PARAMS, (("attn/", "a"), ("^embed$", "e")), "rest")
    assert got == {"embed": "e", "layers": {"attn": {"q": "a", "k": "a"}, "mlp": "rest"}}


def test_select_refuses_patterns_that_match_nothing_or_twice():
    with pytest.raises(UserError, match="'atn' matches no parameter; the names are: embed, layers/attn/k"):
        tree.select(PARAMS, (("atn", 1),), 0)
    with pytest.raises(UserError, match="'layers/attn/q' is matched by 'attn/q' and by 'q\\$'"):
        tree.select(PARAMS, (("attn/q", 1), ("q$", 2)), 0)


@pytest.mark.parametrize("pattern", ["attn", "embed", "."])
def test_split_and_merge(pattern):
    mask = tree.select(PARAMS, ((pattern, True),), False)
    trainable, frozen = tree.split(PARAMS, mask)
    assert set(tree.flat(trainable)) == {k for k, v in tree.flat(mask).items() if v}
    assert not set(tree.flat(trainable)) & set(tree.flat(frozen))
    jax.tree.map(np.testing.assert_array_equal, tree.merge(trainable, frozen), PARAMS)
