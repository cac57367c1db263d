"""Methods of the socket with typed parameters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from knode.control.server import Handler, Notify
from knode.errors import Code, KnodeError

T = TypeVar("T")


def typed(kind: type[T], method: Callable[[T, Notify], Awaitable[Any]]) -> Handler:
    """Return a handler that decodes its parameters; INVALID_ARGUMENT for others."""

    async def handle(params: dict[str, Any], notify: Notify) -> Any:
        try:
            decoded = msgspec.convert(params, kind)
        except msgspec.ValidationError as error:
            raise KnodeError(
                Code.INVALID_ARGUMENT, str(error), "'knode --help' shows what each command takes"
            ) from error
        return await method(decoded, notify)

    return handle
