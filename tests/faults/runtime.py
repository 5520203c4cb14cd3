"""Faults of the runtime: the cache, tile lists, ops and inputs."""

from __future__ import annotations

from tests.faults.runner import Fault

CACHE, LISTS, OPS = "attncc/runtime/cache.py", "attncc/runtime/lists.py", "attncc/runtime/ops.py"
EVERY_TILE = "tests/runtime/test_lists.py::test_no_tile_is_lost_and_none_called_full_that_is_not"
ORACLE = "tests/runtime/test_kernels.py::test_equals_the_oracle_in_float64"
BLOCKED, TESTS = "attncc/runtime/blocked", "tests/runtime/test_blocked.py"
CITIZEN = "tests/runtime/test_citizenship.py"
RANDOM = "tests/runtime/test_random.py::test_float64_forward_and_backward"

RUNTIME: tuple[Fault, ...] = (
    Fault(
        "runtime: a stale cache key, without the code that prints",
        CACHE,
        "json.dumps([plan.digest, VERSION, printer_digest()])",
        "json.dumps([plan.digest, VERSION])",
        ("tests/runtime/test_cache.py::test_the_key_changes_with_whatever_changes_the_text",),
    ),
    Fault(
        "runtime: a file that was tampered with is run",
        CACHE,
        'if head.decode(errors="replace") != _MARK + hashlib.sha256(body).hexdigest():',
        'if not head.decode(errors="replace").startswith(_MARK):',
        ("tests/runtime/test_cache.py::test_a_file_that_is_not_what_was_written_is_refused",),
    ),
    Fault(
        "runtime: a failed write leaves its half",
        CACHE,
        "        os.unlink(name)\n",
        "        pass\n",
        (
            "tests/runtime/test_cache.py::test_a_directory_that_cannot_be_used",
            "tests/runtime/test_cache.py::test_an_interrupted_write_leaves_no_entry",
        ),
    ),
    Fault(
        "runtime: a partial candidate called full",
        LISTS,
        "full = surely & some & (self.found.kinds == 2)",
        "full = surely & some",
        (EVERY_TILE,),
    ),
    Fault(
        "runtime: a possible tile dropped",
        LISTS,
        "some = possibly & (self.found.kinds > 0)",
        "some = surely & (self.found.kinds > 0)",
        (EVERY_TILE,),
    ),
    Fault(
        "runtime: a batch element reads another's lists",
        LISTS,
        "return Lists(*lists, heads * rows if batch > 1 else 0",
        "return Lists(*lists, rows if batch > 1 else 0",
        (EVERY_TILE,),
    ),
    Fault(
        "runtime: the gradient of the log-sum-exp dropped",
        OPS,
        "torch.ops.attncc.backward(grad, grad_lse, q, k, v,",
        "torch.ops.attncc.backward(grad, None, q, k, v,",
        (ORACLE, "tests/runtime/test_ops.py::test_lse_alone_differentiates"),
    ),
    Fault(
        "runtime: the gated output saved for the rows before the gate",
        OPS,
        "rows if after else out, lse",
        "out, lse",
        (ORACLE,),
    ),
    Fault(
        "runtime: a gradient given to the wrong extra",
        OPS,
        "by_extra = [next(given) if wanted else None for wanted in trained]",
        "by_extra = [next(given, None) for _ in trained]",
        ("tests/runtime/test_ops.py::test_only_a_table_is_trained",),
    ),
    Fault(
        "runtime: heads-last tensors read as heads first",
        "attncc/runtime/inputs.py",
        'return x.transpose(1, 2) if layout == "bshd" else x',
        "return x",
        ("tests/runtime/test_kernels.py::test_layout_heads_last",),
    ),
    Fault(
        "runtime: a pinned plan's ranges believed",
        "attncc/pipeline.py",
        'theirs.block_mask == "ranges" and ours.block_mask != "ranges"',
        'theirs.block_mask == "none"',
        ("tests/runtime/test_kernels.py::test_a_plan_that_says_something_else_is_refused",),
    ),
    Fault(
        "blocked: keys that fill up a tile count",
        f"{BLOCKED}/tiles.py",
        "allowed = mask.allowed(self._where(columns, heads)) & valid",
        "allowed = mask.allowed(self._where(columns, heads)) & torch.ones_like(valid)",
        (RANDOM,),
    ),
    Fault(
        "blocked: key tiles of every residue class taken for those of the first",
        f"{BLOCKED}/listed.py",
        "tiles[mine[0] : mine[-1]] + residue * prod(tiling.k_tiles)",
        "tiles[mine[0] : mine[-1]] + 0 * residue",
        (RANDOM,),
    ),
    Fault(
        "blocked: one head's bias added to all",
        f"{BLOCKED}/strips.py",
        "shape = (self.strip.heads, self.strip.rest,",
        "shape = (self.strip.rest,",
        (RANDOM,),
    ),
    Fault(
        "blocked: NaN masked by adding to it",
        f"{BLOCKED}/block.py",
        "if rules.finite and value == -math.inf:",
        "if value == -math.inf:",
        (f"{TESTS}::test_what_is_no_number_stays_in_the_rows_that_see_it",),
    ),
    Fault(
        "blocked: every score called small",
        f"{BLOCKED}/attention.py",
        "bound <= SAFE_SCORE",
        "bound > 0",
        (f"{TESTS}::test_scores_beyond_the_bound_take_the_running_maximum",),
    ),
    Fault(
        "blocked: the host waits for the norms of a device",
        f"{BLOCKED}/attention.py",
        "if host_reads(q.device) and problem.plans:",
        "if problem.plans:",
        (f"{TESTS}::test_on_a_device_the_host_never_waits",),
    ),
    Fault("sinks: their value without their weight", f"{BLOCKED}/sinks.py", "_share(self.value, joined) * self.v", "self.v", (ORACLE,)),
    Fault(
        "sinks: the gradient of the log-sum-exp forgotten",
        f"{BLOCKED}/sinks.py",
        "by_logit = by_logit + grad_lse[..., None]",
        "pass",
        (ORACLE, RANDOM),
    ),
    Fault(
        "sinks: one key head's gradient given to another",
        f"{BLOCKED}/sinks.py",
        "by_head.view(like.shape[0], -1, like.shape[1]).sum(1)",
        "by_head.view(-1, *like.shape).sum(0)",
        (ORACLE,),
    ),
    Fault(
        "blocked: a small sink alone in its row overflows",
        f"{BLOCKED}/block.py",
        "torch.exp(-lse.clamp(min=-SAFE_SCORE))",
        "torch.exp(-lse)",
        ("tests/runtime/test_normalizers.py::test_a_row_with_a_sink_alone",),
    ),
    Fault(
        "blocked: masked keys counted",
        f"{BLOCKED}/block.py",
        "count -= (mask < 0).sum(-1, keepdim=True)",
        "pass",
        (ORACLE, RANDOM),
    ),
    Fault(
        "blocked: a divisor left out of gradients",
        f"{BLOCKED}/__init__.py",
        "by_row = divided(kernel.graph, operands, grad)",
        "by_row = grad",
        (ORACLE, RANDOM),
    ),
    Fault(
        "blocked: tasks that share a key head add at once",
        f"{BLOCKED}/attention.py",
        "group = math.lcm(*(",
        "group = max(*(",
        (f"{TESTS}::test_tasks_that_share_a_key_or_a_value_head_take_turns",),
    ),
    Fault(
        "autocast: a kernel's own products are cast",
        "attncc/runtime/ops.py",
        "    with autocast.off(q.device):\n        return",
        "    if True:\n        return",
        (f"{CITIZEN}::test_autocast_does_not_touch_what_a_kernel_computes",),
    ),
    Fault(
        "autocast: products of the backward pass are cast",
        "attncc/runtime/ops.py",
        "    with autocast.off(q.device):\n        dq",
        "    if True:\n        dq",
        (f"{CITIZEN}::test_autocast_does_not_touch_what_a_kernel_computes",),
    ),
    Fault(
        "autocast: tables of other types pass",
        "attncc/runtime/autocast.py",
        "return x.to(dtypes[0])",
        "return x",
        (f"{CITIZEN}::test_autocast_casts_the_call_to_the_spec",),
    ),
)
