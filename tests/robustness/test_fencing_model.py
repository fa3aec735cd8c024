"""The search of tests/robustness/fencing_model.py finds H3 and H4 in the old way, none in the new.

Printed with -s: the number of states of each search, and the ways to the harms.
"""

from __future__ import annotations

import pytest
from fencing_model import (
    CHANGED,
    KEPT_ALIVE,
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
BLIND = RULES - {"seen"}  # of a client that does not say what it saw

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

# The same of rpcs that are in frames of their own, which stay small so.
UNARY = frozenset({"Allocate", "Extend", "Free", "give up"})
POLICIES = frozenset({"SetPolicy", "Recalibrate", "give up"})
ALIVE = frozenset({"Allocate", "KeepAlive", "ClosePool", "give up"})
STREAMED = frozenset({"Apply", "Stream", "Reconcile", "reopen", "give up"})
OTHER_FAULTS = {
    "late Extend": (
        Frame(new=False, choices=UNARY, late=frozenset({"Extend"})),
        LEAKED,
    ),
    "late SetPolicy": (
        Frame(new=False, choices=POLICIES, late=frozenset({"SetPolicy"})),
        CHANGED,
    ),
    "late Recalibrate": (
        Frame(new=False, choices=POLICIES, late=frozenset({"Recalibrate"})),
        CHANGED,
    ),
    "late KeepAlive": (
        Frame(new=False, choices=ALIVE, steps=(2, 1), second="same", late=frozenset({"KeepAlive"})),
        KEPT_ALIVE,
    ),
}

# Of the new way: what is visited whole.
ENGINES = frozenset({"Allocate", "Apply", "Free", "Reconcile", "reopen", "give up"})
FRAMES = {
    "one process": Frame(new=True, steps=(4, 0)),
    "one process, refused at first": Frame(new=True, steps=(3, 0), limited=True),
    "two processes with one open_id": Frame(new=True, steps=(2, 1), second="same"),
    "two processes, the second takes over": Frame(new=True, steps=(2, 1), second="other"),
    "two processes, the second only asks": Frame(new=True, steps=(2, 1), second="polite"),
    "lone operations": Frame(new=True, steps=(5, 0), choices=UNARY),
    "lone operations, a successor": Frame(new=True, steps=(2, 1), choices=UNARY, second="same"),
    "policies": Frame(new=True, steps=(5, 0), choices=POLICIES),
    "policies, a successor": Frame(new=True, steps=(2, 1), choices=POLICIES, second="same"),
    "signs of life": Frame(new=True, steps=(2, 1), choices=ALIVE, second="same"),
    "streams": Frame(new=True, steps=(4, 0), choices=STREAMED),
    "streams, a successor": Frame(new=True, steps=(2, 1), choices=STREAMED, second="same"),
    "more others than are remembered": Frame(new=True, steps=(3, 0), others=True),
    "more others, and a second that asks": Frame(
        new=True, steps=(2, 1), second="polite", others=True
    ),
    "more others, and a successor": Frame(
        new=True, steps=(2, 1), second="same", others=True, first_dies=True
    ),
    "a client that does not say what it saw": Frame(new=True, steps=(4, 0), rules=BLIND),
    "two of them with one open_id": Frame(new=True, steps=(2, 1), second="same", rules=BLIND),
    "two of them, the second takes over": Frame(
        new=True, steps=(2, 1), second="other", rules=BLIND
    ),
    "two of them, the second only asks": Frame(
        new=True, steps=(2, 1), second="polite", rules=BLIND
    ),
    # An engine of the old way that closes or opens is not told apart from a wanted one.
    "the first is of the old way": Frame(
        new=True, steps=(2, 1), second="same", first_is_old=True, choices=ENGINES
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
    "seen": Frame(new=True, steps=(3, 0), others=True),
    "replayed": FRAMES["streams"],
    "succeeded instance": Frame(new=True, steps=(2, 1), second="same"),
    "refused try": Frame(new=True, steps=(2, 2), second="polite", rules=BLIND),
    "outlives the epoch": Frame(new=True, steps=(3, 0), rules=BLIND),
    "no fingerprint": Frame(new=True, steps=(3, 0)),
    "unfenced": FRAMES["the first is of the old way"],
    "promise": Frame(new=True, steps=(2, 1), second="same"),
}


def told(found):
    for harm, way in found.ways.items():
        print(f"{harm}:", *way, sep="\n    ")
    print(f"{found.states:,} states")


@pytest.mark.parametrize("fault", FAULTS | OTHER_FAULTS)
def test_the_old_way_has(fault):
    frame, harm = (FAULTS | OTHER_FAULTS)[fault]
    found = search(frame._replace(harms=(harm,)), first=True)
    told(found)
    assert harm in found.ways


@pytest.mark.parametrize("name", FRAMES)
def test_the_new_way_has_no_harm_with(name):
    found = search(FRAMES[name])
    told(found)
    assert found.states > 500
    assert found.ways == {}


@pytest.mark.parametrize("fault", FAULTS | OTHER_FAULTS)
def test_the_new_way_is_without(fault):
    frame, _ = (FAULTS | OTHER_FAULTS)[fault]
    found = search(frame._replace(new=True))
    assert found.ways == {}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_is_needed(rule):
    frame = NEEDED[rule]
    found = search(frame._replace(rules=frame.rules - {rule}), first=True)
    told(found)
    assert found.ways


@pytest.mark.parametrize("second", ["same", "other", "polite"])
def test_who_never_was_answered_does_not_become_the_owner_after_another(second):
    """The service never met the instance, but the pool is not as it was when it asked."""
    frame = Frame(new=True, steps=(1, 1), second=second, answered_first=False, first_dies=True)
    assert search(frame).ways == {}
    assert search(frame._replace(rules=BLIND)).ways


@pytest.mark.parametrize("second", ["same", "other", "polite"])
def test_who_closed_the_pool_does_not_become_the_owner_after_another(second):
    """Its OpenPool may be under way while it is closed and opened by another."""
    frame = Frame(new=True, steps=(2, 1), second=second, opens_after_closing=True, first_dies=True)
    assert search(frame).ways == {}
    assert search(frame._replace(rules=BLIND)).ways


@pytest.mark.parametrize("answered_first", [True, False])
def test_who_lives_and_asks_anew_becomes_the_owner(answered_first):
    """A limit: a process that closed the pool, or was never let in, asks and is told how it is.

    If it asks anew it becomes the owner, and the one before is told FENCED and stops; no place is
    given out twice.
    """
    frame = Frame(
        new=True,
        steps=(1 + answered_first, 1),
        second="same",
        answered_first=answered_first,
        opens_after_closing=answered_first,
    )
    assert REFUSED in search(frame._replace(harms=(REFUSED,)), first=True).ways
    assert search(frame._replace(harms=(SHARED, UNCOPIED))).ways == {}


def test_who_is_out_and_forgotten_asks_anew_like_a_stranger():
    """A limit of what is remembered: see also the frames with more others than that."""
    only = frozenset({"ClosePool", "reopen"})
    frame = Frame(new=True, steps=(1, 1), second="same", choices=only, harms=(REVIVED,))
    assert search(frame).ways == {}
    assert REVIVED in search(frame._replace(others=True)).ways
