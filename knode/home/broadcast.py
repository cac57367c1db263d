"""Log lines handed to whoever follows them in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass

import trio

from knode.errors import Code, KnodeError

FOLLOWERS_AT_ONCE = 16
LINES_WAITING = 1024


@dataclass(slots=True)
class _Follower:
    channel: trio.MemorySendChannel[str]
    dropped: int = 0


class Broadcast:
    """Gives each line to every follower, and waits for none of them.

    A follower that is more than LINES_WAITING behind loses lines; the next line that it gets is a log
    line that says how many. To be used from trio's thread.
    """

    def __init__(self) -> None:
        self._followers: list[_Follower] = []

    def subscribe(self) -> trio.MemoryReceiveChannel[str]:
        """Return a channel of the lines from now on, each without its line end; close it to stop.

        Raises:
            KnodeError: RATE_LIMITED over FOLLOWERS_AT_ONCE followers.
        """
        if len(self._followers) >= FOLLOWERS_AT_ONCE:
            raise KnodeError(
                Code.RATE_LIMITED, f"{FOLLOWERS_AT_ONCE} already follow this log", "stop another 'logs tail'"
            )
        send, receive = trio.open_memory_channel[str](LINES_WAITING)
        self._followers.append(_Follower(send))
        return receive

    def publish(self, line: str) -> None:
        """Give `line` to all who follow."""
        self._followers = [follower for follower in self._followers if _give(follower, line)]

    def close(self) -> None:
        """End every follower's channel once it is read out."""
        for follower in self._followers:
            follower.channel.close()
        self._followers.clear()


def _give(follower: _Follower, line: str) -> bool:
    """Tell whether the follower is still there."""
    try:
        if follower.dropped:
            follower.channel.send_nowait(
                json.dumps({"level": "warning", "event": "log lines dropped", "count": follower.dropped})
            )
            follower.dropped = 0
        follower.channel.send_nowait(line)
    except trio.WouldBlock:
        follower.dropped += 1
    except trio.BrokenResourceError:
        follower.channel.close()
        return False
    return True
