"""`python -m docs.vocabulary [FOLDER]`: writes spec.md and pictures/ there (default: docs)."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.vocabulary.examples import MASKS
from docs.vocabulary.page import page, picture_name
from docs.vocabulary.pictures import draw_mask


def main(folder: Path) -> None:
    """Writes the page and its pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for example in MASKS:
        draw_mask(example, folder / "pictures" / picture_name(example))
    (folder / "spec.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
