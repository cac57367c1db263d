"""Two readers of a roster, of which one knows only the document, agree on every set of statements."""

from __future__ import annotations

import klp_checker
from hypothesis import given, settings
from hypothesis import strategies as st
from roster_vectors import (
    ADMIN,
    CELL,
    FRIEND,
    GENESIS,
    NEW,
    NEWER,
    OTHER,
    OWNER,
    RECOVERY,
    SECOND,
    THIEF,
    WORKER,
    add,
    begin,
    keep,
    meaning,
    recover,
    revoke,
    role,
    rotate,
)

from knode.mesh.statements import Known, Role, SignedStatement

PEOPLE = (ADMIN, OTHER, WORKER, FRIEND)
ERAS = (
    recover(50, SECOND, Known(ADMIN.public.raw, "a", Role.ADMIN, 1), revoked=(FRIEND,)),
    recover(51, NEWER, *(Known(who.public.raw, "b", Role.WORKER, 2) for who in PEOPLE)),
)
is_admin, has_other = add(OWNER, ADMIN, "admin", Role.ADMIN), add(OWNER, OTHER, "other", Role.ADMIN)
signers = st.sampled_from([OWNER, OWNER, RECOVERY, SECOND, *PEOPLE, NEW, THIEF])
people = st.sampled_from(PEOPLE)
roles, times = st.sampled_from(Role), st.integers(1, 4)
eras = st.sampled_from([CELL, CELL, CELL, ERAS[0].id, ERAS[1].id])
adds = st.builds(
    lambda s, m, r, t, e: add(s, m, "n", r, t, e),
    signers,
    st.sampled_from([*PEOPLE, NEW]),
    roles,
    times,
    eras,
)


@st.composite
def sets(draw: st.DrawFn) -> list[SignedStatement]:
    pool = [*draw(st.lists(adds, max_size=8)), is_admin, has_other]
    kept = st.lists(st.sampled_from(pool), max_size=4, unique_by=lambda s: s.id)
    more = st.one_of(
        st.builds(
            lambda s, m, r, t, k, e: role(s, m, r, t, *k, era=e), signers, people, roles, times, kept, eras
        ),
        st.builds(lambda s, m, t, k, e: revoke(s, m, t, *k, era=e), signers, people, times, kept, eras),
        st.builds(
            lambda m, o, n, k: rotate(m, o or m, n, *k),
            people,
            st.sampled_from([None, None, NEW, NEWER]),
            st.sampled_from([NEW, NEWER, THIEF, FRIEND]),
            kept,
        ),
    )
    return [
        *pool,
        *draw(st.lists(more, max_size=10)),
        *draw(ledgers()),
        *draw(st.sets(st.sampled_from(ERAS))),
    ]


@st.composite
def ledgers(draw: st.DrawFn) -> list[SignedStatement]:
    """Incarnations, some of them on others, and which of them are named."""
    begun: list[SignedStatement] = []
    for _ in range(draw(st.integers(0, 6))):
        on = draw(st.sampled_from([None, *begun]))
        begun.append(begin(draw(signers), on, index=draw(times), issued=draw(times), era=draw(eras)))
    if not begun:
        return []
    keeps = st.builds(
        lambda s, b, t, e: keep(s, b, issued=t, era=e), signers, st.sampled_from(begun), times, eras
    )
    return [*begun, *draw(st.lists(keeps, max_size=3))]


@settings(deadline=None, max_examples=100)
@given(sets())
def test_knode_and_the_document_s_reader_give_a_set_the_same_meaning(statements) -> None:
    everything = {s.id: s for s in (GENESIS, *statements)}
    read = [klp_checker.read_statement(s.data) for s in everything.values()]
    assert klp_checker.read_roster(CELL, read) == meaning(list(everything.values()))
