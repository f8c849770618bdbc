"""Writes the dashboards, sloguard-tuning.json and sloguard-serving.json. ``--check`` only checks them."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import serving
import tuning
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

BOARDS = {"sloguard-tuning.json": tuning.board, "sloguard-serving.json": serving.board}


def render(board: Callable[[], dashboard.Dashboard]) -> str:
    """The text of the file, with letters for targets and numbers for panels."""
    built = board().build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    content = json.loads(json.dumps(built, cls=JSONEncoder))
    for panel in content["panels"]:
        for letter, target in zip("ABCDEFGH", panel.get("targets", []), strict=False):
            target["refId"] = letter
    return json.dumps(content, indent=2) + "\n"


def main() -> int:
    """Returns 0 if the files are up to date, or were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args().check
    stale: list[str] = []
    for name, board in BOARDS.items():
        path, text = Path(__file__).with_name(name), render(board)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"{' and '.join(stale)}: stale, run {Path(__file__).name}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
