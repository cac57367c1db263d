"""Multicast DNS: one text of ours told to the local network, and those of others heard (RFC 6762, 6763).

zeroconf does the protocol, on asyncio and at its own pace: registering takes seconds. So it runs in a
thread, and trio's loop never waits for it. What the texts say is nothing to this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from knode.errors import Code, KnodeError

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf

SERVICE = "_p2p._udp.local."
"""libp2p's service type (its mDNS specification)."""
ASK_AGAIN_S = 120.0
"""How often everybody is asked anew: answers get lost, and zeroconf itself asks only as it starts."""
CROWDED_NAMES = 2048
"""A network with more names than that is being flooded. zeroconf keeps up to 10,000 records for as long as
their senders say, and would list them in every question."""
WAITING_TEXTS = 256
"""Texts that wait for trio's loop; beyond these the oldest is dropped."""

_TXT, _IN = 16, 1  # RFC 1035: a TXT record of the Internet

Heard = Callable[[bytes], None]


class MulticastDns:
    """This machine's place in multicast DNS. Everything that a neighbour says is untrusted."""

    def __init__(self, name: str) -> None:
        """Take a name.

        Args:
            name: 32 to 63 random letters and digits: libp2p's peer name, which must not tell who it is.
        """
        assert 32 <= len(name) <= 63
        self._name = name

    async def run(self, text: bytes, hosts: Sequence[str], port: int, heard: Heard) -> None:
        """Tell `text`, and hand over what others tell, until cancelled; neighbours hear a good-bye then.

        It returns when the network is flooded with names, within two minutes: begun anew, it has forgotten
        them. Its own text is heard, too, where multicast works. Cancelling takes about half a second.

        Args:
            text: of one TXT record, at most 1300 bytes.
            hosts: IP addresses of the interfaces to speak and listen on.
            port: told with the service (RFC 2782), for people; the text has its own.
            heard: called in trio with each text that is new, and every two minutes with all of them.

        Raises:
            KnodeError: UNAVAILABLE when this machine cannot send or hear multicast.
        """
        try:
            thread = _Thread(self._name, text, hosts, port, heard)
        except OSError as error:  # no descriptor is left
            raise _unavailable(hosts, error) from error
        failure: KnodeError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.end_when_cancelled)
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(thread.work, limiter=trio.CapacityLimiter(1))
                except KnodeError as error:
                    failure = error
                except RuntimeError as error:  # the system gives no thread
                    failure = _unavailable(hosts, error)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


class _Thread:
    """One run of zeroconf. `work` is the thread; the other methods are trio's."""

    def __init__(self, name: str, text: bytes, hosts: Sequence[str], port: int, heard: Heard) -> None:
        self._service = f"{name}.{SERVICE}"
        self._server = f"{name}.local."
        self._text = text
        self._hosts = list(hosts)
        self._port = port
        self._heard = heard
        self._texts: deque[bytes] = deque(maxlen=WAITING_TEXTS)
        self._token = trio.lowlevel.current_trio_token()
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()

    async def end_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended by itself
                self._loop.call_soon_threadsafe(self._ended.set)

    def work(self) -> None:
        from zeroconf import Error

        # Its complaints about single packets are for nobody; what keeps it from working is raised.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        try:
            self._loop.run_until_complete(self._speak_and_listen())
        except (OSError, RuntimeError, Error) as error:
            raise _unavailable(self._hosts, error) from error
        finally:
            self._loop.close()

    async def _speak_and_listen(self) -> None:
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

        own = AsyncServiceInfo(
            SERVICE,
            self._service,
            port=self._port,
            properties=self._text,
            server=self._server,
            parsed_addresses=self._hosts,
        )
        zeroconf = AsyncZeroconf(interfaces=self._hosts)
        try:
            # No other has this random name, so nobody is asked for it: that is what the flag says.
            telling = asyncio.ensure_future(
                await zeroconf.async_register_service(own, cooperating_responders=True)
            )
            while not self._ended.is_set():
                browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._notice])
                try:
                    async with asyncio.timeout(ASK_AGAIN_S):
                        await self._ended.wait()
                except TimeoutError:
                    pass
                finally:
                    await browser.async_cancel()
                if len(zeroconf.zeroconf.cache.names()) > CROWDED_NAMES:
                    break
            telling.cancel()
        finally:
            await zeroconf.async_close()

    def _notice(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Hand the text of a service over to trio's loop, which takes it when it has time."""
        from zeroconf import DNSText, ServiceStateChange  # type: ignore[attr-defined]

        record = zeroconf.cache.get_by_details(name, _TXT, _IN)
        if state_change is ServiceStateChange.Removed or not isinstance(record, DNSText):
            return
        self._texts.append(record.text)
        self._token.run_sync_soon(self._hand_over, idempotent=True)

    def _hand_over(self) -> None:
        while self._texts:
            self._heard(self._texts.popleft())


def _unavailable(hosts: Sequence[str], error: Exception) -> KnodeError:
    return KnodeError(
        Code.UNAVAILABLE,
        f"this machine cannot multicast on {', '.join(hosts)} ({str(error) or type(error).__name__})",
        "see that UDP port 5353 is free and the network takes multicast, "
        "or: knode config set discovery.mdns false",
    )
