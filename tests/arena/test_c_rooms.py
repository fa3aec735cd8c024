"""How csrc is built: one file that includes the others, bottom to top, and no way up.

Internal functions are static and none is declared before it is defined, so the compiler refuses
a file that uses one from above. What it cannot see is looked at here: the public functions,
which odma.h declares ahead of all.
"""

from __future__ import annotations

import re

import pytest
from paths import CSRC

WHOLE = (CSRC / "odma.c").read_text()
LISTED = re.findall(r'^#include "(.*\.c)"$', WHOLE, re.MULTILINE)
NO_DECLARATION = ("_Static_assert", "void ODMA_STORE_HOOK")
DOORS = ["arena/read.c", "arena/change.c"]


def code(name):
    """Return a file without comments and strings."""
    text = re.sub(r"/\*.*?\*/", "", (CSRC / name).read_text(), flags=re.DOTALL)
    return re.sub(r'"[^"\n]*"', '""', text)


def public_functions(name):
    return set(re.findall(r"^\w[\w *]*\b(odma_\w+)\([^;{]*\{", code(name), re.MULTILINE))


def files_that_call(function):
    return {name for name in LISTED if re.search(rf"(?<![\w>.]){function}\(", code(name))}


def test_every_file_is_in_the_list_once():
    there = {str(path.relative_to(CSRC)) for path in CSRC.rglob("*.c")}
    assert sorted(LISTED) == sorted(there - {"odma.c"})


@pytest.mark.parametrize("name", [*LISTED, "arena/arena.h", "lpddr/lpddr.h"])
def test_nothing_is_declared_before_it_is_defined(name):
    declared = re.findall(r"^\w[\w *]*\([^;{}]*\)\s*;", code(name), re.MULTILINE)
    assert [one for one in declared if not one.startswith(NO_DECLARATION)] == []
    assert '#include "' not in re.sub(r'#include "\.\./odma\w*\.h"', "", (CSRC / name).read_text())


@pytest.mark.parametrize("name", LISTED)
def test_a_public_function_is_used_only_from_above_it(name):
    above = LISTED[LISTED.index(name) :]
    for function in public_functions(name):
        assert files_that_call(function) <= set(above), function


def test_only_doors_take_the_lock():
    assert files_that_call("enter") == {"arena/base.c", *DOORS}


def test_reading_commits_nothing():
    commits = files_that_call("commit") | files_that_call("commit_batch")
    assert commits == {"arena/record.c", "arena/file.c", "arena/change.c"}


def test_doors_stand_above_all_else_of_their_room():
    room = [name for name in LISTED if name.startswith("arena/")]
    assert [name for name in room if name != "arena/limits.c"][-2:] == DOORS
