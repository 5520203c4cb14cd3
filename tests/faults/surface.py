"""Faults of what people touch: bounds, specs from text, the command line, FlexAttention export."""

from __future__ import annotations

from tests.faults.runner import Fault

BOUNDS, FLAT, FLEX = "attncc/simulator/bounds.py", "attncc/passes/flat_blocks.py", "attncc/integrations/flex.py"
BRUTE = "tests/test_simulate.py::test_counts_are_brute_force"
FLAT_BRUTE = "tests/test_flex_export.py::test_flat_blocks_are_brute_force"
FORBIDDEN = "tests/test_cli.py::test_forbidden_predicates"
SEARCH = "tests/simulator/test_search.py"
HTML, PAGE = "attncc/simulator/html", "tests/simulator/test_html.py"
IMPORT = "tests/test_flex_import.py"
ORACLE = "tests/runtime/test_kernels.py::test_equals_the_oracle_in_float64"
IMPOSSIBLE = "tests/test_targets.py::test_impossible_files_are_refused"

SURFACE: tuple[Fault, ...] = (
    Fault(
        "simulate: the dilated grid as the baseline",
        BOUNDS,
        "undilated = (1,) * tiling.rank",
        "undilated = tiling.mask.order",
        ("tests/test_simulate.py::test_dilated_tiles_never_cross_a_class",),
    ),
    Fault(
        "simulate: heads added up, not averaged",
        BOUNDS,
        "total // instances if total % instances == 0 else",
        "total if instances else",
        (BRUTE, "tests/test_simulate.py::test_heads_are_averaged"),
    ),
    Fault("flat blocks: keys past the end forgotten", FLAT, "every &= ~key[2]", "pass", (FLAT_BRUTE,)),
    Fault(
        "flat blocks: a run cut one token late",
        FLAT,
        "-(-first // unit) * unit, stop)",
        "-(-first // unit) * unit + 1, stop)",
        (FLAT_BRUTE,),
    ),
    Fault(
        "flex: blocks by key left in the order of queries",
        FLEX,
        "np.lexsort((row, column, instance))",
        "np.arange(len(row))",
        ("tests/test_flex_export.py::test_block_mask_is_that_of_create_block_mask",),
    ),
    Fault(
        "flex: coordinates of the last axis not reduced",
        FLEX,
        "inner % grid[a] if a else inner",
        "inner",
        ("tests/test_flex_export.py::test_mask_mod_is_the_oracle_mask",),
    ),
    Fault(
        "predicates: division by zero let through",
        "attncc/spec/masks/text.py",
        "n.args[1] is const(0)",
        "n.args[1] is const(1)",
        (FORBIDDEN,),
    ),
    Fault(
        "specs: a depth nobody limits",
        "attncc/spec/checks.py",
        "depth(formula) > DEEPEST",
        "depth(formula) > 10**9",
        (FORBIDDEN,),
    ),
    Fault(
        "specs: YAML aliases expanded",
        "attncc/spec/reading.py",
        "isinstance(event, yaml.AliasEvent)",
        "isinstance(event, str)",
        ("tests/test_cli.py::test_bad_texts",),
    ),
    Fault(
        "targets: units not checked",
        "attncc/targets/performance.py",
        "if not low <= value <= high",
        "if not 0 <= value <= math.inf",
        (IMPOSSIBLE,),
    ),
    Fault(
        "targets: a quoted peak may be half of what the rates give",
        "attncc/targets/sheets.py",
        "CLOSE = 0.03",
        "CLOSE = 1.03",
        (IMPOSSIBLE,),
    ),
    Fault(
        "targets: files of one name told apart by their speed only",
        "attncc/targets/registry.py",
        "return replace(record, performance=None)",
        "return replace(record, performance=None, registers=255)",
        ("tests/test_targets.py::test_the_name_of_a_file",),
    ),
    Fault(
        "targets: limits left out of what names a generated file",
        "attncc/passes/plan.py",
        'data["limits"] = ',
        "_ = ",
        ("tests/test_targets.py::test_limits_are_part_of_what_names_a_generated_file",),
    ),
    Fault(
        "search: strides decided by the beginning of an axis",
        "attncc/simulator/search.py",
        "found.sums[0] == found.sums[1]",
        "found.sums[0] >= found.sums[1]",
        (f"{SEARCH}::test_smallest_strides_are_brute_force",),
    ),
    Fault(
        "search: residue classes of one length",
        "attncc/simulator/many.py",
        "classes = [by_length[n] for n in lengths]",
        "classes = [by_length[lengths[0]] for n in lengths]",
        (f"{SEARCH}::test_many_are_as_one",),
    ),
    Fault(
        "search: blocks given to slots that are not free yet",
        "attncc/simulator/machine.py",
        "taken[:, 1:] &= free[:, 1:] <= np.minimum.accumulate(done, axis=1)[:, :-1]",
        "pass",
        (f"{SEARCH}::test_queues_are_scheduled_alike",),
    ),
    Fault(
        "search: the front keeps what is beaten",
        "attncc/simulator/search.py",
        "if not kept or r.sparsity < kept[-1][1].sparsity",
        "if not kept or r.sparsity <= kept[-1][1].sparsity",
        (f"{SEARCH}::test_the_front_is_a_front",),
    ),
    Fault(
        "cli: errors on standard output",
        "attncc/cli/app.py",
        "file=sys.stderr)",
        "file=sys.stdout)",
        ("tests/test_cli.py::test_bad_specs",),
    ),
    Fault(
        "html: names of rows not escaped",
        f"{HTML}/sections.py",
        'row">{escape(first)}</th>{"".join',
        'row">{first}</th>{"".join',
        (f"{PAGE}::test_a_target_of_ones_own_is_text",),
    ),
    Fault(
        "html: four cells of a byte in the wrong order",
        f"{HTML}/cells.py",
        "[0, 2, 4, 6]",
        "[6, 4, 2, 0]",
        (f"{PAGE}::test_cells_are_the_block_mask",),
    ),
    Fault("html: ids of pictures collide", f"{HTML}/drawing.py", "f' id=\"{name}-{m[1]}\"'", "m[0]", (f"{PAGE}::test_ids_are_unique",)),
    Fault(
        "scores: the last of T5's shared buckets lost",
        "attncc/spec/scores.py",
        "for step in range(1, shared):",
        "for step in range(1, shared - 1):",
        (f"{ORACLE}[buckets]", "tests/test_attn_gym.py::test_buckets_of_t5"),
    ),
    Fault(
        "scores: T5's bucket of the query itself among those after it",
        "attncc/spec/scores.py",
        "select(step <= 0, 0, self._side)",
        "select(step < 0, 0, self._side)",
        (f"{ORACLE}[buckets]",),
    ),
    Fault(
        "scores: a power has no gradient by its exponent",
        "attncc/ir/ops.py",
        "node * _call(Op.LOG, a), const(0.0))",
        "const(0.0), const(0.0))",
        (f"{ORACLE}[expression]", "tests/ir/test_derivatives.py::test_sympy_agrees"),
    ),
    Fault(
        "scores: a slope that is infinite where the mask hides it",
        "attncc/runtime/blocked/formulas.py",
        "torch.where(grad == 0, grad, grad * slope) if _open(formula) else grad * slope",
        "grad * slope",
        ("tests/runtime/test_kernels.py::test_what_a_mask_hides_may_be_infinite",),
    ),
    Fault(
        "captured tables: their first entry never read",
        "attncc/spec/masks/text.py",
        "(clamp(i, 0, n - 1) for i, n",
        "(clamp(i, 1, n - 1) for i, n",
        (f"{IMPORT}::test_every_mask_of_attn_gym[flamingo]",),
    ),
    Fault(
        "import: >= read as >",
        "attncc/integrations/traced_functions.py",
        '"ge": _compare(Op.LE, True)',
        '"ge": _compare(Op.LT, True)',
        (f"{IMPORT}::test_short_names_are_read_as_people_write_them", f"{IMPORT}::test_random_mods_give_what_flex_attention_gives"),
    ),
    Fault(
        "import: what is reversed taken as it stands",
        "attncc/integrations/traced_functions.py",
        "name, args = name[1:], args[::-1]",
        "name = name[1:]",
        (f"{IMPORT}::test_short_names_are_read_as_people_write_them",),
    ),
    Fault(
        "import: a captured parameter frozen",
        "attncc/integrations/tracer.py",
        "if x.requires_grad else const(",
        "if False else const(",
        (f"{IMPORT}::test_captured_tensors_keep_their_gradients",),
    ),
    Fault(
        "scores: full tiles never hold -inf",
        "attncc/codegen/facts.py",
        "any(t.values is None for t in tables(*self.maps)) or may_be_infinite(*self.maps)",
        "any(t.values is None for t in tables(*self.maps))",
        ("tests/interpreter/test_hard.py::test_hard_specs",),
    ),
    Fault(
        "simulator: shared heads counted as routed ones",
        "attncc/spec/routing.py",
        "(1.0,) * self.shared + (self.top_k / routed,) * routed",
        "(self.top_k / heads,) * heads",
        ("tests/simulator/test_routing.py::test_a_mixture_costs_its_share",),
    ),
    Fault(
        "simulator: routed rows priced as all of them",
        "attncc/simulator/levels.py",
        'kernel.row_order == "descending", shares)',
        'kernel.row_order == "descending", None)',
        ("tests/simulator/test_routing.py::test_a_mixture_costs_its_share",),
    ),
)
