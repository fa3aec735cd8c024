"""The search of tests/robustness/fencing_model.py finds H3 and H4 in the old way, none in the new.

Printed with -s: the number of states of each search, and the ways to the harms.
"""

from __future__ import annotations

import pytest
from fencing_model import (
    CLOSED_TOO,
    LEAKED,
    REFUSED,
    REVIVED,
    RULES,
    SHARED,
    TAKEN,
    UNCOPIED,
    Frame,
    search,
)

NOTHING = frozenset()

# What came late, or went wrong, in the old way: the frame, and what came of it.
FAULTS = {
    "late Reconcile": (Frame(new=False, late=frozenset({"Reconcile"})), TAKEN),
    "late Reconcile, a place twice": (Frame(new=False, late=frozenset({"Reconcile"})), SHARED),
    "late Allocate": (Frame(new=False, late=frozenset({"Allocate"})), LEAKED),
    "late Free": (Frame(new=False, late=frozenset({"Free"})), TAKEN),
    "late OpenPool": (Frame(new=False, late=frozenset({"OpenPool"})), REVIVED),
    "late ClosePool": (Frame(new=False, late=frozenset({"ClosePool"})), TAKEN),
    "late Apply": (Frame(new=False, late=frozenset({"Apply"})), REFUSED),
    "two processes": (Frame(new=False, steps=(2, 1), second="same", late=NOTHING), TAKEN),
    "late take_over": (
        Frame(new=False, steps=(1, 1), second="other", late=frozenset({"OpenPool"})),
        TAKEN,
    ),
    "late OpenPool that was refused": (
        Frame(new=False, steps=(2, 1), second="polite", late=frozenset({"OpenPool"})),
        REVIVED,
    ),
    "lost answer": (Frame(new=False, late=NOTHING), UNCOPIED),
}

# Of the new way: what is visited whole.
ENGINES = frozenset({"Allocate", "Apply", "Free", "Reconcile", "reopen", "give up"})
FRAMES = {
    "one process": Frame(new=True, steps=(5, 0)),
    "one process, refused at first": Frame(new=True, steps=(4, 0), limited=True),
    "two processes with one open_id": Frame(new=True, steps=(2, 2), second="same"),
    "two processes, the second takes over": Frame(new=True, steps=(2, 2), second="other"),
    "two processes, the second only asks": Frame(new=True, steps=(3, 2), second="polite"),
    # An engine of the old way that closes or opens is not told apart from a wanted one.
    "the first is of the old way": Frame(
        new=True, steps=(2, 2), second="same", first_is_old=True, choices=ENGINES
    ),
}

# Where the loss of a rule shows.
NEEDED = {
    "smaller owner": Frame(new=True, steps=(2, 1), second="same"),
    "smaller number": Frame(new=True, steps=(3, 0)),
    "same number": Frame(new=True, steps=(3, 0)),
    "refused number": Frame(new=True, steps=(3, 0), limited=True),
    "same commit": Frame(new=True, steps=(3, 0)),
    "new try": Frame(new=True, steps=(3, 0)),
    "succeeded instance": Frame(new=True, steps=(2, 1), second="same"),
    "refused try": Frame(new=True, steps=(2, 2), second="polite"),
    "outlives the epoch": Frame(new=True, steps=(3, 0)),
    "no fingerprint": Frame(new=True, steps=(3, 0)),
    "unfenced": FRAMES["the first is of the old way"],
    "promise": Frame(new=True, steps=(2, 1), second="same"),
}


def told(found):
    for harm, way in found.ways.items():
        print(f"{harm}:", *way, sep="\n    ")
    print(f"{found.states:,} states")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_old_way_has(fault):
    frame, harm = FAULTS[fault]
    found = search(frame._replace(harms=(harm,)), first=True)
    told(found)
    assert harm in found.ways


@pytest.mark.parametrize("name", FRAMES)
def test_the_new_way_has_no_harm_with(name):
    found = search(FRAMES[name])
    told(found)
    assert found.states > 10_000
    assert found.ways == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_new_way_is_without(fault):
    found = search(FAULTS[fault][0]._replace(new=True))
    assert found.ways == {}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_is_needed(rule):
    found = search(NEEDED[rule]._replace(rules=RULES - {rule}), first=True)
    told(found)
    assert found.ways


def test_who_never_was_answered_may_still_become_the_owner():
    """A limit: the service cannot know that an instance it never met is the older one.

    The successor is told FENCED and stops; no place is given out twice.
    """
    frame = Frame(new=True, steps=(1, 1), second="same", answered_first=False)
    assert REFUSED in search(frame._replace(harms=(REFUSED,))).ways
    assert search(frame._replace(harms=(SHARED, UNCOPIED))).ways == {}


@pytest.mark.parametrize("second", ["same", "other", "polite"])
def test_who_closed_the_pool_may_still_become_the_owner_after_another(second):
    """A limit: an instance that closed its pool may open it after another had it.

    So its OpenPool, under way while it is closed and opened by another, ends the other's
    epoch or opens the pool again. If it stayed out then, too, there would be no harm.
    """
    frame = Frame(new=True, steps=(2, 1), second=second, opens_after_closing=True)
    assert search(frame).ways
    assert search(frame._replace(rules=RULES | {CLOSED_TOO})).ways == {}
