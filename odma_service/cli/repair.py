"""`odma arena repair`: fresh books with what damaged ones still know. Nothing is deleted.

The damaged file is locked from the first look to the last step, so no server takes it up, sets
it aside or makes another in its place meanwhile. The fresh books are made whole under a name
that a server removes when it starts; one rename then puts them in place. Before it the damaged
file is in its place, after it under the name of one that was set aside.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from odma_service._native import Arena, Part, Salvaged, file_geometry
from odma_service.errors import BooksCorruptError, BooksMismatchError
from odma_service.pool import PoolSpec
from odma_service.pool.books import FileError, attached, failing_in_one_line, lock, opened, read
from odma_service.service.pools.registry import SUFFIX, UNFINISHED

SET_ASIDE = re.compile(rf"(.+{re.escape(SUFFIX)})\.set-aside-\d+")
SPEC_BEGINS = b'{"name":'
LEARNT = {Part.CLASS, Part.HISTOGRAM, Part.COMPLETIONS}
COUNTED = {Part.COMPLETIONS, Part.REGIONS}
NO_REASON_TO_KEEP = {Part.EPOCH, Part.DESCRIPTION}
LONGEST_SPEC_BYTES = 8_192
OWNER = (
    "no epoch is running: every handle of the old books is dead; the owner opens the pool again "
    "and computes its caches anew"
)


class Plan(NamedTuple):
    """Where the fresh books go, and where the damaged ones will be."""

    target: Path
    aside: Path


class Salvage(NamedTuple):
    """What came of damaged books. proven: what was kept is what was committed."""

    parts: list[Salvaged]
    proven: bool
    spec: PoolSpec | None


def repair_command(
    file: Annotated[Path, typer.Argument(help="NAME.pool of a pool directory, or set aside.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be kept; change nothing.")
    ] = False,
    sound: Annotated[
        bool, typer.Option("--sound", help="Make fresh books from sound ones too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make fresh books with what damaged ones still know; keep the damaged file aside.

    Policy, counters and what was learnt are kept as far as they can be; regions never are. The
    owner has to open the pool again. Exit code 1: nothing is left to be kept; 2: not repaired
    because it is in use, sound, of another layout version, or no pool.
    """
    with failing_in_one_line("repair"), opened(file, os.O_RDWR) as descriptor:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise FileError(f"{file}: it belongs to another user")
        lock(file, descriptor)
        content = read(descriptor)
        damage = _damage(file, content)
        if not (damage or sound):
            raise FileError(f"{file}: it is sound, there is nothing to repair; see --sound")
        plan = _plan(file)
        with _fresh_place(plan.target, dry_run=dry_run) as fresh:
            salvage = _salvage(content, fresh, plan.target)
            if not dry_run:
                reason = damage or "it was sound: fresh books were asked for"
                _put_in_place(file, descriptor, fresh, plan, reason)
    if as_json:
        typer.echo(json.dumps(_as_object(file, plan, salvage, damage, dry_run=dry_run)))
    else:
        for line in _lines(file, plan, salvage, damage, dry_run=dry_run):
            typer.echo(line)


def _damage(file: Path, content: bytes) -> str | None:
    """Return what attach has against a file, None if it is sound."""
    try:
        with attached(file, content) as arena:
            arena.check()
    except BooksCorruptError as error:
        return str(error).removeprefix(f"{file}: ")
    return None


def _plan(file: Path) -> Plan:
    was = SET_ASIDE.fullmatch(file.name)
    if was is None:
        number = 1
        while _is_another(file, aside := file.with_name(f"{file.name}.set-aside-{number}")):
            number += 1
        return Plan(file, aside)
    target = file.with_name(was[1])
    if os.path.lexists(target):
        raise FileError(f"{target}: it is there; rename it first if {file.name} is to replace it")
    return Plan(target, file)


def _is_another(file: Path, aside: Path) -> bool:
    """Say whether a name is taken, not by this file: a repair may have died."""
    return os.path.lexists(aside) and not os.path.samestat(aside.lstat(), file.lstat())


# The fresh books


def _salvage(content: bytes, fresh: Path, target: Path) -> Salvage:
    """Make fresh books. Raises FileError for no pool, BooksCorruptError if nothing can be kept."""
    specs = list(_specs(content))
    try:
        geometry, size_told = file_geometry(content), None
        specs = [spec for spec in specs if spec.arena_geometry() == geometry]
    except BooksCorruptError as error:
        if not specs:
            raise FileError(f"{target}: {error}, and nothing in it describes a pool") from None
        geometry, size_told = specs[-1].arena_geometry(), len(content)
    specs.sort(key=lambda spec: spec.name == target.stem)  # of the others the last: the books'
    spec = specs[-1] if specs else None
    with Arena.create(fresh, geometry) as arena:
        if size_told not in {None, fresh.stat().st_size}:
            raise FileError(f"{target}: its header is damaged, and its size is another")
        description = spec.to_json() if spec else None
        parts, proven = arena.salvage(content, description, int(time.time() * 1000))
        arena.check()
    if not any(part.kept for part in parts if part.part not in NO_REASON_TO_KEEP):
        raise BooksCorruptError(f"{target}: nothing in it can be kept; open the pool anew")
    return Salvage(parts, proven, spec)


def _specs(content: bytes) -> Iterator[PoolSpec]:
    """Find what the service wrote down of the pool: in the books, and earlier in a record."""
    at = content.find(SPEC_BEGINS)
    while at >= 0:
        text = content[at : at + LONGEST_SPEC_BYTES].decode(errors="replace")
        with suppress(ValueError, RecursionError, BooksMismatchError):
            _, end = json.JSONDecoder().raw_decode(text)
            yield PoolSpec.from_json(text[:end].encode())
        at = content.find(SPEC_BEGINS, at + 1)


@contextmanager
def _fresh_place(target: Path, *, dry_run: bool) -> Iterator[Path]:
    """Yield a name for books that are not finished; what is left there goes."""
    if dry_run:
        with TemporaryDirectory(prefix="odma-arena-") as directory:
            yield Path(directory) / target.name
        return
    fresh = target.with_name(f"{target.stem}.repair-{os.getpid()}{SUFFIX}{UNFINISHED}")
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def _put_in_place(file: Path, descriptor: int, fresh: Path, plan: Plan, reason: str) -> None:
    """Die at any moment: the damaged file is in its place, or the fresh one and it aside."""
    if plan.target != file:
        os.link(fresh, plan.target)  # unlike a rename it never replaces
        return
    if not os.path.samestat(file.lstat(), os.fstat(descriptor)):
        raise FileError(f"{file}: it was replaced meanwhile")
    with suppress(FileExistsError):  # by a repair that died here
        os.link(file, plan.aside)
    plan.aside.with_name(f"{plan.aside.name}.reason").write_text(reason + "\n")
    fresh.replace(file)


# What is told


def _as_object(
    file: Path, plan: Plan, salvage: Salvage, damage: str | None, *, dry_run: bool
) -> dict[str, Any]:
    return {
        "file": str(file),
        "damage": damage,
        "dry_run": dry_run,
        "fresh": str(plan.target),
        "set_aside": str(plan.aside),
        "pool": salvage.spec and salvage.spec.name,
        "proven": salvage.proven,
        "parts": [{**part._asdict(), "part": part.part.name.lower()} for part in salvage.parts],
    }


def _lines(
    file: Path, plan: Plan, salvage: Salvage, damage: str | None, *, dry_run: bool
) -> Iterator[str]:
    yield f"{file}: {damage or 'sound'}"
    for part in salvage.parts:
        name = part.part.name.lower()
        if part.part in LEARNT:
            name += f" of class {part.request_class!r}"
        if part.kept:
            yield f"kept  {name}" + f", {part.kept:,}" * (part.part in COUNTED)
        if part.lost:
            yield f"lost  {name}" + f", {part.lost:,}" * (part.part in COUNTED) + f": {part.why}"
    if salvage.proven:
        yield "the sum of the books is right: what was kept is what was committed"
    else:
        yield "the sum of the books is wrong: what was kept is what can be, not what is proven"
    if salvage.spec is None:
        yield "nothing says whose pool it is: a server will not serve it, an engine of its own can"
    yield OWNER
    if dry_run:
        yield f"dry run: nothing was changed, and {plan.target} was not made"
    else:
        yield f"fresh books: {plan.target}; the old file: {plan.aside}"
