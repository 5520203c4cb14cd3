"""All-pairs covering arrays: few rows in which every legal pair of values of any two factors occurs.

Greedy, in the manner of AETG (Cohen, Dalal, Fredman, Patton, IEEE TSE 1997): of several random candidates for a row, the one that covers
most new pairs is kept. Deterministic for a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Factors = Mapping[str, Sequence[str]]
Row = dict[str, str]
Legal = Callable[[Mapping[str, str]], bool]
Pair = frozenset[tuple[str, str]]


def covering_array(
    factors: Factors, legal: Legal = lambda row: True, seed: int = 0, candidates: int = 20, begun: Sequence[Row] = ()
) -> list[Row]:
    """Rows that cover every legal pair.

    Args:
        factors: values by factor.
        legal: whether a row, or a part of one, may occur; a legal part must always have a legal completion.
        seed: of the candidates.
        candidates: tried for each row.
        begun: rows that stand already, and come first.
    """
    generator = random.Random(seed)
    # A dict, not a set: it is drawn from, and the order of sets of text changes from process to process.
    missing = dict.fromkeys(pairs(factors, legal))
    rows = list(begun)
    for pair in [pair for row in rows for pair in pairs_of(row)]:
        missing.pop(pair, None)
    while missing:
        tried = [_candidate(factors, legal, missing, generator) for _ in range(candidates)]
        best = max(tried, key=lambda row: sum(pair in missing for pair in pairs_of(row)))
        for pair in pairs_of(best):
            missing.pop(pair, None)
        rows.append(best)
    return rows


def pairs(factors: Factors, legal: Legal = lambda row: True) -> list[Pair]:
    """Every legal pair of values of two factors."""
    found = []
    for a, b in combinations(factors, 2):
        found += [frozenset({(a, x), (b, y)}) for x in factors[a] for y in factors[b] if legal({a: x, b: y})]
    return found


def pairs_of(row: Row) -> list[Pair]:
    """Pairs that a row covers."""
    return list(map(frozenset, combinations(row.items(), 2)))


def _candidate(factors: Factors, legal: Legal, missing: Mapping[Pair, None], generator: random.Random) -> Row:
    """A row around one missing pair; the other factors, in random order, take the value that covers most."""
    row = dict(sorted(generator.choice(list(missing))))
    rest = [name for name in factors if name not in row]
    generator.shuffle(rest)
    for name in rest:
        options = [value for value in factors[name] if legal({**row, name: value})]
        generator.shuffle(options)
        gains = [sum(frozenset({(name, value), item}) in missing for item in row.items()) for value in options]
        row[name] = options[gains.index(max(gains))]
    return {name: row[name] for name in factors}
