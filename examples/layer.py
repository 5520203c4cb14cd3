"""A layer of a language model as an `nn.Module`, trained on real text: gated, head-routed, grouped queries, a sink, a causal window.

Sentences are packed into one sequence, each a document of its own. A token sees itself and the 31 before it in its sentence; every head
has a sink, so that a token may attend to nothing. Two of eight heads are always on, a router chooses three of the others for each token,
and the rest are not computed. The layer learns to tell the next token's embedding in all-MiniLM-L6-v2's own vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import attncc
from attncc import AttentionSpec, gates, loads, masks, normalizers, routing
from examples.minilm import SENTENCES, load

WINDOW, HEADS, KEY_HEADS, HEAD_DIM, SHARED, TOP_K = 32, 8, 2, 48, 2, 3
SPEC = AttentionSpec(
    tokens=(None,),
    heads=HEADS,
    key_heads=KEY_HEADS,
    head_dim=HEAD_DIM,
    dtype="float32",
    loads=(loads.QKNorm(weights=True), loads.Rotary()),
    mask=masks.Documents(mask=masks.SlidingWindow(left=WINDOW - 1, right=0)),
    normalizer=normalizers.Softmax(sink="per_head"),
    routing=routing.MixtureOfHeads(shared=SHARED, top_k=TOP_K),
    gate=gates.Output(activation="sigmoid"),
)


Documents = dict[str, Tensor]


class GatedRoutedAttention(nn.Module):
    """Attention `[B, N, width]` to `[B, N, width]`; `documents` are the tables of `attncc.document_tables`."""

    def __init__(self, width: int, target: str = "auto") -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(width, heads * HEAD_DIM, bias=False) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        self.gate, self.out = nn.Linear(width, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, width, bias=False)
        self.router = nn.Linear(width, HEADS, bias=False)
        self.sink = nn.Parameter(torch.zeros(HEADS))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(HEAD_DIM)), nn.Parameter(torch.ones(HEAD_DIM))
        self.kernel = attncc.compile(SPEC, target=target)

    def route(self, x: Tensor) -> Tensor:
        """Weights of every head for every token `[B, H, N]`, 0 where a head is not chosen; those of a token sum to 2."""
        logits = self.router(x).float()
        shared, routed = logits[..., :SHARED].softmax(-1), logits[..., SHARED:].softmax(-1)
        chosen = torch.zeros_like(routed).scatter_(-1, routed.topk(TOP_K).indices, 1.0)
        routed = routed * chosen
        return torch.cat([shared, routed / routed.sum(-1, keepdim=True)], -1).transpose(1, 2).contiguous()

    def inputs(self, x: Tensor, documents: Documents) -> dict[str, Any]:
        """What the kernel takes, heads last."""
        by_head = {"q": self.queries(x), "k": self.keys(x), "v": self.values(x), "gate": self.gate(x)}
        tensors = {name: t.unflatten(-1, (-1, HEAD_DIM)) for name, t in by_head.items()}
        tables = {"sink": self.sink, "q_norm": self.q_norm, "k_norm": self.k_norm, "routing": self.route(x)}
        return {**tensors, **tables, **documents}

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """The layer's output, by attncc."""
        rows: Tensor = self.kernel(**self.inputs(x, documents), layout="bshd")
        projected: Tensor = self.out(rows.flatten(2))
        return projected

    def dense(self, x: Tensor, documents: Documents) -> Tensor:
        """The same by the formulas, every pair of tokens, in plain torch."""
        t = {name: y.transpose(1, 2) if y.dim() == 4 else y for name, y in self.inputs(x, documents).items()}
        q, k = (_turned(_normed(t[n]) * t[f"{n}_norm"]) for n in "qk")
        k, v = (y.repeat_interleave(HEADS // KEY_HEADS, 1) for y in (k, t["v"]))
        place = torch.arange(x.shape[1])
        behind = place[:, None] - place
        starts = documents["document_starts"]
        keep = (behind >= 0) & (behind < WINDOW) & (starts[:, None, :, None] == starts[:, None, None])
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~keep, -torch.inf)
        sink = t["sink"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        rows = weights @ v * t["routing"][..., None] * t["gate"].sigmoid()
        projected: Tensor = self.out(rows.transpose(1, 2).flatten(2))
        return projected


def _normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _turned(x: Tensor) -> Tensor:
    """Columns i and i + D / 2 as a complex number, times e^(i position theta)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([y.real, y.imag], -1)


def text(sentences: tuple[str, ...] = SENTENCES) -> tuple[Tensor, Documents]:
    """Embeddings `[1, N, width]` of all sentences in one sequence, scaled to variance 1, and the tables that keep them apart."""
    model, tokenizer = load()
    found = [tokenizer(sentence, return_tensors="pt")["input_ids"][0] for sentence in sentences]
    states = model.embeddings.word_embeddings(torch.cat(found)).detach()
    ends = torch.tensor([0, *(len(f) for f in found)]).cumsum(0)
    return (states / states.std())[None], attncc.document_tables(ends, len(states))


def loss(layer: GatedRoutedAttention, x: Tensor, documents: Documents) -> Tensor:
    """1 - cosine of what the layer adds up to and the next token of the same sentence, in the mean."""
    guess = (x + layer(x, documents))[:, :-1]
    starts = documents["document_starts"]
    same = starts[:, 1:] == starts[:, :-1]
    return (1 - nn.functional.cosine_similarity(guess, x[:, 1:], dim=-1))[same].mean()


def train(steps: int = 30, sentences: tuple[str, ...] = SENTENCES) -> dict[str, float]:
    """Figures of a short training: difference from the dense formulas before and after, first and last loss, share of rows computed."""
    torch.manual_seed(0)
    x, documents = text(sentences)
    layer = GatedRoutedAttention(x.shape[-1])
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    before, losses = difference(layer, x, documents), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss(layer, x, documents))
        losses[-1].backward()
        if missing := [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]:
            raise SystemExit(f"no gradient reached {', '.join(missing)}")
        optimizer.step()
    return {
        "tokens": x.shape[1],
        "rows": float((layer.route(x) != 0).float().mean()),
        "before": before,
        "after": difference(layer, x, documents),
        "first": losses[0].item(),
        "last": losses[-1].item(),
    }


@torch.no_grad()
def difference(layer: GatedRoutedAttention, x: Tensor, documents: Documents) -> float:
    """Largest difference from the dense formulas, relative to their largest value."""
    want = layer.dense(x, documents)
    return float((layer(x, documents) - want).abs().max() / want.abs().max())


def table(figures: dict[str, float]) -> Table:
    """The figures for people."""
    shown = Table(title=f"a layer trained on {figures['tokens']:.0f} packed tokens")
    for column in ("", "before training", "after"):
        shown.add_column(column, justify="right" if column else "left")
    shown.add_row("difference from the dense formulas", f"{figures['before']:.1e}", f"{figures['after']:.1e}")
    shown.add_row("loss: 1 - cosine of the next token", f"{figures['first']:.3f}", f"{figures['last']:.3f}")
    shown.add_row("rows of heads that are computed", "", f"{figures['rows']:.1%}")
    return shown


def main() -> None:
    """Trains the layer for a moment and prints its figures."""
    figures = train()
    Console().print(table(figures))
    if max(figures["before"], figures["after"]) > 1e-5:
        raise SystemExit("the layer differs from its dense formulas")


if __name__ == "__main__":
    main()
