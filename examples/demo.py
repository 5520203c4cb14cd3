"""All examples, one after the other; leaves the generated kernel, its plan, a picture of the mask and a page in build/demo."""

from __future__ import annotations

from rich.console import Console

from attncc import simulate
from attncc.simulator.html import page
from examples import hunyuan, layer, minilm


def main() -> None:
    """Runs everything and says where the files are."""
    console = Console()
    console.rule("a sentence model on real text")
    with console.status("embedding sentences"):
        rows = minilm.compare()
    console.print(minilm.table(rows))
    if any(row.get("difference", 0.0) > 1e-5 for row in rows):
        raise SystemExit("the embeddings differ from the model's own")
    console.rule("a layer of a language model, trained")
    layer.main()
    console.rule("a video grid with neighborhood attention")
    hunyuan.main(hunyuan.FOLDER)
    picture_and_page()
    console.rule("files")
    for path in sorted(hunyuan.FOLDER.iterdir()):
        console.print(f"  {path}")


def picture_and_page() -> None:
    """The mask and the block mask of the video grid, and the page that `attncc report` writes."""
    report = simulate(hunyuan.VIDEO, "h100", hunyuan.TILE, hunyuan.TILE)
    report.plot(hunyuan.FOLDER / "mask.png")
    (hunyuan.FOLDER / "report.html").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
