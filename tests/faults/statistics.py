"""Faults of plans of two kernels: statistics of rows, and what reads them."""

from __future__ import annotations

from tests.faults.runner import Fault

NORMALIZERS, FUSE, ROOTS = "attncc/spec/normalizers.py", "attncc/passes/fuse.py", "attncc/runtime/blocked/roots.py"
ORACLE = "tests/runtime/test_kernels.py::test_equals_the_oracle_in_float64"
REFERENCE = "tests/runtime/test_kernels.py::test_the_reference_equals_the_oracle"
WAITING = "tests/runtime/test_blocked.py::test_on_a_device_the_host_never_waits"
PLANS, ROWS = "tests/passes/test_plan.py", "tests/runtime/test_normalizers.py"
INTERPRETED = "tests/interpreter/test_statistics.py::test_equals_the_oracle"

STATISTICS: tuple[Fault, ...] = (
    Fault("entmax: the root sought from its wrong side", NORMALIZERS, "SCORE - 1.0, _newton", "SCORE - 0.25, _newton", (ORACLE, REFERENCE)),
    Fault(
        "entmax: steps of another norm",
        NORMALIZERS,
        "_power(norm, power - 1.0) * power",
        "power",
        (f"{ROWS}::test_entmax_finds_its_threshold_for_many_keys",),
    ),
    Fault("entmax: one sweep, whatever is asked", NORMALIZERS, "_newton(power), self.sweeps)", "_newton(power), 1)", (ORACLE,)),
    Fault("lssar: no offset", NORMALIZERS, "share - self.offset,", "share,", (ORACLE, REFERENCE)),
    Fault(
        "lssar: what rounding leaves is weighed",
        NORMALIZERS,
        "const(least) < x, logarithm",
        "const(0.0) < x, logarithm",
        (f"{ROWS}::test_rounding_is_not_weighed",),
    ),
    Fault(
        "fuse: a kernel that does not wait for the statistic it reads",
        FUSE,
        'kept.get(n["name"], n) for',
        "n for",
        (f"{PLANS}::test_fusion_keeps_every_result",),
    ),
    Fault(
        "tile: each kernel in tiles of its own",
        "attncc/passes/tile.py",
        'before=()), main["q_tile"], main["k_tile"])',
        'before=()), (16,) * last["body"].rank, k_tile)',
        (f"{PLANS}::test_kernels_of_a_plan_share_their_tiles",),
    ),
    Fault(
        "tile: the first kernel's registers forgotten",
        "attncc/passes/tile.py",
        "for b in self.before)",
        "for b in ())",
        ("tests/passes/test_tile.py::test_kernels_that_share_a_block_mask_all_fit_its_tiles",),
    ),
    Fault("blocked: a root's gradient that is no share", ROOTS, 'block.rows["grad_lse"] / slopes', 'block.rows["grad_lse"]', (ORACLE,)),
    Fault("blocked: the host looks at a device's roots", ROOTS, "if looks and torch.equal", "if torch.equal", (WAITING,)),
    Fault(
        "blocked: an erased row's threshold is infinite",
        "attncc/runtime/blocked/__init__.py",
        "is None else 0.0",
        "is None else -torch.inf",
        (WAITING,),
    ),
    Fault(
        "runtime: no gradient for what only routes",
        "attncc/runtime/program.py",
        "for name in read & operands.trained}",
        "for name in set[str]()}",
        (ORACLE,),
    ),
    Fault(
        "spec: a table may be called like a statistic",
        "attncc/spec/checks.py",
        " or table.name == kept:",
        ":",
        (f"{ROWS}::test_a_statistic_is_no_input",),
    ),
    Fault(
        "printed: the first sweep is no other",
        "attncc/codegen/row_state.py",
        "tl.where(sweep == 0, ",
        "tl.where(sweep < 0, ",
        (INTERPRETED,),
    ),
    Fault(
        "printed: masked scores take part in the greatest",
        "attncc/codegen/visit.py",
        "self.facts.softmax or self.facts.rooted",
        "self.facts.softmax",
        (INTERPRETED,),
    ),
    Fault(
        "simulate: sweeps for nothing",
        "attncc/simulator/work.py",
        '1.0 + float(reduction(kernel.graph).get("sweeps", 0))',
        "1.0",
        ("tests/simulator/test_time_model.py::test_every_sweep_walks_over_the_keys",),
    ),
    Fault(
        "simulate: only the last kernel is timed",
        "attncc/simulator/levels.py",
        "for each in planned.kernels])",
        "for each in planned.kernels[-1:]])",
        ("tests/simulator/test_time_model.py::test_times_of_two_kernels_add_up",),
    ),
)
