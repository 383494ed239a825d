"""Trees by path: names, regex selection, and the split into trainable and frozen leaves."""

from __future__ import annotations

import re
from typing import Any, Callable

import jax

from jaxalign.types import Tree, UserError


def name(path) -> str:
    """A key path as 'layers/attn/q'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_named(f: Callable, tree: Tree, *rest: Tree, is_leaf=None) -> Tree:
    """`tree.map` whose function also gets the leaf's name: f(name, leaf, *others)."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: f(name(p), *x), tree, *rest, is_leaf=is_leaf)


def flat(tree: Tree, is_leaf=None) -> dict[str, Any]:
    """{name: leaf} in tree order."""
    return {name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def unflat(leaves: dict[str, Any]) -> dict:
    """The inverse of `flat` for nested dicts."""
    out: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = leaf
    return out


def select(tree: Tree, rules: tuple[tuple[str, Any], ...], default: Any) -> Tree:
    """A tree of the values of the one rule whose regex is found in each leaf's name; `default` where none is.

    Raises UserError for a pattern that matches nothing and for a leaf that two patterns match.
    """
    used = set()

    def pick(path, _):
        hits = [i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)]
        if len(hits) > 1:
            raise UserError(f"parameter {path!r} is matched by {rules[hits[0]][0]!r} and by {rules[hits[1]][0]!r}; make one of them narrower")
        used.update(hits)
        return rules[hits[0]][1] if hits else default

    out = map_named(pick, tree)
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise UserError(f"pattern {pattern!r} matches no parameter; the names are: {', '.join(flat(tree))}")
    return out


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """(trainable, frozen): the same nested dicts with the other side's leaves taken out. `mask` leaves are bool."""
    leaves, chosen = flat(tree), flat(mask)
    return (unflat({k: v for k, v in leaves.items() if chosen[k]}), unflat({k: v for k, v in leaves.items() if not chosen[k]}))


def merge(a: Tree, b: Tree) -> Tree:
    """The union of two nested dicts with disjoint leaves: the inverse of `split`."""
    return unflat({**flat(a), **flat(b)})


def size(tree: Tree) -> int:
    """How many numbers the tree holds."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))
