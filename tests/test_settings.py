"""Every setting has its rule, and a wrong one is one readable line."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest

from app.settings import SettingError, Settings, load, rules, variable

ROOT = Path(__file__).parent.parent
RULES = dict(rules())
# What else has to change for a value at the end of its own range.
PARTNERS = {
    "heartbeat_seconds": {"SSE_HISTORY_SECONDS": "86400", "SSE_MAX_AGE_SECONDS": "86400"},
    "history_seconds": {"SSE_HEARTBEAT_SECONDS": "0.02"},
    "max_age_seconds": {"SSE_HEARTBEAT_SECONDS": "0.02"},
    "max_event_bytes": {"SSE_MAX_BODY_BYTES": "134217728"},
    "max_body_bytes": {"SSE_MAX_EVENT_BYTES": "1"},
}


def of_kind(*kinds: str) -> list[str]:
    return [name for name, rule in RULES.items() if rule.kind in kinds]


def refused(environ: dict[str, str]) -> str:
    """Return the text with which *environ* is refused; it must be one line."""
    with pytest.raises(SettingError) as caught:
        load(environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestDefaults:
    def test_nothing_is_set(self):
        """
        Every setting has a default that fits with all others.
        """
        assert Settings() == load({})

    def test_other_variables(self):
        """
        Variables of others are none of our business.
        """
        assert Settings() == load({"PATH": "/bin", "sse_port": "1", "XSSE_PORT": "x"})

    @pytest.mark.parametrize("name", RULES)
    def test_default_keeps_its_own_rule(self, name):
        """
        A default, written down as a variable, is read back as the same.
        """
        default = getattr(Settings(), name)
        text = ("on" if default else "off") if isinstance(default, bool) else str(default)

        assert default == getattr(load({variable(name): text}), name)

    def test_every_setting_says_what_it_is(self):
        """
        The table in the README is made from these sentences.
        """
        assert all(rule.about.endswith(".") for rule in RULES.values())
        assert [field.name for field in fields(Settings)] == list(RULES)


class TestNumbers:
    @pytest.mark.parametrize("name", of_kind("seconds", "count"))
    @pytest.mark.parametrize("end", ["low", "high"])
    def test_ends_of_the_range(self, name, end):
        """
        Both ends of a range belong to it.
        """
        value = getattr(RULES[name], end)
        text = f"{value:f}" if RULES[name].kind == "seconds" else str(int(value))

        assert value == getattr(load(PARTNERS.get(name, {}) | {variable(name): text}), name)

    @pytest.mark.parametrize("name", of_kind("seconds", "count"))
    def test_outside_of_the_range(self, name):
        """
        What is outside is refused with name, rule, value and cure.
        """
        rule = RULES[name]
        step = 0.001 if rule.kind == "seconds" else 1
        for value in (rule.low - step, rule.high + step):
            shown = f"{value:f}" if rule.kind == "seconds" else str(int(value))
            text = refused({variable(name): shown})

            assert text.startswith(f"{variable(name)} must be ")
            assert f"got '{shown}'. " in text
            assert re.search(r" from \d.* to \d", text)
            assert text.endswith(rule.about)

    @pytest.mark.parametrize("name", of_kind("seconds", "count"))
    @pytest.mark.parametrize(
        "text", ["", " ", "nan", "NaN", "inf", "-inf", "1e999", "ten", "1,5", "1 s", "0x10", "--1"]
    )
    def test_no_number(self, name, text):
        """
        What is no number, or none that one can wait for, is refused.
        """
        assert f"got {text.strip()!r}" in refused({variable(name): text})

    @pytest.mark.parametrize("name", of_kind("count"))
    def test_fraction_of_a_count(self, name):
        """
        Counts are whole numbers; nothing is rounded.
        """
        assert "must be a whole number from " in refused({variable(name): "5.5"})

    @pytest.mark.parametrize("text", ["0.25", " 0.25 ", ".25", "25e-2"])
    def test_fraction_of_a_second(self, text):
        """
        Durations accept fractions, so that tests scale the whole ladder.
        """
        assert 0.25 == load({"SSE_HEARTBEAT_SECONDS": text}).heartbeat_seconds


class TestChoices:
    @pytest.mark.parametrize("name", of_kind("choice"))
    def test_choices(self, name):
        """
        Each choice is accepted, and anything else refused with the list of them.
        """
        # What a choice needs beside it.
        needs = {"jwt": {"SSE_JWT_SECRET": "s" * 32}}
        for choice in RULES[name].choices:
            if (name, choice) != ("env", "production"):
                assert choice == getattr(load({variable(name): choice} | needs.get(choice, {})), name)

        assert "must be one of " + ", ".join(RULES[name].choices) in refused({variable(name): "other"})

    @pytest.mark.parametrize("name", of_kind("switch"))
    @pytest.mark.parametrize("text", ["on", "ON", "true", "1", "yes", "off", "False", "0", "no"])
    def test_switch(self, name, text):
        """
        A switch understands the usual words.
        """
        assert (text.lower() in ("on", "true", "1", "yes")) is getattr(load({variable(name): text}), name)

    @pytest.mark.parametrize("name", of_kind("switch"))
    @pytest.mark.parametrize("text", ["", "maybe", "2", "onn"])
    def test_no_switch(self, name, text):
        """
        A switch that is neither on nor off is refused.
        """
        assert f"{variable(name)} must be on or off, got {text!r}. " in refused({variable(name): text})


class TestNames:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("SSE_HEARTBEAT", "SSE_HEARTBEAT_SECONDS"),
            ("SSE_HEARTBEAT_SECOND", "SSE_HEARTBEAT_SECONDS"),
            ("SSE_METRIC_PORT", "SSE_METRICS_PORT"),
            ("SSE_REDIS_URI", "SSE_REDIS_URL"),
        ],
    )
    def test_misspelt(self, name, meant):
        """
        A misspelt name would be ignored silently otherwise; the nearest one is named.
        """
        assert f"{name} must be the name of a setting, got '{name}'. Did you mean {meant}?" == refused({name: "9"})

    def test_nothing_near(self):
        """
        Where none is near, the README has the list.
        """
        assert refused({"SSE_QQQQQQ": "1"}).endswith("See the settings in README.md.")

    def test_value_of_a_misspelt_name(self):
        """
        Its value may be a password, and is not shown.
        """
        assert "secret" not in refused({"SSE_REDIS_URI": "redis://:secret@host"})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("SSE_APP_SERVICE_HOST", "10.0.0.1"),
            ("SSE_APP_SERVICE_PORT", "8000"),
            ("SSE_APP_SERVICE_PORT_HTTP", "8000"),
            ("SSE_APP_PORT", "tcp://10.0.0.1:8000"),
            ("SSE_APP_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
            ("SSE_APP_PORT_8000_TCP_PROTO", "tcp"),
        ],
    )
    def test_variables_of_kubernetes(self, name, value):
        """
        Kubernetes gives every pod variables for every Service; those are no misspelt settings.
        """
        assert Settings() == load({name: value})


class TestTogether:
    def test_production_without_authentication(self):
        """
        `none` is for trying things out, and refused in production.
        """
        assert refused({"SSE_ENV": "production"}).startswith("SSE_AUTH must be other than 'none' in production")

    def test_heartbeat_and_history(self):
        """
        Positions are renewed with heartbeats, so four of them fit into the history.
        """
        assert load({"SSE_HEARTBEAT_SECONDS": "2", "SSE_HISTORY_SECONDS": "8"})
        assert "at most a quarter of SSE_HISTORY_SECONDS (7.9)" in refused(
            {"SSE_HEARTBEAT_SECONDS": "2", "SSE_HISTORY_SECONDS": "7.9"}
        )

    def test_heartbeat_and_age(self):
        """
        A stream lives for a heartbeat at least.
        """
        assert "at most SSE_MAX_AGE_SECONDS (14)" in refused({"SSE_MAX_AGE_SECONDS": "14"})

    def test_event_and_body(self):
        """
        The largest event fits into the largest body.
        """
        assert "at most SSE_MAX_BODY_BYTES (1000)" in refused({"SSE_MAX_BODY_BYTES": "1000"})

    @pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a\nb"])
    def test_key_prefix(self, prefix):
        """
        The prefix becomes the hash tag of all keys.
        """
        assert "SSE_KEY_PREFIX must be text without braces and spaces" in refused({"SSE_KEY_PREFIX": prefix})

    @pytest.mark.parametrize("name", ["SSE_HOST", "SSE_METRICS_HOST"])
    def test_no_address(self, name):
        """
        An empty address would listen on all of them, which nobody has said.
        """
        assert f"{name} must be an address, got ''. " in refused({name: ""})


class TestRedisUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://localhost:6379/3",
            "redis://[::1]:6379",
            "redis://user:p%40ss@host:1/0?client_name=kit",
            "rediss://host?ssl_cert_reqs=none&ssl_ca_certs=/etc/ca.pem",
            "unix:///run/redis.sock?db=2",
            "unix://:pw@/run/redis.sock",
        ],
    )
    def test_url(self, url):
        """
        Everything that names a server, its database, and how to trust it.
        """
        assert url == load({"SSE_REDIS_URL": url}).redis_url

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:6379",
            "redis:localhost",
            "http://localhost",
            "redis://localhost:port",
            "redis://localhost:99999",
            "redis://[::1",
            "redis://localhost/database",
            "unix://",
        ],
    )
    def test_no_url(self, url):
        """
        What the client library would stumble over later is refused at the start.
        """
        assert "SSE_REDIS_URL must be redis://host:port/number" in refused({"SSE_REDIS_URL": url})

    @pytest.mark.parametrize(
        "url",
        [
            "redis+sentinel://one/main",
            "redis+sentinel://one:26379,two,[::1]:26380/main/3",
            "rediss+sentinel://user:p%40ss@one:26379/main?sentinel_password=x&ssl_ca_certs=/ca.pem",
        ],
    )
    def test_sentinels(self, url):
        """
        Sentinels, the master's name, its database; passwords of both.
        """
        assert url == load({"SSE_REDIS_URL": url}).redis_url

    @pytest.mark.parametrize(
        "url",
        [
            "redis+sentinel://one:26379",
            "redis+sentinel:///main",
            "redis+sentinel://one:port/main",
            "redis+sentinel://one,/main",
            "redis+sentinel://one/main/x",
        ],
    )
    def test_wrong_sentinels(self, url):
        """
        A master without a name, or an address that is none, is refused at the start.
        """
        assert "SSE_REDIS_URL must be redis+sentinel://host:port,host:port/master/number" in refused(
            {"SSE_REDIS_URL": url}
        )

    def test_wrong_options_of_sentinels(self):
        """
        The timeouts are the kit's there, too; and no password is shown.
        """
        said = refused({"SSE_REDIS_URL": "redis+sentinel://u:secret@one/main?socket_timeout=9"})

        assert "a URL with no other options than db, " in said
        assert "secret" not in said

    @pytest.mark.parametrize(
        "query", ["socket_timeout=99", "retry_on_timeout=1", "foo=bar", "db=x", "ssl_cert_reqs=maybe"]
    )
    def test_options(self, query):
        """
        Options that would override the kit's timeouts, or that nobody knows, are refused.
        """
        assert "a URL with no other options than db, " in refused({"SSE_REDIS_URL": f"redis://localhost?{query}"})

    @pytest.mark.parametrize(
        "url", ["http://user:secret@host", "redis://u:sec@ret@host:x", "redis://h?password=secret"]
    )
    def test_password(self, url):
        """
        A refused URL is shown without its password.
        """
        assert "sec" not in refused({"SSE_REDIS_URL": url})


class TestStart:
    """`python -m app` with a wrong setting: one line on standard error, status 2."""

    @staticmethod
    def start(**environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SSE_")}
        return subprocess.run(
            [sys.executable, "-m", "app"],
            cwd=ROOT,
            env=clean | environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @pytest.mark.parametrize(
        "environ",
        [
            {"SSE_HEARTBEAT_SECONDS": "nan"},
            {"SSE_HARTBEAT_SECONDS": "1"},
            {"SSE_REDIS_URL": "redis://localhost:port"},
            {"SSE_ENV": "production"},
        ],
    )
    def test_wrong_setting(self, environ):
        """
        No traceback, and nothing else.
        """
        done = self.start(**environ)

        assert 2 == done.returncode
        assert "" == done.stdout
        [line] = done.stderr.splitlines()
        assert re.fullmatch(r"SSE_\w+ must be .*, got .*\. .+[.?]", line)


class TestAuthentication:
    """Where the keys are, said once and whole."""

    JWT: ClassVar = {"SSE_AUTH": "jwt"}

    @pytest.mark.parametrize(
        ("environ", "rule"),
        [
            ({}, "exactly one of SSE_JWT_SECRET_FILE, SSE_JWT_SECRET, SSE_JWKS_FILE and SSE_JWKS_URL"),
            ({"SSE_JWT_SECRET": "s" * 32, "SSE_JWKS_FILE": "/keys"}, "exactly one of"),
            ({"SSE_JWT_SECRET": "s" * 31}, "at least 32 bytes"),
            ({"SSE_JWKS_URL": "ftp://id.example/keys"}, "https:// or http:// URL"),
            ({"SSE_JWKS_URL": "https:///keys"}, "https:// or http:// URL"),
            ({"SSE_JWT_SECRET": "s" * 32, "SSE_JWT_ALGORITHMS": "RS256"}, "of HS256, which"),
            ({"SSE_JWKS_FILE": "/keys", "SSE_JWT_ALGORITHMS": "RS256 HS256"}, "of RS256, ES256, EdDSA, which"),
            ({"SSE_JWKS_FILE": "/keys", "SSE_JWT_ALGORITHMS": "none"}, "of RS256, ES256, EdDSA, which"),
        ],
    )
    def test_refused(self, environ, rule):
        """Neither none nor two sources, no short secret, no algorithm that its keys do not have."""
        assert rule in refused(self.JWT | environ)

    def test_keys_without_authentication(self):
        """Whoever gives keys means them to count."""
        assert "SSE_AUTH must be 'jwt' where SSE_JWKS_FILE is set" in refused({"SSE_JWKS_FILE": "/keys"})

    def test_the_secret_stays_one(self):
        """Neither a refusal nor the settings' own text shows it."""
        secret = "tell nobody" * 2
        assert secret not in refused(self.JWT | {"SSE_JWT_SECRET": secret})
        assert "secret of 32" not in repr(load(self.JWT | {"SSE_JWT_SECRET": "secret of 32 bytes and some more."}))

    @pytest.mark.parametrize(
        "origin", ["*", "null", "https://*.example", "app.example", "https://app.example/", "https://App.example", "ftp://a"]
    )
    def test_origins(self, origin):
        """Each origin is named as browsers send it; all of them is no choice where credentials go along."""
        assert "SSE_CORS_ORIGINS must be origins as browsers send them" in refused({"SSE_CORS_ORIGINS": origin})

    def test_several_origins(self):
        """Spaces or commas stand between them."""
        settings = load({"SSE_CORS_ORIGINS": "https://a.example, http://localhost:3000 https://[::1]:8443"})

        assert ("https://a.example", "http://localhost:3000", "https://[::1]:8443") == settings.origins()
