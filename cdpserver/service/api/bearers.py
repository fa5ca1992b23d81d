"""Requests that come over TCP: who asks is said by a token in each, `Authorization: Bearer TOKEN`.

Nothing of a request is read, beyond its head, before its token is known. A connection that has not shown one within some seconds
is closed, so that nobody without a token keeps places that others want.
"""

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from cdpserver.errors import CdpError, ForbiddenError, RefusedError
from cdpserver.events import EventLog
from cdpserver.service.api.answers import error_answer
from cdpserver.service.api.seldom import Seldom
from cdpserver.service.roles import Role
from cdpserver.tokens import Known

AUTHENTICATE_S = 15.0
"""How long a connection may take until it has shown a token."""

NO_TOKEN = "cdp token add NAME --role ROLE makes one on the service's host; CDP_TOKEN_FILE names its file"

SCHEME = b"bearer "


class Bearers:
    """Gives each request over TCP the role of its token, and refuses those without one."""

    def __init__(self, app: ASGIApp, known: Known, log: EventLog) -> None:
        self._app = app
        self._known = known
        self._seldom = Seldom(log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        if scope["type"] != "http" or "until_known" not in state:
            await self._app(scope, receive, send)
            return
        try:
            token = self._known.find(_text(scope))
        except CdpError as error:
            self._seldom.say("service.tokens-unreadable", reason=str(error))
            refused = RefusedError("the tokens cannot be read", hint="the service's events say why")
            await error_answer(refused)(scope, receive, send)
            return
        if token is None:
            self._seldom.say("service.token-refused", client=(scope.get("client") or ("",))[0])
            none = ForbiddenError("no token, or none that is known", hint=NO_TOKEN)
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            await error_answer(none, 401, headers)(scope, receive, send)
            return
        state["until_known"].deadline = math.inf
        # An agent's token has its name: it is the agent that it may ask as.
        state["role"], state["user"] = Role[token.role.upper()], f"token {token.name}"
        state["agent"] = token.name if token.role == "protect" else None
        await self._app(scope, receive, send)


def _text(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[: len(SCHEME)].lower() == SCHEME:
            return bytes(value[len(SCHEME) :]).decode("ascii", "replace").strip()
    return ""
