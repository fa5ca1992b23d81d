"""Lists in pages: a token names the last item of a page by its key, so items may come and go between two pages.

page_token = base64url(JSON [kind of list, key of the last item])
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

from fastapi import Query
from starlette.responses import Response

from cdpserver.errors import UsageError
from cdpserver.service.api.answers import Answers

DEFAULT_PAGE = 100
MAX_PAGE = 1000
"""A page is made in one go; a client that asks for more gets more pages."""

MAX_TOKEN = 1024

PageSize: TypeAlias = Annotated[
    int | None, Query(ge=1, le=MAX_PAGE, description="Answer in pages of this size.")
]
PageToken: TypeAlias = Annotated[
    str | None, Query(max_length=MAX_TOKEN, description="`next_page_token` of the page before.")
]
Key: TypeAlias = tuple[int | str, ...]


def is_paged(size: int | None, token: str | None) -> bool:
    """Was a page asked for? Else the whole list is answered."""
    return size is not None or token is not None


def write_token(kind: str, key: Key) -> str:
    """The token of the page that follows the item of this key."""
    return base64.urlsafe_b64encode(json.dumps([kind, *key], separators=(",", ":")).encode()).decode()


def read_token(kind: str, token: str | None, *types: type) -> Key | None:
    """The key in a token of a list of this kind; None without a token. UsageError for one that we never gave out."""
    if token is None:
        return None
    try:
        value = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        value = None
    good = (
        isinstance(value, list)
        and len(value) == 1 + len(types)
        and value[0] == kind
        and all(type(part) is wanted for part, wanted in zip(value[1:], types, strict=True))
        and write_token(kind, tuple(value[1:])) == token
    )
    if not good:
        raise UsageError(
            "not a page token of this list", hint="take next_page_token of the page before, or none"
        )
    return tuple(value[1:])


async def answer_list(
    answers: Answers,
    kind: str,
    items: Sequence[dict[str, Any]],
    field: str,
    page: tuple[int | None, str | None],
    of: type[int] | type[str] = str,
) -> Response:
    """The list, or the page of it that was asked for. `items` are ordered by their `field`, which is unique."""
    size, token = page
    if not is_paged(size, token):
        return await answers.many(list(items))
    after = read_token(kind, token, of)
    left = [item for item in items if after is None or (item[field],) > after]
    return await answer_page(answers, kind, left, lambda item: (item[field],), size)


async def answer_page(
    answers: Answers,
    kind: str,
    left: Sequence[dict[str, Any]],
    key: Callable[[dict[str, Any]], Key],
    size: int | None,
) -> Response:
    """The first page of what is `left` of a list: one item more than fits says that there is another page."""
    size = size or DEFAULT_PAGE
    shown = list(left[:size])
    more = len(left) > size
    return await answers.page(shown, write_token(kind, key(shown[-1])) if more else None)
