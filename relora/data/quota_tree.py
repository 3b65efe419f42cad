"""Quotas in closed form: a binary tree of sources, each node of which divides its samples between two branches.

Of a node's first n samples the left branch gets n * w_left / w_node, rounded to the nearest integer. A source's count
is then off its quota by at most (1 + load) / 2 samples, where its load is the sum of w_source / w_node over the nodes
between it and the root, and a load under 1 keeps it under one sample. Four sources always have such a tree.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# The search for the best tree takes time in proportion to the cube of the number of sources.
MOST_TO_SEARCH = 100
SMALLEST_SHARE = 1e-300  # in the search alone, whose floats would otherwise be zero


@dataclass(frozen=True)
class Leaf:
    """One source and its share, as an integer."""

    source: int
    units: int


@dataclass(frozen=True)
class Node:
    """Two branches; units: the sum of theirs."""

    left: "Tree"
    right: "Tree"
    units: int

    def left_of(self, n: int) -> int:
        """How many of the first n samples of this node go left: the nearest integer to the quota, upwards from 1/2."""
        return (2 * n * self.left.units + self.units) // (2 * self.units)


Tree = Leaf | Node


def quota_tree(units: Sequence[int]) -> Tree:
    """The tree with the smallest bound that is found: over all that divide the sorted sources, or Huffman's."""
    leaves = sorted((Leaf(k, unit) for k, unit in enumerate(units)), key=lambda leaf: (-leaf.units, leaf.source))
    candidates = [huffman(leaves)]
    if len(leaves) <= MOST_TO_SEARCH:
        candidates.append(best_division(leaves))
    return min(candidates, key=bound)


def best_division(leaves: Sequence[Leaf]) -> Tree:
    """The tree of the lowest load among those whose branches are neighbours in the order of `leaves`.

    slack[i, j]: the least over the sources of `leaves[i..j]` of 1/w - sum of 1/w_node up to the root of this part; a
    load is under 1 where it stays above 0. The root itself adds no load.
    """
    whole, size = sum(leaf.units for leaf in leaves), len(leaves)
    weight = [max(float(Fraction(leaf.units, whole)), SMALLEST_SHARE) for leaf in leaves]
    ends = [sum(weight[:k]) for k in range(size + 1)]
    slack = {(k, k): 1 / weight[k] for k in range(size)}
    cut: dict[tuple[int, int], int] = {}
    for length in range(2, size + 1):
        for i in range(size - length + 1):
            j = i + length - 1
            most, at = max((min(slack[i, k], slack[k + 1, j]), -k) for k in range(i, j))
            own = 1 / max(ends[j + 1] - ends[i], SMALLEST_SHARE) if length < size else 0.0
            slack[i, j], cut[i, j] = most - own, -at

    def tree(i: int, j: int) -> Tree:
        if i == j:
            return leaves[i]
        left, right = tree(i, cut[i, j]), tree(cut[i, j] + 1, j)
        return Node(left, right, left.units + right.units)

    return tree(0, size - 1)


def huffman(leaves: Sequence[Leaf]) -> Tree:
    """Huffman's tree, which joins the two smallest again and again; its load is under 3."""
    waiting: list[tuple[int, int, Tree]] = [(leaf.units, k, leaf) for k, leaf in enumerate(leaves)]
    heapq.heapify(waiting)
    while len(waiting) > 1:
        _, number, right = heapq.heappop(waiting)
        _, _, left = heapq.heappop(waiting)
        node = Node(left, right, left.units + right.units)
        heapq.heappush(waiting, (node.units, number, node))  # a number that nobody else has
    return waiting[0][2]


def bound(tree: Tree) -> Fraction:
    """How far any source's count may be off its quota, in samples, exactly."""

    def load(part: Tree, above: Fraction) -> Fraction:
        if isinstance(part, Leaf):
            return above * part.units
        above += Fraction(1, part.units)
        return max(load(part.left, above), load(part.right, above))

    if isinstance(tree, Leaf):
        return Fraction(0)
    return (1 + max(load(tree.left, Fraction(0)), load(tree.right, Fraction(0)))) / 2


def locate(tree: Tree, i: int) -> tuple[int, int]:
    """Sample i -> (its source, the number of samples before i from that source)."""
    while isinstance(tree, Node):
        before = tree.left_of(i)
        if tree.left_of(i + 1) > before:
            tree, i = tree.left, before
        else:
            tree, i = tree.right, i - before
    return tree.source, i


def counts(tree: Tree, i: int) -> dict[int, int]:
    """Source -> how many of the first i samples are its own."""
    if isinstance(tree, Leaf):
        return {tree.source: i}
    before = tree.left_of(i)
    return counts(tree.left, before) | counts(tree.right, i - before)
