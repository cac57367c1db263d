"""How documents read for people: plain columns that survive a pipe, no frames, no colour.

Every function takes the document that --json would print and returns text. Names, messages and results
come from other machines: what goes to a terminal has passed `printable`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

Document = Mapping[str, Any]

_TIMES = ("submitted", "deadline")
"""Fields of a task that are wall times, in milliseconds."""
ID_CHARACTERS = 16
"""How much of an id tables show: a prefix that names a node in any cell, and can be given back."""


def printable(text: str) -> str:
    """Return `text` with control characters, but for newline and tab, shown as escapes.

    Another machine's text must not move the cursor, retitle the window or write its own line of output.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return columns two spaces apart, each as wide as its widest cell; None is shown as a hyphen."""
    lines = [[heading.upper() for heading in headings], *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def fields(pairs: Mapping[str, object]) -> str:
    """Return one `name  value` a line, the values aligned."""
    width = max(map(len, pairs))
    return "\n".join(f"{name:<{width}}  {_cell(value)}".rstrip() for name, value in pairs.items())


def initialised(document: Document) -> str:
    """Show a new node, and its recovery key this once."""
    shown = {key: document[key] for key in ("name", "node_id", "did", "cell_id", "home")}
    return (
        f"{fields(shown)}\n\n"
        f"recovery key   {printable(document['recovery_key'])}\n\n"
        "Write the recovery key down on paper. It is shown this once and stored nowhere; it is what\n"
        "takes the cell back when the owner's machine is lost or stolen."
    )


def status(document: Document) -> str:
    """Show the node, its cell's members, and what needs care."""
    tasks = ", ".join(f"{count} {state}" for state, count in document["tasks"].items() if count) or "none"
    agents = document["agents"]
    head = {
        "name": document["name"],
        "node": document["node_id"],
        "cell": document["cell_id"],
        "role": document["role"],
        "leader": _leader(document),
        "agents": len(agents) if isinstance(agents, list) else agents,
        "tasks": tasks,
    }
    members = table(
        ("member", "id", "role", "state", "link", "rtt"),
        (
            (m["name"], _short(m["node_id"]), m["role"], m["state"], m["link"], _ms(m["rtt_ms"]))
            for m in document["members"]
        ),
    )
    warnings = "".join(f"\nwarning: {printable(str(warning))}" for warning in document["warnings"])
    return f"{fields(head)}\n\n{members}{warnings}"


def _leader(document: Document) -> str | None:
    return next((m["name"] for m in document["members"] if m["node_id"] == document["leader"]), None)


def doctor(document: Document) -> str:
    """Show a line for each check, and below it what mends it."""
    width = max(len(check["check"]) for check in document["checks"])
    lines = []
    for check in document["checks"]:
        lines.append(f"{check['grade'].upper():<4}  {check['check']:<{width}}  {_cell(check['found'])}")
        if check["fix"]:
            lines.append(f"{'':<{width + 6}}  fix: {_cell(check['fix'])}")
    return "\n".join(lines)


def joined(document: Document) -> str:
    """Show what a join gave: the words to compare, and who is there."""
    return (
        f"{words(document['words'])}\n\n{fields({'name': document['name'], 'node': document['node_id']})}\n"
        f"{fields({'cell': document['cell_id']})}\n\n{_members(document['members'])}"
    )


def words(four: Sequence[str]) -> str:
    """Show the four words that both machines compare."""
    return f"words   {printable(' '.join(four))}   (the other machine must show the same)"


_PATHS = {None: None, False: "direct", True: "relayed"}


def peers(document: Sequence[Document]) -> str:
    """Show one peer a line."""
    return table(
        ("peer", "id", "role", "state", "link", "path", "address", "rtt"),
        (
            (
                p["name"],
                _short(p["id"]),
                p["role"],
                p["state"],
                p["link"],
                _PATHS[p["relayed"]],
                p["address"],
                _ms(p["rtt_ms"]),
            )
            for p in document
        ),
    )


def peer(document: Document) -> str:
    """Show all that is known of one peer, and one way to it a line."""
    ways = table(
        ("way", "address", "scope", "source", "problem"),
        ((w["link"], w["address"], w["scope"], w["source"], w["problem"]) for w in document["ways"]),
    )
    return f"{details({key: part for key, part in document.items() if key != 'ways'})}\n\n{ways}"


def ping(document: Document) -> str:
    """Show each round trip of a ping, and a summary."""
    times = document["rtt_ms"]
    via = f"{document['link']} {document['address']}"
    lines = [f"{_cell(document['name'])} over {_cell(via)}: {_ms(time)}" for time in times]
    total = len(times) + document["lost"]
    middle = f", median {_ms(sorted(times)[len(times) // 2])}" if times else ""
    why = _cell(document["why"])
    return "\n".join([*lines, f"{len(times)} of {total} answered{middle}", f"link: {why}"])


def members(document: Sequence[Document]) -> str:
    """Show one member a line."""
    return table(
        ("member", "id", "role", "votes", "state", "joined"),
        ((m["name"], _short(m["id"]), m["role"], m["votes"], m["state"], m["joined_at"]) for m in document),
    )


def recovered(document: Document) -> str:
    """Show whose cell it is now, and who is in it."""
    gone = ", ".join(member["name"] for member in document["revoked"])
    lines = {"owner": document["name"], "revoked": gone or None}
    shown = {key: text for key, text in lines.items() if text is not None}
    return f"{fields(shown)}\n\n{_members(document['members'])}"


def survey(document: Document) -> str:
    """Say what beginning the ledger anew may lose."""
    if document["founds"]:
        away = ", ".join(document["missing"]) or "nobody"
        return (
            f"away, or not saying what it has: {away}; nobody else has a ledger.\n"
            f"The cell's ledger begins on {document['survivor']}, with nothing. If one of those has a "
            "ledger, what it has is lost for good: then bring that one back instead."
        )
    since = f" since {document['leaderless_since']}" if document["leaderless_since"] else ""
    lines = [
        f"away: {', '.join(document['missing'])}; nobody leads the cell{since}",
        f"The ledger goes on with what {document['survivor']} has: {document['last_index']} entries, "
        f"{document['committed_index']} of them known to be agreed on.",
        "Whatever the others agreed on that is not among these is lost for good, also when they come back:",
        "tasks that were acknowledged may be gone, and what had ended may be done again.",
    ]
    lines += [
        f"{each['name']} is here and has more ({each['last_index']} entries): better run this there."
        for each in document["more"]
    ]
    return "\n".join(lines)


def ledger_to_keep(document: Document) -> str:
    """Say what keeping one ledger loses."""
    return (
        f"The ledger {document['ledger'][:12]} counts from now on: begun on {document['begun_on']} at "
        f"{document['begun_at']}.\nWhat was done in the other since then is lost for good."
    )


def survived(document: Document) -> str:
    """Show which ledger counts now."""
    shown = {key: document[key] for key in ("ledger", "number", "begun_on", "begun_at", "index")}
    return details(shown)


def agents(document: Sequence[Document]) -> str:
    """Show one agent a line."""
    return table(
        ("agent", "version", "runtime", "state", "nodes", "description"),
        (
            (
                a["id"],
                a["version"],
                a["runtime"],
                a["state"],
                ", ".join(a["nodes"]),
                a["description"],
            )
            for a in document
        ),
    )


def tasks(document: Sequence[Document]) -> str:
    """Show one task a line."""
    return table(
        ("task", "submitted", "agent", "state", "attempt", "node", "error"),
        (
            (
                t["id"],
                moment(t.get("submitted")),
                t["agent"],
                t["state"],
                t["attempt"],
                t["node"],
                (t["error"] or {}).get("code"),
            )
            for t in document
        ),
    )


def task(document: Document) -> str:
    """Show every field of a task."""
    return details({**document, **_times(document)})


def explanation(document: Document) -> str:
    """Show what a task waits for, and every node's score, when it was assigned last and now."""
    task = document["task"]
    shown = {key: task[key] for key in ("id", "agent", "state", "attempt", "node")}
    shown |= _times(task)
    reasons = {"waits for": document["waits_for"], "given back": document["given_back"]}
    parts = [fields(shown | reasons)]
    for title, considered in (("when assigned", document["considered"]), ("now", document["now"])):
        if considered:
            rows = ((one["node"], one["score"], one["why"]) for one in considered)
            parts.append(table((title, "score", "why not"), rows))
    return "\n\n".join(parts)


def effects(document: Sequence[Document]) -> str:
    """Show one operation a line."""
    return table(
        ("place", "time", "task", "attempt", "operation"),
        ((e["place"], moment(e["time"]), e["task"], e["attempt"], value(e["operation"])) for e in document),
    )


def settings(document: Sequence[Document]) -> str:
    """Show one configuration value a line, with where it came from."""
    return table(("key", "value", "source"), ((r["key"], value(r["value"]), r["source"]) for r in document))


def testnet(document: Document) -> str:
    """Show one node of a testnet a line: with how many others it sees alive, and whom it is cut off from."""
    return table(
        ("node", "state", "pid", "id", "sees", "cut off from", "home"),
        (
            (
                n["name"],
                n["state"],
                n["pid"],
                _short(n["node_id"]),
                _alive(n["sees"]),
                ", ".join(n["cut_off_from"]) or None,
                n["home"],
            )
            for n in document["nodes"]
        ),
    )


def _alive(states: Mapping[str, str] | None) -> str | None:
    return (
        None if states is None else f"{sum(state == 'alive' for state in states.values())} of {len(states)}"
    )


def details(document: Document) -> str:
    """Show every field of one thing; what has fields of its own is shown by `outer.inner`."""
    flat: dict[str, object] = {}
    for key, content in document.items():
        inner = (
            {f"{key}.{name}": part for name, part in content.items()}
            if _has_fields(content)
            else {key: content}
        )
        flat |= inner
    return fields({key: None if content is None else value(content) for key, content in flat.items()})


def moment(milliseconds: int | None) -> str | None:
    """Show a wall time as people here read it: local, to the second."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


def _times(task: Document) -> dict[str, str | None]:
    return {name: moment(task[name]) for name in _TIMES if name in task}


def value(content: object) -> str:
    """Show a value: text as it is, everything else as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def progress(document: Document) -> str:
    """Show one step of a running task."""
    fraction = document.get("fraction")
    percent = f"{fraction * 100:3.0f} % " if isinstance(fraction, int | float) else ""
    dropped = f" ({document['dropped']} steps left out)" if document.get("dropped") else ""
    node = document.get("node")
    where = "" if node is None else f"{_cell(node)}: "  # none has it before it is assigned
    return f"{where}{percent}{_cell(document.get('text') or '')}{dropped}"


def _members(document: Sequence[Document]) -> str:
    return table(
        ("member", "id", "role", "state", "joined"),
        ((m["name"], _short(m["id"]), m["role"], m["state"], m.get("joined_at")) for m in document),
    )


def _has_fields(content: object) -> bool:
    return isinstance(content, Mapping) and bool(content)


def _short(identifier: object) -> str:
    return _cell(identifier)[:ID_CHARACTERS]


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f} ms"


def _cell(content: object) -> str:
    if content is None:
        return "-"
    return printable(str(content)).replace("\n", "\\n").replace("\t", "\\t")


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    combining = sum(unicodedata.combining(character) != 0 for character in text)
    return len(text) + wide - combining
