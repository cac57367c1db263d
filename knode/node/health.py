"""What a running node can tell of its own health: the part of `knode doctor` that needs the daemon."""

from __future__ import annotations

import statistics
from enum import StrEnum

import msgspec
import trio

from knode.errors import KnodeError
from knode.mesh.peer import Peer
from knode.mesh.reaching import Reachability
from knode.node.node import Node

ASKED_PEERS = 8
ECHO_S = 3.0
CLOCK_WARN_S = 10.0
CLOCK_FAIL_S = 300.0
"""Half of a ticket's life."""


class Grade(StrEnum):
    """How a check came out."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Finding(msgspec.Struct, frozen=True):
    """One check: what was found, and what mends it (empty when nothing needs to be)."""

    check: str
    grade: Grade
    found: str
    fix: str = ""


async def examine(node: Node) -> list[Finding]:
    """Look at the cell, the local network, and how up to eight members that are here see this node.

    Takes as long as they need to dial this node, ten seconds at most.
    """
    here = [peer for peer in node.peers.members() if peer.conversation is not None][:ASKED_PEERS]
    seen: dict[str, Reachability | KnodeError] = {}

    async def ask(peer: Peer) -> None:
        name = node.membership.roster.members[peer.key.raw].name
        try:
            seen[name] = await node.reaching.ask(peer)
        except KnodeError as error:
            seen[name] = error

    async with trio.open_nursery() as nursery:
        for peer in here:
            nursery.start_soon(ask, peer)
        discovery = await _discovery(node)
    answers = {name: answer for name, answer in sorted(seen.items()) if isinstance(answer, Reachability)}
    silent = {name: answer for name, answer in sorted(seen.items()) if isinstance(answer, KnodeError)}
    return [_cell(node), _sandbox(node), discovery, _clock(answers), *_reachability(node, answers, silent)]


def _cell(node: Node) -> Finding:
    if not node.membership.in_cell:
        return Finding("cell", Grade.WARN, "this node belongs to no cell", "knode join TICKET")
    try:
        own = node.membership.own
    except KnodeError as error:
        return Finding("cell", Grade.FAIL, error.message, error.next_step or "join again with a new home")
    members = node.peers.members()
    here = sum(peer.conversation is not None for peer in members)
    found = f"{own.name} is a member ({own.role}); {here} of {len(members)} others are here"
    refusals = [peer.refusal for peer in members if peer.refusal is not None]
    if refusals:
        why, fix = refusals[0].message, refusals[0].next_step or "knode status"
        return Finding("cell", Grade.WARN if here else Grade.FAIL, f"{found}; one refuses it: {why}", fix)
    if members and not here:
        return Finding("cell", Grade.WARN, found, "knode peer list")
    return Finding("cell", Grade.PASS, found)


def _sandbox(node: Node) -> Finding:
    sandbox, problems = node.machine.sandbox, "; ".join(node.machine.sandbox_problems)
    if sandbox is None:
        return no_sandbox(problems)
    return Finding("sandbox", Grade.PASS, f"{sandbox.name} holds")


def no_sandbox(problems: str) -> Finding:
    """Return the finding for a machine on which no sandbox holds, and why."""
    return Finding(
        "sandbox",
        Grade.WARN,
        f"none holds, so agents that take code are refused ({problems})",
        "install bubblewrap and allow unprivileged user namespaces, then: knode down, knode up --detach",
    )


async def _discovery(node: Node) -> Finding:
    discovery = node.discovery
    if discovery is None:
        return Finding("mdns", Grade.SKIP, "discovery.mdns is off", "knode config set discovery.mdns true")
    if await discovery.hears_itself(within_s=ECHO_S):
        ignored = sum(discovery.ignored.values())
        rest = f"; {ignored} announcements of others were ignored" if ignored else ""
        return Finding("mdns", Grade.PASS, f"this node hears its own announcement{rest}")
    return Finding(
        "mdns",
        Grade.WARN,
        discovery.problem or "this node has not heard its own announcement yet",
        "let UDP port 5353 in, or: knode config set discovery.mdns false",
    )


def _clock(answers: dict[str, Reachability]) -> Finding:
    if not answers:
        return Finding("clock of others", Grade.SKIP, "no member that can be asked is here")
    ahead_s = -statistics.median(answer.clock_ahead_ms for answer in answers.values()) / 1000
    if abs(ahead_s) < CLOCK_WARN_S:
        return Finding("clock of others", Grade.PASS, f"{abs(ahead_s):.1f} s apart")
    grade = Grade.WARN if abs(ahead_s) < CLOCK_FAIL_S else Grade.FAIL
    way = "ahead of" if ahead_s > 0 else "behind"
    return Finding(
        "clock of others",
        grade,
        f"this machine's clock is {abs(ahead_s):.0f} s {way} that of {', '.join(answers)}",
        "set both by the network: timedatectl set-ntp true",
    )


def _reachability(
    node: Node, answers: dict[str, Reachability], silent: dict[str, KnodeError]
) -> list[Finding]:
    """Judge each member's attempts; it is enough that one of two can dial the other."""
    check = "reachability"
    if not answers and not silent:
        return [Finding(check, Grade.SKIP, "no member is here that could dial this node")]
    findings = []
    for name, answer in answers.items():
        good = [f"{tried.link} {tried.address}" for tried in answer.tried if not tried.problem]
        bad = [f"{tried.link} {tried.address} ({tried.problem})" for tried in answer.tried if tried.problem]
        if good:
            missed = f"; not by {', '.join(bad)}" if bad else ""
            findings.append(
                Finding(check, Grade.PASS, f"{name} reaches this node by {', '.join(good)}{missed}")
            )
        else:
            port = node.settings.node.port
            findings.append(
                Finding(
                    check,
                    Grade.WARN,
                    f"{name} cannot dial this node: {', '.join(bad) or 'it knows no address of it'}",
                    f"let TCP and UDP port {port} in, or name the right address: "
                    "knode config set node.advertise HOST:PORT",
                )
            )
    findings += [
        Finding(check, Grade.SKIP, f"{name} could not be asked: {error.message}", error.next_step)
        for name, error in silent.items()
    ]
    return findings
