"""`attncc cache`: the folder of generated files."""

from __future__ import annotations

from typing import Any

from attncc import knobs
from attncc.cli.shared import Json, console, print_json


def path(as_json: Json = False) -> None:
    """Prints the folder (`ATTNCC_CACHE_DIR` chooses another)."""
    folder = str(knobs.current().cache_dir)
    if as_json:
        print_json({"path": folder})
    else:
        print(folder)


def info(as_json: Json = False) -> None:
    """Lists the generated files in the folder, with their sizes."""
    data = cache_info()
    if as_json:
        print_json(data)
        return
    from rich.table import Table

    table = Table(title=f"{data['path']}: {len(data['entries'])} files, {data['bytes']:,} bytes", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for entry in data["entries"]:
        table.add_row(entry["file"], f"{entry['bytes']:,}")
    console().print(table)


def cache_info() -> dict[str, Any]:
    """Folder and entries of the cache."""
    from attncc.runtime import cache

    found = [(path.name, path.stat().st_size) for path in cache.entries()]
    entries = [{"file": name, "bytes": size} for name, size in found]
    return {"path": str(knobs.current().cache_dir), "entries": entries, "bytes": sum(size for _, size in found)}


def clear(as_json: Json = False) -> None:
    """Deletes every generated file in the folder; they are printed again when they are needed."""
    from attncc.runtime import cache

    count = cache.clear()
    if as_json:
        print_json({"path": str(knobs.current().cache_dir), "deleted": count})
    else:
        print(f"{count} files deleted")
