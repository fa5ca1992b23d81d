"""The configuration file: defaults, values, and one line for each mistake."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.config import KEYS, Config, load_config, parse_config, parse_listen
from cdpserver.errors import NotFoundError, UsageError

SECOND = 1_000_000_000


def test_everything_has_a_default() -> None:
    config = parse_config("")
    assert config == Config()
    assert config.bp_every_ns == 1200 * SECOND
    assert config.listen is config.listen_export is None


def test_every_key_is_read() -> None:
    text = """
        listen = "127.0.0.1:10809"
        listen_export = "[::1]:10809"
        bp_every = "1h"
        durable_lag_limit = "2s"
    """
    assert all(key in text for key in KEYS)
    assert parse_config(text) == Config(
        listen=("127.0.0.1", 10809),
        listen_export=("::1", 10809),
        bp_every_ns=3600 * SECOND,
        durable_lag_limit_ns=2 * SECOND,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisen = '127.0.0.1:1'", "did you mean listen?"),
        ("bp-every = '1h'", "did you mean bp_every?"),
        ("colour = 'red'", "known are listen"),
        ('"a\\u0000b" = 1', "unknown key"),
        ("listen = 10809", "listen is not a text"),
        ("listen = ['127.0.0.1:1']", "listen is not a text"),
        ("bp_every = 1200", "bp_every is not a text"),
        ("bp_every = true", "bp_every is not a text"),
        ("bp_every = '20'", "bp_every: not a duration"),
        ("bp_every = '0s'", "bp_every is out of range"),
        ("bp_every = '1000d'", "bp_every is out of range"),
        ("durable_lag_limit = '10ms'", "durable_lag_limit is out of range"),
        ("listen = 'here'", "listen: not an address"),
        ("listen = '[::1]:1'\nlisten_export = '[::1]:1'", "the same"),
        ("listen = ", "not TOML"),
        ("listen = 'a'\nlisten = 'b'", "not TOML"),
        ("[listen]\nhost = 'x'", "listen is not a text"),
        ("x = " + "[" * 5000, "not TOML"),
        ("\0", "not TOML"),
    ],
)
def test_a_mistake_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", ("127.0.0.1", 10809)),
        ("localhost:10809", ("127.0.0.1", 10809)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:10809", ("::1", 10809)),
        ("[::]:65535", ("::", 65535)),
        ("[2001:DB8:0::1]:1", ("2001:db8::1", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "127.0.0.1",
        "127.0.0.1:",
        ":10809",
        "::1:10809",
        "[::1]",
        "[::1]10809",
        "host.example:10809",
        "*:10809",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "256.0.0.1:1",
        "1.2.3:1",
        "[1.2.3.4]:1",
        "[::1:1",
        "127.0.0.1:٣",
        "127.0.0.1:1\n",
        "127.0.0.1:1\0",
        "\udc80:1",
        "127.0.0.1:" + "9" * 5000,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_listen(text)
    assert str(caught.value).isprintable()


@given(st.text(st.characters(categories=None)))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    for parse in (parse_listen, parse_config):
        try:
            parse(text)
        except UsageError:
            continue


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "cdp.toml"
    with pytest.raises(NotFoundError):
        load_config(path)
    path.write_text("bp_every = '5m'")
    assert load_config(path).bp_every_ns == 300 * SECOND
    for data in (b"\xff", b"x = 1", b"#" * (1 << 21)):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"cdp\.toml"):
            load_config(path)
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path)
