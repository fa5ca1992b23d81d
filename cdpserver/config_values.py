"""What a configuration key can hold: an address, a duration, a number. Each kind is read from TOML and from
the command line, written as TOML, and says in words what it takes.

The only error is UsageError. It names the key and what would be right.
"""

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from cdpserver.errors import UsageError
from cdpserver.names import (
    DURATION_FORMS,
    SIZE_FORMS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    show,
)

Address: TypeAlias = tuple[str, int]

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


MAX_PATH = 500
MAX_REGEX = 200
"""They stand in rows of the catalog, which hold 4 KiB."""

_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


class Kind(Protocol):
    """One kind of value. `takes` is what the operator may write; `example` is such a value in TOML."""

    @property
    def takes(self) -> str: ...

    @property
    def example(self) -> str: ...

    def read(self, key: str, value: object) -> Any:
        """The value that TOML holds for `key`."""

    def read_option(self, key: str, text: str) -> Any:
        """The value of a command line option; `key` is how the operator knows it."""

    def write(self, value: Any) -> str:
        """`value` as TOML that `read` takes."""


@dataclass(frozen=True, slots=True)
class AddressValue:
    """An address and a port to listen on."""

    takes: ClassVar[str] = "an address and a port"
    example: ClassVar[str] = '"127.0.0.1:10809"'

    def read(self, key: str, value: object) -> Address:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> Address:
        try:
            return parse_listen(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None

    def write(self, value: Address) -> str:
        host, port = value
        return f'"[{host}]:{port}"' if ":" in host else f'"{host}:{port}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class DurationValue:
    """A duration in nanoseconds, from `least` to `most`."""

    least: int
    most: int
    example: ClassVar[str] = '"20m"'

    @property
    def takes(self) -> str:
        return f"a duration from {format_duration(self.least)} to {format_duration(self.most)}"

    def read(self, key: str, value: object) -> int:
        return self.read_option(key, quoted(key, value, DURATION_FORMS))

    def read_option(self, key: str, text: str) -> int:
        try:
            span_ns = parse_duration(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
        if not self.least <= span_ns <= self.most:
            raise UsageError(f"{key} is out of range: {show(text)}", hint=f"it takes {self.takes}")
        return span_ns

    def write(self, value: int) -> str:
        return f'"{format_duration(value)}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanValue:
    """A duration in nanoseconds, from `least` to `most`; or none."""

    least: int
    most: int
    example: ClassVar[str] = '"1h"'

    @property
    def takes(self) -> str:
        return f"{self._duration.takes}, or none"

    @property
    def _duration(self) -> DurationValue:
        return DurationValue(least=self.least, most=self.most)

    def read(self, key: str, value: object) -> int | None:
        return self.read_option(key, quoted(key, value, DURATION_FORMS))

    def read_option(self, key: str, text: str) -> int | None:
        return None if text == "none" else self._duration.read_option(key, text)

    def write(self, value: int | None) -> str:
        return '"none"' if value is None else self._duration.write(value)


@dataclass(frozen=True, slots=True)
class ProgramValue:
    """The absolute path of a program; whether it is there is seen when it is run."""

    takes: ClassVar[str] = "the absolute path of a program"
    example: ClassVar[str] = '"/etc/cdpserver/before-freeze"'

    def read(self, key: str, value: object) -> str:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> str:
        if not text.startswith("/") or not text.isprintable() or '"' in text or "\\" in text:
            raise UsageError(f"{key}: not a program: {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str) -> str:
        return f'"{value}"'


@dataclass(frozen=True, slots=True)
class GroupValue:
    """The name of a Unix group; whether there is such a group is asked when the service starts."""

    takes: ClassVar[str] = "the name of a Unix group"
    example: ClassVar[str] = '"cdp-operators"'

    def read(self, key: str, value: object) -> str:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> str:
        if _GROUP.fullmatch(text) is None:
            raise UsageError(f"{key}: not a group: {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str) -> str:
        return f'"{value}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberValue:
    """A whole number from `least` to `most`."""

    least: int
    most: int

    @property
    def takes(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    @property
    def example(self) -> str:
        return str(self.least)

    def read(self, key: str, value: object) -> int:
        if type(value) is not int:  # bool is an int to isinstance
            raise UsageError(
                f"{key} is not a whole number: {_shown(value)}", hint=f"write {key} = {self.example}"
            )
        if not self.least <= value <= self.most:
            raise UsageError(f"{key} is out of range: {_shown(value)}", hint=f"it takes {self.takes}")
        return value

    def read_option(self, key: str, text: str) -> int:
        if not re.fullmatch("-?[0-9]{1,18}", text):
            raise UsageError(f"{key} is not a whole number: {show(text)}", hint=f"it takes {self.takes}")
        return self.read(key, int(text))

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeValue:
    """Bytes, at least `least`; or none."""

    least: int
    example: ClassVar[str] = '"500G"'

    @property
    def takes(self) -> str:
        return f"a size from {format_size(self.least)}, or none"

    def read(self, key: str, value: object) -> int | None:
        return self.read_option(key, quoted(key, value, SIZE_FORMS))

    def read_option(self, key: str, text: str) -> int | None:
        if text == "none":
            return None
        try:
            size = parse_size(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
        if size < self.least:
            raise UsageError(f"{key} is out of range: {show(text)}", hint=f"it takes {self.takes}")
        return size

    def write(self, value: int | None) -> str:
        return '"none"' if value is None else f'"{format_size(value)}"'


@dataclass(frozen=True, slots=True)
class ChoiceValue:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def takes(self) -> str:
        return " or ".join(self.words)

    @property
    def example(self) -> str:
        return f'"{self.words[0]}"'

    def read(self, key: str, value: object) -> str:
        return self.read_option(key, quoted(key, value, f"it takes {self.takes}"))

    def read_option(self, key: str, text: str) -> str:
        if text not in self.words:
            raise UsageError(f"{key} cannot be {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str) -> str:
        return f'"{value}"'


@dataclass(frozen=True, slots=True)
class TimeOfDayValue:
    """A time of day on the host's clock, `03:00` or `03:00:30`; or none."""

    takes: ClassVar[str] = "a time of day such as 03:00, or none"
    example: ClassVar[str] = '"03:00"'

    def read(self, key: str, value: object) -> str | None:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> str | None:
        if text == "none":
            return None
        if re.fullmatch(r"(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){1,2}", text) is None:
            raise UsageError(f"{key}: not a time of day: {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str | None) -> str:
        return '"none"' if value is None else f'"{value}"'


@dataclass(frozen=True, slots=True)
class PathValue:
    """The absolute path of a file; or none. Whether it is there is asked when it is needed."""

    example: str
    takes: ClassVar[str] = "the absolute path of a file, or none"

    def read(self, key: str, value: object) -> str | None:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> str | None:
        if text == "none":
            return None
        if (
            not text.startswith("/")
            or not text.isprintable()
            or len(text) > MAX_PATH
            or set(text) & set('"\\')
        ):
            raise UsageError(f"{key}: not an absolute path: {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str | None) -> str:
        return '"none"' if value is None else f'"{value}"'


@dataclass(frozen=True, slots=True)
class RegexValue:
    """A regular expression; or none."""

    takes: ClassVar[str] = "a regular expression, or none"
    example: ClassVar[str] = '"login:"'

    def read(self, key: str, value: object) -> str | None:
        return self.read_option(key, quoted(key, value, f"write {key} = {self.example}"))

    def read_option(self, key: str, text: str) -> str | None:
        if text == "none":
            return None
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{key}: {show(text)}: {error}", hint=f"it takes {self.takes}") from None
        if not text.isprintable() or len(text) > MAX_REGEX:
            raise UsageError(
                f"{key} is too long, or has a control character", hint=f"at most {MAX_REGEX} characters"
            )
        return text

    def write(self, value: str | None) -> str:
        return '"none"' if value is None else json.dumps(value, ensure_ascii=False)


def parse_listen(text: str) -> Address:
    """`127.0.0.1:10809`, `[::1]:10809` or `localhost:10809` as (address, port).

    No other names: what a name stands for could change under a disk's URI.
    """
    if text.startswith("localhost:"):
        text = text.replace("localhost", "127.0.0.1", 1)
    hint = "write ADDRESS:PORT, such as 127.0.0.1:10809, [::1]:10809 or 0.0.0.0:10809"
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UsageError(f"not an address to listen on: {show(text)}", hint=hint)
    v6, v4, digits = match.groups()
    try:
        host = str(ipaddress.IPv6Address(v6) if v6 else ipaddress.IPv4Address(v4))
    except ValueError:
        raise UsageError(f"not an address to listen on: {show(text)}", hint=hint) from None
    if not 0 < int(digits) < 65536:
        raise UsageError(f"not a port: {digits}", hint="ports are 1 to 65535; NBD's own is 10809")
    return host, int(digits)


def quoted(key: str, value: object, hint: str) -> str:
    """The text that TOML holds for `key`. UsageError for what is none; `hint` says what would be right."""
    if not isinstance(value, str):
        raise UsageError(f"{key} is not a text in quotes: {_shown(value)}", hint=hint)
    return value


def _shown(value: object) -> str:
    try:
        return show(str(value))
    except ValueError:  # more digits than Python turns into text
        return "a huge number"
