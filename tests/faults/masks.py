"""Faults of the masks' formulas and of what they refuse."""

from __future__ import annotations

from tests.faults.runner import Fault

WINDOWS, TOKENS, LABELS = "attncc/spec/masks/windows.py", "attncc/spec/masks/tokens.py", "attncc/spec/masks/labels.py"
COMBINE, BASE = "attncc/spec/masks/combine.py", "attncc/spec/masks/base.py"
TESTS = "tests/spec/test_masks.py"
WORKED, REFUSED = f"{TESTS}::test_worked_examples", f"{TESTS}::test_what_is_refused"
PADDING, PADDED = "attncc/spec/padding.py", "tests/runtime/test_kernels.py::test_the_reference_equals_the_oracle"
DOCUMENTS = "tests/runtime/test_documents.py"
LISTS = "tests/runtime/test_lists.py::test_no_tile_is_lost_and_none_called_full_that_is_not"

MASKS: tuple[Fault, ...] = (
    Fault("masks: a window's right end left out", WINDOWS, "[key <= query + right]", "[key < query + right]", (WORKED,)),
    Fault(
        "masks: cells shifted the other way",
        WINDOWS,
        "(grid.coordinate(side, axis) - shift) // size",
        "(grid.coordinate(side, axis) + shift) // size",
        (f"{TESTS}::test_a_shift_is_rolling_with_a_mask_of_regions",),
    ),
    Fault(
        "masks: a congruence of neighbours",
        WINDOWS,
        '(grid.coordinate("q", a) % n).equals(grid.coordinate("k", a) % n)',
        '(grid.coordinate("q", a) // n).equals(grid.coordinate("k", a) // n)',
        (WORKED,),
    ),
    Fault("masks: a halo one key too wide", WINDOWS, "start + (block + halo - 1)", "start + (block + halo)", (WORKED,)),
    Fault("masks: discs with their rim", WINDOWS, "(distance < self.radius**2)", "(distance <= self.radius**2)", (WORKED,)),
    Fault(
        "masks: the box around a disc too small",
        WINDOWS,
        "(query - (self.radius - 1) <= key)",
        "(query - (self.radius - 2) <= key)",
        (f"{TESTS}::test_keys_of_whole_discs",),
    ),
    Fault("masks: lines along the wrong axes", WINDOWS, "if a != along", "if a == along", (WORKED,)),
    Fault(
        "masks: sizes that do not divide let through", WINDOWS, "for side, a, n, length in pairs if length % n]",
        "for side, a, n, length in pairs if length < n]", (REFUSED, f"{TESTS}::test_lengths_given_at_run_time_are_held_to_the_edge"),
    ),
    Fault("masks: an edge policy nobody has, accepted", BASE, "return [] if edge in supported else", "return [] if edge else", (REFUSED,)),
    Fault(
        "padding: windows counted as if none were cut",
        BASE,
        "prod(size for _, size in boxes) - inside",
        "const(prod(size for _, size in boxes))",
        (PADDED,),
    ),
    Fault(
        "padding: cells that start a shift too early",
        WINDOWS,
        'self._cell(grid, "q", a, n, s) * n + s, n)',
        'self._cell(grid, "q", a, n, s) * n, n)',
        (PADDED,),
    ),
    Fault(
        "padding: score maps forgotten",
        PADDING,
        "for each in spec.scores:\n        score =",
        "for each in ():\n        score =",
        (PADDED,),
    ),
    Fault("padding: two policies taken for one", PADDING, "len(policies) > 1", "len(policies) > 2", (REFUSED,)),
    Fault(
        "rows: the padded token's value in rows that miss no key",
        "attncc/codegen/row_state.py",
        "f'l[:, None] * {value}' if may_be_infinite(facts.sink) else value",
        "value",
        ("tests/interpreter/test_hard.py::test_hard_specs",),
    ),
    Fault(
        "masks: strided blocks by query head where key heads decide",
        TOKENS,
        'var("h") // self.group * self.head_step',
        'var("h") * self.head_step',
        (f"{TESTS}::test_strided_blocks_by_hand",),
    ),
    Fault(
        "masks: the prefix of another sample",
        TOKENS,
        'load(Table(self.lengths, Kind.INT, ("B",)), var("b"))',
        'load(Table(self.lengths, Kind.INT, ("B",)), const(0))',
        (f"{TESTS}::test_prefixes_by_sample",),
    ),
    Fault(
        "masks: global tokens that are seen but do not see",
        TOKENS,
        "return (query < (self.count or 0)) | (key < (self.count or 0))",
        "return key < (self.count or 0)",
        (WORKED,),
    ),
    Fault(
        "masks: the last block of a table forgotten",
        LABELS,
        "count = -(-(length or 1) // size)",
        "count = (length or 1) // size",
        (f"{TESTS}::test_tables_of_blocks",),
    ),
    Fault(
        "masks: heads of a group between its first and last",
        COMBINE,
        "lambda pair: pair[1] - pair[0]",
        "lambda pair: 0",
        (f"{TESTS}::test_heads_with_masks_of_their_own",),
    ),
    Fault(
        "masks: documents that see one another",
        COMBINE,
        'return (first <= grid.flat("k")) & (grid.flat("k") < last) & substitute',
        "return substitute",
        (f"{TESTS}::test_documents_restart",),
    ),
    Fault(
        "masks: a whole document's positions",
        COMBINE,
        '"k0": grid.flat("k") - first',
        '"k0": grid.flat("k")',
        (f"{TESTS}::test_documents_restart",),
    ),
    Fault(
        "documents: padding that begins at the first key",
        "attncc/runtime/documents.py",
        "zip(names, (1, 0), (beyond, 0))",
        "zip(names, (1, 0), (0, 0))",
        (f"{DOCUMENTS}::test_tables_of_a_packing",),
    ),
    Fault(
        "documents: tokens of a document's end in the one before",
        "attncc/runtime/documents.py",
        "torch.searchsorted(bounds, at, right=True)",
        "torch.searchsorted(bounds, at)",
        (f"{DOCUMENTS}::test_a_packing_is_its_documents",),
    ),
    Fault(
        "documents: every batch element packed as the first",
        "attncc/runtime/blocked/banded.py",
        "(range(b * heads, (b + 1) * heads), b, 0) for b",
        "(range(b * heads, (b + 1) * heads), 0, 0) for b",
        (f"{DOCUMENTS}::test_a_packing_for_each_batch_element",),
    ),
    Fault(
        "canonicalize: what a sum takes away, added",
        "attncc/passes/canonicalize.py",
        "sign if total.op is Op.ADD else -sign)",
        "sign)",
        (f"{DOCUMENTS}::test_a_packing_is_its_documents",),
    ),
    Fault(
        "canonicalize: a table of a band is no input",
        "attncc/passes/canonicalize.py",
        "for expression in (residual, *(end for band in bands for end in band))",
        "for expression in (residual,)",
        (f"{DOCUMENTS}::test_tables_of_documents_are_inputs",),
    ),
    Fault(
        "block mask: full tiles of a band listed twice",
        "attncc/passes/block_mask.py",
        "tile += np.where(tile >= full_first[at], (full_stop - full_first)[at], 0)",
        "pass",
        ("tests/passes/test_block_mask.py::test_hard_masks",),
    ),
    Fault(
        "tiles: a hull narrower than what tables may hold",
        "attncc/passes/tiles.py",
        "return low[0], high[1]",
        "return low[1], high[0]",
        (LISTS,),
    ),
    Fault(
        "concatenation: every grid of keys at the first one's place",
        COMBINE,
        'own |= _coordinates(side, token - first,',
        'own |= _coordinates(side, token,',
        (f"{TESTS}::test_two_words_and_a_picture", f"{TESTS}::test_pooled_and_reference_keys"),
    ),
    Fault(
        "concatenation: a grid that does not end",
        COMBINE,
        "inside += [token < stop] if stop <",
        "inside += [token <= stop] if stop <",
        (f"{TESTS}::test_two_words_and_a_picture",),
    ),
    Fault(
        "concatenation: coordinates that do not wrap",
        COMBINE,
        'found[f"{side}{a}"] = index % n if a else index',
        'found[f"{side}{a}"] = index',
        (f"{TESTS}::test_a_rule_within_a_concatenation_is_that_rule_alone",),
    ),
    Fault(
        "lists: ranges of tables shorter than a tile",
        "attncc/runtime/lists.py",
        "longest = max(*self.kernel.q_tile, *self.kernel.k_tile) * mask.order[0] if",
        "longest = 2 if",
        (LISTS,),
    ),
    Fault(
        "values: the first half of a range looked at twice",
        "attncc/ir/values.py",
        "last[(*before, slice(step, None))])",
        "last[(*before, slice(None, -step))])",
        (LISTS,),
    ),
    Fault(
        "intervals: of a table's row only the ends looked at",
        "attncc/ir/intervals.py",
        "args[other][1] - args[other][0] <= 1",
        "args[other][1] - args[other][0] <= 2",
        (LISTS,),
    ),
)  # fmt: skip
