"""Plays tests/scenarios/klp_*.txt: what is indented is what must come out.

`python tests/klp/test_klp_scenarios.py` writes the outcome into the files; read the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from klp_pair import ALICE_BOOT, BOB_BOOT, frames_of, request, seed, sessions

from knode.errors import KnodeError
from knode.klp import (
    Acknowledge,
    Answered,
    Answers,
    Context,
    Credit,
    Fresh,
    Refused,
    Request,
    Response,
    Running,
    Session,
    StreamData,
    StreamEnd,
    StreamReset,
)

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("klp_*.txt"))


def tell(item: object) -> str:
    """Say in a few words what came."""
    match item:
        case Request(counter=counter, stream=stream):
            return f"request {counter}" + (f" with stream {stream}" if stream else "")
        case Response(counter=counter):
            return f"answer {counter}"
        case Acknowledge(counters=counters):
            return "acknowledged " + " ".join(map(str, counters))
        case StreamData(stream=stream, data=data):
            return f"data of stream {stream}: {len(data)}"
        case StreamEnd(stream=stream, size=size):
            return f"end of stream {stream}: {size}, digest right"
        case StreamReset(stream=stream):
            return f"reset of stream {stream}"
        case Credit(stream=stream, total_bytes=total):
            return f"credit of stream {stream}: {total}"
    raise AssertionError(item)


class Stage:
    """Two sessions, and bob's memory of what alice asked."""

    def __init__(self) -> None:
        alice, bob = sessions()
        self.ends = {"alice": alice, "bob": bob}
        self.answers = Answers(BOB_BOOT)

    def play(self, line: str) -> Iterator[str]:
        """Do what a line says; give what comes of it."""
        try:
            if line[0].isdigit():
                yield from self.remember(line)
            else:
                yield from self.speak(*line.split())
        except KnodeError as error:
            yield f"refused: {error.code}"

    def speak(self, who: str, verb: str, *words: str) -> Iterator[str]:
        end = self.ends[who]
        other = self.ends["bob" if who == "alice" else "alice"]
        numbers = [int(word) for word in words if word.isdigit()]
        match verb:
            case "asks":
                end.send(request(numbers[0], stream=numbers[1] if len(numbers) > 1 else 0))
            case "answers":
                end.send(Response(numbers[0], b"done"))
            case "acknowledges":
                end.acknowledge(numbers[0])
            case "opens":
                yield f"stream {end.open_stream()}"
            case "writes":
                end.write(numbers[0], bytes(numbers[1]))
            case "ends":
                end.end(numbers[0])
            case "resets":
                end.reset(numbers[0], "CANCELLED")
            case "consumed":
                end.consumed(*numbers)
            case "loses":
                frames_of(end)
            case "carries":
                yield from self.carry(end, other, times=2 if "twice" in words else 1)
            case _:
                raise AssertionError(verb)

    def carry(self, source: Session, destination: Session, *, times: int) -> Iterator[str]:
        frames = frames_of(source)
        if not frames:
            yield "nothing to carry"
        for frame in frames:
            for _ in range(times):
                items = destination.receive(frame)
                yield ", ".join(map(tell, items)) or "no news"

    def remember(self, line: str) -> Iterator[str]:
        at, _, verb, *words = line.split()
        now, alice = float(at), seed("alice")
        counter = next(int(word) for word in words if word.isdigit())
        self.answers.expire(now)
        if verb == "finishes":
            self.answers.finish(alice, ALICE_BOOT, counter, Response(counter, b"done"), now)
        elif words[0] == "told":
            self.answers.acknowledge(alice, ALICE_BOOT, (counter,))
        else:
            boot = bytes(16) if "later" in words else ALICE_BOOT
            destination = bytes(16) if "earlier" in words else BOB_BOOT
            asked = Request(counter, destination, "test", 1000, 0, Context(), b"")
            match self.answers.begin(alice, boot, asked, now):
                case Fresh():
                    yield "runs it"
                case Running():
                    yield "runs it already"
                case Answered():
                    yield "answers from memory"
                case Refused(code=code):
                    yield f"refuses: {code}"


def played(text: str) -> str:
    """Return the scenario with what comes out now."""
    stage, lines = Stage(), []
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        lines.append(line)
        if line == "restart":
            stage = Stage()
        elif line and not line.startswith("#"):
            lines += ["    " + outcome for outcome in stage.play(line)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_plays_as_written(path: Path) -> None:
    assert played(path.read_text()) == path.read_text()


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 3


if __name__ == "__main__":
    for scenario in SCENARIOS:
        scenario.write_text(played(scenario.read_text()))
