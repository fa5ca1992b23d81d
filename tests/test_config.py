"""The configuration file: defaults, values, and one line for each mistake."""

import argparse
import dataclasses
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import config as config_module
from cdpserver.config import KEYS, Config, Key, Settings, add_options, load_config, parse_config, parse_listen
from cdpserver.config_values import (
    AddressValue,
    ChoiceValue,
    DurationValue,
    GroupValue,
    NumberValue,
    PathValue,
    ProgramValue,
    RegexValue,
    SizeValue,
    SpanValue,
    TimeOfDayValue,
)
from cdpserver.errors import NotFoundError, UsageError
from cdpserver.limits import MAX_DISK_SIZE
from cdpserver.retention.backups import BackupValue, RepositoryValue
from cdpserver.retention.policy import Policy, combine
from cdpserver.retention.slots import Rule
from cdpserver.retention.steps import Step
from cdpserver.service import main
from tests.core import ROOT

SECOND = 1_000_000_000
SECTIONS = ("export", "tls", "roles", "store", "scrub", "freeze", "policy")


def test_everything_has_a_default() -> None:
    config = parse_config("")
    assert config == Config()
    assert config.policy_bp_every_ns == 1200 * SECOND
    assert combine([config.policy]).policy == Policy()
    assert config.listen is config.listen_export is None


def test_every_key_is_read() -> None:
    text = """
        listen = "127.0.0.1:10809"
        listen_export = "[::1]:10809"
        listen_api = "127.0.0.1:8443"
        nbd_clients = 100
        durable_lag_limit = "2s"
        workers = 4
        socket_linger = "90s"
        [roles]
        viewer = "games"
        operator = "cdp-operators"
        admin = "_cdp.admin"
        [store]
        size_cap = "2T"
        lock_quota = 30
        prune_every = "10s"
        [export]
        verify = "reads"
        [scrub]
        rate = "none"
        every = "30d"
        [policy]
        rp_every = "5s"
        bp_every = "1h"
        keep_rp = "2d"
        keep_bp = "3d 9w"
        max_chain = 100
        size_cap = "1G"
        at_cap = "refuse"
        drill = "03:00"
        drill_command = "/etc/cdp/web"
        drill_marker = "login:"
        drill_check = "none"
        backup = "daily 02:00 keep 7d 4w 12m"
        backup_to = "/mnt/nas/backups"
        backup_copy = "s3://vault/site1?region=eu"
        mark_every = "1h"
        freeze = "yes"
        [tls]
        certificates = "/etc/cdpserver/tls"
        psk = "/etc/cdpserver/keys.psk"
        [freeze]
        before = "/usr/bin/true"
        after = "/etc/cdpserver/after freeze"
    """
    given = tomllib.loads(text)
    inner = {f"{section}.{name}" for section in SECTIONS for name in given.pop(section)}
    assert given.keys() | inner == {key.full_name for key in KEYS}
    assert parse_config(text) == Config(
        listen=("127.0.0.1", 10809),
        listen_export=("::1", 10809),
        listen_api=("127.0.0.1", 8443),
        nbd_clients=100,
        tls_certificates="/etc/cdpserver/tls",
        tls_psk="/etc/cdpserver/keys.psk",
        durable_lag_limit_ns=2 * SECOND,
        workers=4,
        socket_linger_ns=90 * SECOND,
        role_viewer="games",
        role_operator="cdp-operators",
        role_admin="_cdp.admin",
        store_size_cap=2 << 40,
        store_lock_quota=30,
        store_prune_every_ns=10 * SECOND,
        export_verify="reads",
        scrub_rate=None,
        scrub_every_ns=30 * 24 * 3600 * SECOND,
        policy_rp_every_ns=5 * SECOND,
        policy_bp_every_ns=3600 * SECOND,
        policy_keep_rp=(Step(48 * 3600 * SECOND),),
        policy_keep_bp=(Rule(3, "d"), Rule(9, "w")),
        policy_max_chain=100,
        policy_size_cap=1 << 30,
        policy_at_cap="refuse",
        policy_drill="03:00",
        policy_drill_command="/etc/cdp/web",
        policy_drill_marker="login:",
        policy_backup="daily 02:00 keep 7d 4w 12m",
        policy_backup_to="/mnt/nas/backups",
        policy_backup_copy="s3://vault/site1?region=eu",
        policy_mark_every_ns=3600 * SECOND,
        policy_freeze="yes",
        freeze_before="/usr/bin/true",
        freeze_after="/etc/cdpserver/after freeze",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisen = '127.0.0.1:1'", "did you mean listen?"),
        ("socket-linger = '1h'", "did you mean socket_linger?"),
        ("colour = 'red'", "known keys are listen"),
        ('"a\\u0000b" = 1', "unknown key"),
        ("listen = 10809", "listen is not a text"),
        ("listen = ['127.0.0.1:1']", "listen is not a text"),
        ("socket_linger = 1200", "socket_linger is not a text"),
        ("socket_linger = true", "socket_linger is not a text"),
        ("socket_linger = '20'", "socket_linger: not a duration"),
        ("socket_linger = '0s'", "socket_linger is out of range"),
        ("socket_linger = '1000d'", "socket_linger is out of range"),
        ("durable_lag_limit = '10ms'", "durable_lag_limit is out of range"),
        ("bp_every = '1h'", "unknown key 'bp_every' (write bp_every under [policy])"),
        ("size_cap = '1T'", "write size_cap under [policy] or [store]"),
        ("[policy]\nkeep_rp = '5m'", "[policy]: bp_every 20m is longer than keep_rp 5m"),
        ("[policy]\nkeep_bp = '1x'", "policy.keep_bp: not how many are kept: '1x'"),
        ("[policy]\nkeep_bp = 7", "policy.keep_bp is not a text"),
        ("[policy]\nat_cap = 'panic'", "it takes shorten or refuse"),
        ("[policy]\nsize_cap = '1M'", "it takes a size from 64M, or none"),
        ("[policy]\nsize_cap = 5", "policy.size_cap is not a text"),
        ("[store]\nsize_cap = '1.3x'", "store.size_cap: not a size"),
        ("socket_linger = '500ms'", "socket_linger is out of range"),
        ("socket_linger = '61m'", "it takes a duration from 1s to 1h"),
        ("workers = 0", "workers is out of range"),
        ("workers = 65", "it takes a whole number from 1 to 64"),
        ("workers = -1", "workers is out of range"),
        ("workers = 1.5", "workers is not a whole number"),
        ("workers = true", "workers is not a whole number"),
        ("workers = '2'", "workers is not a whole number"),
        ("workers = 0x" + "f" * 9000, "out of range: a huge number"),
        ("wrokers = 2", "did you mean workers?"),
        ("[workers]", "workers is not a whole number"),
        ("[rolls]\nviewer = 'x'", "unknown section 'rolls'"),
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
    path.write_text("socket_linger = '5m'")
    assert load_config(path).socket_linger_ns == 300 * SECOND
    for data in (b"\xff", b"x = 1", b"#" * (1 << 21)):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"cdp\.toml"):
            load_config(path)
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path)


# --- sections, shown on a key of the test's own


@pytest.fixture
def limits_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """`workers` moves to a section; the other keys stay at the top."""
    moved = [dataclasses.replace(key, section="limits") if key.name == "workers" else key for key in KEYS]
    monkeypatch.setattr(config_module, "KEYS", tuple(moved))


@pytest.mark.usefixtures("limits_section")
def test_a_section_is_read_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("socket_linger = '1h'\n[limits]\nworkers = 7\n")
    settings = Settings.collect(path)
    assert settings.config == Config(socket_linger_ns=3600 * SECOND, workers=7)
    assert settings.sources == {"socket_linger": str(path), "limits.workers": str(path)}
    assert tomllib.loads(settings.to_toml())["limits"] == {"workers": 7}
    assert parse_config(settings.to_toml()) == settings.config


@pytest.mark.usefixtures("limits_section")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limit]\nworkers = 1", "unknown section 'limit' (did you mean [limits]?)"),
        (
            "[zzz]\nred = 1",
            "unknown section 'zzz' (known sections are [limits], [tls], [roles], [store], [export], [scrub], [freeze], [policy])",
        ),
        ("limits = 1", "unknown section 'limits'"),
        ("[limits]\nworker = 1", "unknown key 'limits.worker' (did you mean limits.workers?)"),
        ("[limits]\nsocket_linger = '1h'", "write socket_linger above the first [section]"),
        ("workers = 1", "write workers under [limits]"),
        ("[limits]\nworkers = 99", "limits.workers is out of range"),
    ],
)
def test_a_mistake_in_a_section(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text)
    assert message in str(caught.value)


# --- the command line, --show-config, the document


def chosen(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("listen = '127.0.0.1:1'\nlisten_export = '127.0.0.1:2'\nworkers = 2\n")
    settings = Settings.collect(path, chosen("--listen", "[::1]:3", "--workers", "5"))
    assert settings.config == Config(listen=("::1", 3), listen_export=("127.0.0.1", 2), workers=5)
    assert settings.sources == {
        "listen": "the option --listen",
        "listen_export": str(path),
        "workers": "the option --workers",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers is out of range"),
        (["--workers=-3"], "--workers is out of range"),
        (["--workers", "two"], "--workers is not a whole number: 'two'"),
        (["--workers", "9" * 5000], "--workers is not a whole number"),
        (["--workers", "٣"], "--workers is not a whole number"),
        (["--listen", "here"], "--listen: not an address"),
        (["--listen-export", "1.2.3.4:0"], "--listen-export: not a port"),
        (["--listen", "1.2.3.4:5", "--listen-export", "1.2.3.4:5"], "the same"),
    ],
)
def test_a_mistake_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.collect(None, chosen(*arguments))
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and caught.value.hint


ADDRESSES = st.none() | st.tuples(
    st.ip_addresses().map(str).filter(lambda text: "%" not in text), st.integers(1, 65535)
)


TOGETHER: dict[str, st.SearchStrategy[object]] = {
    "policy.bp_every": st.integers(3600 * SECOND, 7 * 86_400 * SECOND),
    "policy.keep_rp": st.builds(
        lambda span, every: (Step(span),) if not every else (Step(86_400 * SECOND), Step(span, every)),
        st.integers(7 * 86_400 * SECOND, 14 * 86_400 * SECOND),
        st.integers(SECOND, 86_400 * SECOND) | st.just(0),
    ),
    "policy.keep_bp": st.just(()) | st.tuples(st.builds(Rule, st.integers(2, 9999), st.just("w"))),
}
"""Values of a policy that go together, whichever are chosen."""


def values_of(key: Key) -> st.SearchStrategy[object]:
    if key.full_name in TOGETHER:
        return TOGETHER[key.full_name]
    match key.kind:
        case AddressValue():
            return ADDRESSES
        case DurationValue(least=least, most=most) | NumberValue(least=least, most=most):
            return st.integers(least, most)
        case GroupValue():
            return st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", fullmatch=True)
        case SizeValue(least=least):
            return st.none() | st.integers(least // 512, MAX_DISK_SIZE // 512).map(lambda n: n * 512)
        case ChoiceValue(words):
            return st.sampled_from(words)
    return text_values_of(key)


def text_values_of(key: Key) -> st.SearchStrategy[object]:
    match key.kind:
        case SpanValue(least=least, most=most):
            return st.none() | st.integers(least, most)
        case ProgramValue():
            return st.none() | st.from_regex(r"/[A-Za-z0-9_./ -]{1,40}", fullmatch=True)
        case TimeOfDayValue():
            return (
                st.none()
                | st.times().map(lambda time: f"{time:%H:%M}")
                | st.times().map("{:%H:%M:%S}".format)
            )
        case BackupValue():
            return st.none() | st.sampled_from(
                ["hourly", "daily 02:00 keep 7d 4w", "weekly sun 23:59 keep none"]
            )
        case RepositoryValue():
            return st.none() | st.sampled_from(['/mnt/nas/b "x"', "s3://b/p?region=eu", "0" * 32])
        case PathValue():
            return st.none() | st.from_regex(r"/[a-z/. #'é]{0,40}", fullmatch=True)
        case RegexValue():
            return st.none() | st.sampled_from(["login:", r"^\[ OK \] \w+ \"ü\"", "a|b", "[\\\\]"])
    raise AssertionError(f"say here what {key.full_name} can be")


CONFIGS = (
    st.builds(Config, **{key.attribute: values_of(key) for key in KEYS})
    .filter(
        lambda config: (
            len({config.listen, config.listen_export, config.listen_api, None})
            == 1
            + sum(1 for one in (config.listen, config.listen_export, config.listen_api) if one is not None)
            and (config.policy_backup is None or config.policy_backup_to is not None)
        )
    )
    .map(lambda config: config if config.tls_certificates else replace(config, tls_certificates="/c"))
)


@given(CONFIGS, st.text(st.characters(categories=None)))
def test_what_is_shown_is_read_as_the_same(config: Config, source: str) -> None:
    text = Settings(config, {"workers": source}).to_toml()
    assert parse_config(text) == config
    assert all(line.isprintable() for line in text.split("\n"))


def test_show_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key with its story and what set it; nothing is made on disk."""
    path = tmp_path / "c.toml"
    path.write_text("socket_linger = '5m'\n")
    state = tmp_path / "state"
    main.main(["--config", str(path), "--workers", "2", "--state-dir", str(state), "--show-config"])
    shown = capsys.readouterr().out
    assert parse_config(shown) == Config(socket_linger_ns=300 * SECOND, workers=2)
    assert f'# Set by: {path}.\nsocket_linger = "5m"\n' in shown
    assert "# Set by: the option --workers.\nworkers = 2\n" in shown
    assert '# Set by: default.\ndurable_lag_limit = "5s"\n' in shown
    flowing = shown.replace("\n# ", " ")
    assert all(key.doc in flowing and key.kind.takes in flowing for key in KEYS)
    assert not state.exists()


def test_show_config_says_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text("worker = 2\n")
    with pytest.raises(SystemExit) as caught:
        main.main(["--config", str(path), "--show-config"])
    assert caught.value.code == 2
    assert "did you mean workers?" in capsys.readouterr().err


def test_every_attribute_has_one_key() -> None:
    assert sorted(key.attribute for key in KEYS) == sorted(field.name for field in dataclasses.fields(Config))
    assert len({key.full_name for key in KEYS}) == len(KEYS)


def test_the_document_has_every_key() -> None:
    """docs/configuration.md, row by row."""
    document = (ROOT / "docs" / "configuration.md").read_text()
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\| `.*", document, re.MULTILINE)
    ]
    assert rows == [
        [key.full_name, key.flag if key.option else "", key.kind.takes, key.default, key.doc] for key in KEYS
    ]
    example = re.search(r"```toml\n(.*?)```", document, re.DOTALL)
    assert example is not None
    parse_config(example[1])
