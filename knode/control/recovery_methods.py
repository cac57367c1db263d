"""What the daemon answers about a cell that lost most of its voters, or has two ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knode.control.parameters import OfLedger, OfSurvey, OfSurvival
from knode.control.server import Handler, Notify
from knode.control.typed import typed
from knode.identity import KeyPair
from knode.mesh.roster import Member
from knode.node.node import Node
from knode.node.setup import parse_recovery_key
from knode.node.voting import ledger_document, survey_document


class RecoveryMethods:
    """The methods about recovery of one daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def table(self) -> Mapping[str, Handler]:
        """Return every method by its name."""
        return {
            "member.survey": typed(OfSurvey, self._survey),
            "member.survive": typed(OfSurvival, self._survive),
            "member.ledger": typed(OfLedger, self._find_ledger),
            "member.keep": typed(OfLedger, self._keep_ledger),
        }

    async def _survey(self, of: OfSurvey, notify: Notify) -> Any:
        return survey_document(self._node, await self._node.recovery.survey(self._members(of.revoke)))

    async def _survive(self, of: OfSurvival, notify: Notify) -> Any:
        begun = await self._node.recovery.begin(
            recovery=_key(of.recovery_key),
            lost=self._members(of.revoke),
            though_others_have_more=of.force,
        )
        return ledger_document(self._node, begun)

    async def _find_ledger(self, of: OfLedger, notify: Notify) -> Any:
        return ledger_document(self._node, self._node.membership.roster.incarnations.find(of.ledger))

    async def _keep_ledger(self, of: OfLedger, notify: Notify) -> Any:
        membership = self._node.membership
        found = membership.roster.incarnations.find(of.ledger)
        await membership.keep_incarnation(found.hash, recovery=_key(of.recovery_key))
        return ledger_document(self._node, found)

    def _members(self, selectors: tuple[str, ...]) -> list[Member]:
        return [self._node.membership.roster.find(selector) for selector in dict.fromkeys(selectors)]


def _key(text: str | None) -> KeyPair | None:
    return None if text is None else parse_recovery_key(text)
