"""Published figures: every record is whole, counts agree or say why not, and masks count what their systems count."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import seeds
from benchmarks.seeds import COUNTS, Levels, Row, Seed

RECORDS = seeds.read()
BY_NAME = {seed.name: seed for seed in RECORDS}
SLOW = "CLEAR, FLUX 8K"
COMPUTED = [seed for seed in RECORDS if seed.spec is not None and not seed.name.startswith(SLOW)]


def test_records_are_named_once_and_sourced() -> None:
    assert len(BY_NAME) == len(RECORDS)
    assert [seed.name for seed in RECORDS if not (seed.source.strip() and seed.claim.strip())] == []


@pytest.mark.parametrize("seed", [s for s in COMPUTED if s.unit in COUNTS], ids=lambda s: s.name)
def test_counts_agree_or_say_why(seed: Seed) -> None:
    assert seeds.row(seed).agrees or seed.why


def test_speedups_that_differ_say_why() -> None:
    wrong = [seed.name for seed in COMPUTED if seed.unit == "attention speedup" and seeds.row(seed).agrees == bool(seed.why)]
    assert wrong == []


def test_end_to_end_without_a_share_says_so() -> None:
    assert [s.name for s in RECORDS if s.unit == "end to end" and s.attention_share is None and not s.why] == []


def test_a_record_without_a_spec_says_why() -> None:
    with pytest.raises(ValueError, match="a record has a spec and a figure, or a gap"):
        Seed(name="a", source="b", claim="c", figure=None, unit="none", spec=None)


def test_amdahl() -> None:
    assert seeds.amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert seeds.needed_share(4 / 3, 2.0) == pytest.approx(0.5)
    assert seeds.needed_share(3.0, 2.0) is None


def test_differences_of_sparsity_are_of_what_is_left() -> None:
    seed = BY_NAME["Re-ttention, tokens kept"].model_copy(update={"figure": 0.98})
    assert Row(seed, Levels(25.0, 25.0, None), 0.96, None).difference == pytest.approx(1.0)


# ---- masks, counted again from the systems' own rules ----------------------------------------------------------------------------


def flop_bound(name: str) -> float:
    return seeds.levels(BY_NAME[name]).flop


@pytest.mark.parametrize("radius", [8, 16, 32])
def test_clear_counts_a_disc_and_the_text(radius: int) -> None:
    y, x = np.divmod(np.arange(4096), 64)
    disc = int(((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2).sum())
    assert flop_bound(f"CLEAR, FLUX 1024², r={radius}") == pytest.approx(4608**2 / (disc + 2 * 512 * 4096 + 512**2), rel=1e-12)


def test_moba_counts_the_chosen_blocks() -> None:
    """Blocks are chosen at random, as many as MoBA's rule takes: the nearest ones, which the record has, are as many in every row."""
    tokens, block, most = 8192, 512, 3
    pairs, chosen = 0, np.random.default_rng(0)
    for q in range(tokens):
        own = q // block
        others = len(set(chosen.permutation(own)[: most - 1]))
        pairs += q - own * block + 1 + others * block
    assert flop_bound("MoBA, 8K training, sparsity") == pytest.approx(tokens**2 / pairs, rel=1e-12)


def test_s2_counts_local_and_strided_blocks() -> None:
    block, local, stride, tokens, heads = 64, 32, 8, 8192, 32
    q, k = np.indices((tokens // block,) * 2)
    blocks = sum(int(((k <= q) & ((q - k < local) | ((k + h) % stride == 0))).sum()) for h in range(heads)) / heads
    pairs = blocks * block**2 - tokens * (block - 1) / 2  # the upper triangles of blocks on the diagonal
    assert flop_bound("S2-Attention, README example, pairs") == pytest.approx(tokens * (tokens + 1) / 2 / pairs, rel=1e-12)


def radial_tiles(tokens: int, width: float, tile: int = 128) -> int:
    """Tiles of a pair of frames that Radial Attention keeps of a band: most of their columns lie in it for over a third of the rows."""
    a = np.arange(tokens)
    inside: npt.NDArray[np.bool_] = np.abs(a[:, None] - a) <= width
    rows = inside.reshape(tokens // tile, tile, tokens // tile, tile).sum(1)
    dense, touched = (rows > tile / 3).sum(-1), (rows > 0).sum(-1)
    return int((dense > 0.6 * touched).sum())


@pytest.mark.parametrize(
    ("name", "frames", "decay", "sink"),
    [("HunyuanVideo, 500 frames", 126, 0.95, False), ("HunyuanVideo, 117 frames", 30, 0.95, False), ("Wan, 69 frames", 18, 0.2, True)],
)
def test_radial_keeps_the_tiles_of_its_rule(name: str, frames: int, decay: float, sink: bool) -> None:
    tokens, kept = 3840, 0
    every = (tokens // 128) ** 2
    of_width: dict[float, int] = {}
    for distance in range(frames):
        room = (1 << tokens.bit_length()) / 2 ** distance.bit_length()
        width = max(room * decay, 128)
        tiles = every if distance <= 1 else of_width.setdefault(width, radial_tiles(tokens, width))
        tiles *= room >= 128 or distance % int(128 / room) == 0
        pairs = frames if distance == 0 else 2 * (frames - distance)
        kept += pairs * tiles + (every - tiles if sink and distance else 0)
    found = seeds.levels(BY_NAME[f"Radial, {name}, inference"])
    assert found.flop == pytest.approx(frames**2 * every / kept, rel=1e-12)
    assert found.tile == pytest.approx(found.flop, rel=1e-12)
