"""Print the oldest versions of packages that pyproject.toml allows, as pip wants them.

    python tools/oldest.py [EXTRA ...] [--only NAME,NAME,...]

All dependencies, those of the extras named, and of the extra dev those that --only names.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?(>=|==)(?P<version>[\w.]+)(,.*)?")


def oldest(requirement: str) -> tuple[str, str]:
    """Return the name and the pin of a requirement."""
    found = REQUIREMENT.fullmatch(requirement)
    if not found:
        raise SystemExit(f"{requirement!r} has no lower bound")
    return found["name"], f"{found['name']}=={found['version']}"


def main(arguments: list[str]) -> None:
    only = arguments.pop(arguments.index("--only") + 1).split(",") if "--only" in arguments else []
    extras = [argument for argument in arguments if argument != "--only"]
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    print(*(pin for _, pin in map(oldest, wanted)), sep="\n")
    print(*(pin for name, pin in map(oldest, optional["dev"]) if name in only), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
