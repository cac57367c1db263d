"""What becomes of a replica when the cell's ledger was begun anew."""

from __future__ import annotations

import hashlib

from knode.identity import KeyPair
from knode.mesh.incarnations import Incarnation, Incarnations, Verdict
from knode.mesh.roster import resolve
from knode.mesh.statements import (
    BeginIncarnation,
    Genesis,
    KeepIncarnation,
    Recover,
    SignedStatement,
    sign_statement,
)

OWNER, RECOVERY, SECOND = (KeyPair(hashlib.sha256(name).digest()) for name in (b"owner", b"recovery", b"2nd"))
GENESIS = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(16), 1))
CELL, FIRST = GENESIS.id, Incarnation(0, GENESIS.id)
SURVIVOR, OTHER = bytes(39) + b"s", bytes(39) + b"o"
ERA = sign_statement(RECOVERY, Recover(RECOVERY.public.raw, CELL, SECOND.public.raw, (), (), 9))


def begin(on: Incarnation, *, replica: bytes = SURVIVOR, signer: KeyPair = OWNER) -> SignedStatement:
    body = BeginIncarnation(signer.public.raw, CELL, on.number + 1, on.hash, replica, 7, 3, 40)
    return sign_statement(signer, body)


def keep(statement: SignedStatement, *, signer: KeyPair = RECOVERY) -> SignedStatement:
    return sign_statement(signer, KeepIncarnation(signer.public.raw, CELL, statement.id, 60))


def begun_by(statement: SignedStatement) -> Incarnation:
    assert isinstance(statement.body, BeginIncarnation)
    return Incarnation(statement.body.number, statement.id)


def after(*statements: SignedStatement) -> Incarnations:
    return resolve(CELL, [GENESIS, *statements]).incarnations


ONE = begin(FIRST)
TWO = begin(begun_by(ONE), replica=OTHER)
RIVAL = begin(FIRST, replica=OTHER, signer=RECOVERY)


def test_without_a_statement_everybody_takes_part() -> None:
    assert after().judge(FIRST, OTHER) is Verdict.IN_FORCE


def test_the_survivor_goes_on_and_what_the_others_have_is_void() -> None:
    assert after(ONE).judge(FIRST, SURVIVOR) is Verdict.SURVIVES
    assert after(ONE).judge(begun_by(ONE), SURVIVOR) is Verdict.IN_FORCE
    assert after(ONE).judge(FIRST, OTHER) is Verdict.OVER


def test_who_slept_through_two_survives_neither() -> None:
    assert after(ONE, TWO).judge(FIRST, SURVIVOR) is Verdict.OVER
    assert after(ONE, TWO).judge(FIRST, OTHER) is Verdict.OVER, "it would go on from an older log"
    assert after(ONE, TWO).judge(begun_by(ONE), OTHER) is Verdict.SURVIVES


def test_rivals_stop_everybody_until_one_is_kept() -> None:
    for log, replica in ((begun_by(ONE), SURVIVOR), (begun_by(RIVAL), OTHER), (FIRST, bytes(40))):
        assert after(ONE, RIVAL).judge(log, replica) is Verdict.CONTESTED
    kept = after(ONE, RIVAL, keep(RIVAL))
    assert kept.judge(begun_by(RIVAL), OTHER) is Verdict.IN_FORCE
    assert kept.judge(begun_by(ONE), SURVIVOR) is Verdict.OVER


def test_what_was_begun_on_the_loser_is_over_although_its_number_is_higher() -> None:
    assert after(ONE, TWO, RIVAL, keep(RIVAL)).judge(begun_by(TWO), OTHER) is Verdict.OVER


def test_a_ledger_that_an_earlier_owner_began_waits_for_the_present_owner() -> None:
    era = after(ONE, ERA)
    assert era.present == FIRST
    assert era.judge(begun_by(ONE), SURVIVOR) is Verdict.NOT_ACKNOWLEDGED
    assert after(ONE, ERA, keep(ONE)).judge(begun_by(ONE), SURVIVOR) is Verdict.IN_FORCE


def test_a_ledger_whose_statement_is_not_known_here_is_not_taken_for_void() -> None:
    assert after().judge(begun_by(TWO), OTHER) is Verdict.NOT_ACKNOWLEDGED
