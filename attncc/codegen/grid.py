"""Prints tile and token arithmetic: from a tile's index to the coordinates of its tokens, and from coordinates to offsets."""

from __future__ import annotations

from math import prod

from attncc.codegen.facts import Facts
from attncc.passes.tiles import ceildiv


def inner(sizes: tuple[int, ...], axis: int) -> int:
    """Elements spanned by one step on an axis of a row-major box."""
    return prod(sizes[axis + 1 :])


def tile_axis(facts: Facts, side: str, index: str, axis: int) -> str:
    """Tile coordinate on an axis from a flat tile index."""
    count = tile_count(facts, side, axis)
    if count == "1":
        return "0"
    below = product([tile_count(facts, side, a) for a in range(axis + 1, facts.rank)])
    code = index if below == "1" else f"{index} // {below}"
    return code if axis == 0 or _outermost(facts, side, axis) else f"{code} % {count}"


def _outermost(facts: Facts, side: str, axis: int) -> bool:
    return all(tile_count(facts, side, a) == "1" for a in range(axis))


def product(parts: list[str]) -> str:
    """Code for a product: one literal where all factors are."""
    known = prod(int(p) for p in parts if p.isdigit())
    names = [p for p in parts if not p.isdigit()]
    if not names:
        return str(known)
    factors = [*names, *([str(known)] if known > 1 else [])]
    return factors[0] if len(factors) == 1 else f"({' * '.join(factors)})"


def tile_count(facts: Facts, side: str, axis: int) -> str:
    """Tiles on an axis (of the longest class): a literal, or the name of a scalar computed in the kernel."""
    known = (facts.body.query if side == "q" else facts.body.key)[axis]
    if known is None:
        return f"{side}_tiles{axis}"
    tile = facts.plan.q_tile if side == "q" else facts.plan.k_tile
    return str(ceildiv(ceildiv(known, facts.body.order[axis]), tile[axis]))


def tile_count_lines(facts: Facts, side: str) -> list[str]:
    """Computes the tile counts of open axes that flat indices need."""
    lengths = facts.body.query if side == "q" else facts.body.key
    tile = facts.plan.q_tile if side == "q" else facts.plan.k_tile
    return [
        f"{side}_tiles{a} = tl.cdiv({facts.length(side, a)}, {tile[a] * facts.body.order[a]})"
        for a in range(facts.rank)
        if lengths[a] is None and (a > 0 or side == "q")
    ]


def within(sizes: tuple[int, ...], lane: str, axis: int) -> str:
    """Coordinate of a lane inside its tile."""
    step = inner(sizes, axis)
    code = lane if step == 1 else f"{lane} // {step}"
    return code if axis == 0 else f"{code} % {sizes[axis]}"


def scaled(code: str, factor: int) -> str:
    """code * factor, with the parentheses that are needed."""
    if factor == 1 or code == "0":
        return code
    return f"{code} * {factor}" if code.replace("_", "").isalnum() else f"({code}) * {factor}"


def class_length(facts: Facts, side: str, axis: int) -> str:
    """Tokens of an axis in the residue class of this program: a literal, an argument, or a scalar computed in the kernel."""
    return facts.length(side, axis) if facts.body.order[axis] == 1 else f"{side}_size{axis}"


def class_length_lines(facts: Facts, side: str) -> list[str]:
    """Computes the class lengths of axes that are walked in residue classes."""
    order = facts.body.order
    return [f"{side}_size{a} = ({facts.length(side, a)} - r{a} + {order[a] - 1}) // {order[a]}" for a in range(facts.rank) if order[a] > 1]


def last(length: str) -> str:
    """Code of length - 1."""
    return str(int(length) - 1) if length.isdigit() else f"{length} - 1"


def flat_token(facts: Facts, side: str, coordinates: list[str]) -> str:
    """Row-major token index of coordinates on the whole grid."""
    code = coordinates[0]
    for axis in range(1, facts.rank):
        code = f"{code if axis == 1 else f'({code})'} * {facts.length(side, axis)} + {coordinates[axis]}"
    return code


def clamped_token(facts: Facts, side: str, token: str) -> str:
    """A token index that stays in the grid even in a residue class without tokens (an axis shorter than its classes)."""
    return token if prod(facts.body.order) == 1 else f"tl.minimum({token}, {last(tokens(facts, side))})"


def grid_coordinate(facts: Facts, coordinate: str, axis: int) -> str:
    """A coordinate within its class, on the whole grid."""
    classes = facts.body.order[axis]
    return coordinate if classes == 1 else f"({coordinate} * {classes} + r{axis})"


def tokens(facts: Facts, side: str) -> str:
    """Code for the number of tokens."""
    return product([facts.length(side, a) for a in range(facts.rank)])
