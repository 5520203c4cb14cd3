"""Faults of the compiler: expressions, passes, printers."""

from __future__ import annotations

from tests.faults.runner import Fault

OPS, AXIS, TREE = "attncc/ir/ops.py", "attncc/passes/axis_tiles.py", "attncc/passes/box_tree.py"
CANONICAL, VISIT, KERNEL = "attncc/passes/canonicalize.py", "attncc/codegen/visit.py", "attncc/codegen/kernel.py"
MASKS = "tests/passes/test_block_mask.py::test_hard_masks"
BRUTE = "tests/passes/test_block_mask.py::test_block_mask_is_brute_force"
GENERATED = "tests/interpreter/test_hard.py::test_hard_specs"
ROUTING, GATHERED = "attncc/codegen/routing.py", "tests/interpreter/test_routing.py"
UNREAD = "tests/interpreter/test_hard.py::test_tiles_that_no_row_may_see_are_not_read"
ROWS = "attncc/codegen/row_state.py"
ORACLE = "tests/runtime/test_kernels.py::test_equals_the_oracle_in_float64"

COMPILER: tuple[Fault, ...] = (
    Fault("ops: a difference bounded as if it rose in both", OPS, "a - b, _crossed", "a - b, _monotone", (MASKS,)),
    Fault(
        "ops: any remainder spans one period",
        OPS,
        "one_period = (a[0] // b[0]).equals(a[1] // b[0])",
        "one_period = const(True)",
        (MASKS,),
    ),
    Fault("ops: tanh's derivative", OPS, "(const(1.0) - n * n,)", "(const(1.0) - n,)", (ORACLE,)),
    Fault(
        "masks: the leader of an even stride",
        "attncc/spec/masks/windows.py",
        "group + stride // 2",
        "group + (stride - 1) // 2",
        (BRUTE,),
    ),
    Fault("masks: bottom-right alignment forgotten", "attncc/spec/masks/base.py", "query + grid.offset if", "query if", (MASKS, ORACLE)),
    Fault("canonicalize: < solved as <=", CANONICAL, "right - 1 if term.op is Op.LT else right", "right", (MASKS,)),
    Fault(
        "canonicalize: the tail mask dropped",
        CANONICAL,
        'last = class_length("k", axis, graph) - 1',
        'last = class_length("k", axis, graph) + 63',
        (MASKS, GENERATED),
    ),
    Fault("axis tiles: partial called full", AXIS, "-(-low_max // k_tile)", "low_max // k_tile", (BRUTE,)),
    Fault("axis tiles: the last tile dropped", AXIS, "high_max // k_tile + 1", "high_max // k_tile", (BRUTE,)),
    Fault("box tree: partial called full", TREE, "return partial, exact[all_true]", "return partial, exact[any_true]", (BRUTE,)),
    Fault("box tree: samples trusted too far", TREE, "open_ = ~(some & ~every)", "open_ = some", (BRUTE,)),
    Fault(
        "visit: the mask of partial tiles dropped",
        VISIT,
        "s = tl.where(allowed, s, float",
        "s = tl.where(lane >= 0, s, float",
        (GENERATED,),
    ),
    Fault("visit: a lost rescale", VISIT, "acc{0} * rescale[:, None]", "acc{0}", (GENERATED,)),
    Fault("visit: a row without keys becomes NaN", VISIT, "pivot} if PARTIAL else m_new", "'m_new'}", (GENERATED,)),
    Fault("visit: any sign of the scale fused", VISIT, "and self.facts.scale > 0", "", (GENERATED,)),
    Fault("rows: the order of the LSE", ROWS, "(m + tl.log2(l)) * {LN2}", "m + tl.log2(l) * {LN2}", (GENERATED,)),
    Fault("kernel: rows past the grid widen its ranges", KERNEL, 'f"tl.minimum(q{axis}, {grid.last(length)})"', 'f"q{axis}"', (UNREAD,)),
    Fault(
        "expressions: truncating // and %",
        "attncc/codegen/expressions.py",
        "return proved(const(0) <= numerator) and proved(const(0) < divisor)",
        "return True",
        (GENERATED,),
    ),
    Fault(
        "launcher: a shared gate read with the stride of heads",
        "attncc/codegen/launcher.py",
        "{gate}.expand(-1, {facts.heads[0]}, -1, -1)",
        "{gate}",
        (GENERATED,),
    ),
    Fault("rows: a sink that no row starts with", ROWS, 'f"tl.full([{rows}], 1.0, tl.float32)"', "zeros", (GENERATED,)),
    Fault("rows: a sink in base e", ROWS, "code(facts.sink * LOG2E,", "code(facts.sink,", (GENERATED,)),
    Fault("rows: one key's value for the heads of another", ROWS, 'kv_head(facts, "v")', 'kv_head(facts, "k")', (GENERATED,)),
    Fault("rows: a divisor of one row for all", ROWS, 'index = "[:, None]" if', 'index = "[None, :1]" if', (GENERATED,)),
    Fault(
        "footprint: the values of keys that a mask needs, free",
        "attncc/passes/footprint.py",
        "max(0, len(keys) - 2)",
        "0",
        ("tests/aot/test_footprint.py::test_what_a_mask_computes_takes_registers",),
    ),
    Fault("visit: keys of partial tiles counted as if allowed", VISIT, "tl.where(allowed, {ones}, 0.0)", "{ones}", (GENERATED,)),
    Fault(
        "visit: the greatest weight for their sum",
        VISIT,
        "l += tl.sum(p.to(tl.float32), 1)",
        "l += tl.max(p.to(tl.float32), 1)",
        (GENERATED,),
    ),
    Fault("rows: a ratio of nothing", ROWS, 'f"tl.maximum(l, {TINY!r})"', '"l"', (GENERATED,)),
    Fault("rows: epsilon in its log", ROWS, "apply(Op.EXP, facts.sink)", "facts.sink", (GENERATED,)),
    Fault("kernel: softplus without its tail", KERNEL, "tl.where(rounded == 1.0, e, ", "tl.where(rounded == 1.0, 0.0, ", (GENERATED,)),
    Fault(
        "normalizers: a position from zero",
        "attncc/spec/normalizers.py",
        'grid.flat("q") + grid.offset + 1, 1)',
        'grid.flat("q") + grid.offset, 1)',
        (ORACLE,),
    ),
    Fault(
        "normalizers: any weight taken for a positive one",
        "attncc/spec/normalizers.py",
        "or low.value < 0",
        "or False",
        ("tests/runtime/test_normalizers.py::test_bad_fields_are_refused_by_name",),
    ),
    Fault("visit: values not scaled", VISIT, '[f"p *= {self._pair(scale)}  # spec: token_scales"]', "[]", (GENERATED,)),
    Fault(
        "lower: a sink's key without the scale of the query",
        "attncc/spec/lower.py",
        "sink = sink * spec.scale_reads",
        "sink = sink + 0.0 * spec.scale_reads",
        (ORACLE, GENERATED),
    ),
    Fault("kernel: the first of packed logits for every head", KERNEL, "(h % {share})", "(h % 1)", (GENERATED,)),
    Fault("kernel: a logit head for every query head", KERNEL, '"h" if share == 1 else', '"h" if share else', (GENERATED,)),
    Fault(
        "facts: packed rows taken for narrow ones",
        "attncc/codegen/facts.py",
        "[1] == 1 < self.value_width",
        "[1] <= self.value_width",
        (GENERATED,),
    ),
    Fault(
        "normalizers: the length of the queries",
        "attncc/spec/normalizers.py",
        'keys = apply(Op.FLOAT, grid.tokens("k"))',
        'keys = apply(Op.FLOAT, grid.tokens("q"))',
        ("tests/runtime/test_random.py::test_float64_forward_and_backward",),
    ),
    Fault(
        "facts: padded columns counted as real",
        "attncc/codegen/facts.py",
        "return self.valid < self.width",
        "return False",
        (GENERATED,),
    ),
    Fault(
        "loads: partners of a norm with the factors of their neighbours",
        "attncc/codegen/loads.py",
        "tl.load({self.weight(side)} + partner{index}",
        "tl.load({self.weight(side)} + column{index}",
        (GENERATED,),
    ),
    Fault("loads: pairs turned backward", "attncc/codegen/loads.py", "-y{index}, y{index})", "y{index}, -y{index})", (GENERATED,)),
    Fault(
        "routing: a head's last tile lost",
        ROUTING,
        'tiles = f"tl.cdiv(count, {facts.q_rows})"',
        'tiles = f"(count // {facts.q_rows})"',
        (f"{GATHERED}::test_who_is_routed",),
    ),
    Fault(
        "routing: rows of the first batch element for all",
        ROUTING,
        'start = f"(b * {facts.heads[0]} + h).to',
        'start = f"(b * 0 + h).to',
        (f"{GATHERED}::test_who_is_routed",),
    ),
    Fault(
        "routing: results of rows that no program computes",
        ROUTING,
        'return ["out.zero_()"]',
        'return ["pass"]',
        (f"{GATHERED}::test_who_is_routed", f"{GATHERED}::test_heads_that_are_off_and_scaled"),
    ),
    Fault(
        "routing: an additive gate forgotten where no head is",
        ROUTING,
        'if all(gate["value"].op is Op.MUL for',
        'if any(gate["value"].op is not Op.LOAD for',
        (f"{GATHERED}::test_rows_of_no_head_are_gated",),
    ),
    Fault(
        "routing: what is not kept written over the first row",
        ROUTING,
        "torch.where(kept, kept.cumsum(2) - 1, {tokens})",
        "torch.where(kept, kept.cumsum(2) - 1, 0)",
        (f"{GATHERED}::test_who_is_routed",),
    ),
    Fault(
        "routing: printed, inner axes of a box not wrapped",
        "attncc/codegen/visit.py",
        'f"first{axis} + {index} % count{axis}"',
        'f"first{axis} + {index}"',
        (f"{GATHERED}::test_masks_whose_tiles_are_listed_elsewhere",),
    ),
    Fault(
        "routing: printed, a box without its last tile",
        "attncc/codegen/kernel.py",
        "tl.maximum({last} // {n} + 1 - first{a}, 0)",
        "tl.maximum({last} // {n} - first{a}, 0)",
        (f"{GATHERED}::test_masks_whose_tiles_are_listed_elsewhere",),
    ),
    Fault(
        "routing: printed, the gate before the weights",
        KERNEL,
        "*self.routing.weighed(), *self._gated(chunk)]",
        "*self._gated(chunk), *self.routing.weighed()]",
        (f"{GATHERED}::test_rows_of_no_head_are_gated",),
    ),
)
