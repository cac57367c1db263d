from __future__ import annotations

import pytest
from mesh_cell import Text

from knode.errors import Code, KnodeError
from knode.mesh.methods import ANY_MEMBER, Call, Methods
from knode.mesh.statements import Role


async def answer(call: Call, body: Text) -> Text:
    return body


@pytest.fixture
def methods() -> Methods:
    table = Methods()
    table.add("open", Text, answer)
    table.add("early", Text, answer, before_sync=True)
    table.add("admins", Text, answer, roles=frozenset({Role.ADMIN}))
    table.add("join", Text, answer, roles=frozenset(), before_sync=True)
    return table


def code_of(methods: Methods, name: str, role: Role | None) -> Code | None:
    try:
        methods.admitted(name, role)
    except KnodeError as error:
        return error.code
    return None


def test_every_role_may_call_exactly_what_is_its_own(methods: Methods) -> None:
    for role in ANY_MEMBER:
        assert code_of(methods, "open", role) is None
        assert code_of(methods, "admins", role) is (None if role is Role.ADMIN else Code.NOT_ALLOWED)
        assert code_of(methods, "join", role) is Code.NOT_ALLOWED
        assert code_of(methods, "nothing", role) is Code.NOT_FOUND


def test_a_joining_node_may_join_and_learns_of_nothing_else(methods: Methods) -> None:
    assert code_of(methods, "join", None) is None
    assert {code_of(methods, name, None) for name in ("open", "early", "admins", "nothing", "")} == {
        Code.NOT_ALLOWED
    }


def test_what_needs_no_common_roster_is_said_so(methods: Methods) -> None:
    found = {name: methods.before_sync(name) for name in ("open", "early", "admins", "join", "nothing")}
    assert found == {"open": False, "early": True, "admins": False, "join": True, "nothing": False}


def test_no_method_is_added_twice(methods: Methods) -> None:
    with pytest.raises(AssertionError):
        methods.add("open", Text, answer)
