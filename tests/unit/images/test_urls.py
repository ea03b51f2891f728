"""The URL policy without a network: which URLs, which hosts, which addresses."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import SourceRefused
from sightline.settings import ImageSettings
from sightline.sources import Sources, check_url, is_fetchable
from sightline.wire import ImageUrl


def policy(*hosts: str, **more: object) -> ImageSettings:
    return ImageSettings(_env_file=None, url_hosts=hosts, **more)


OPEN = policy("*", url_allow_http=True)


def refused(url: str, settings: ImageSettings) -> str:
    with pytest.raises(SourceRefused) as caught:
        check_url(url, settings)
    return caught.value.code


def test_is_off_by_default():
    assert refused("https://example.com/a.png", ImageSettings(_env_file=None)) == "url_not_allowed"


class TestScheme:
    def test_https_only_by_default(self):
        assert check_url("https://a.example/", policy("*")).scheme == "https"
        assert refused("http://a.example/", policy("*")) == "url_not_allowed"

    @pytest.mark.parametrize(
        "url", ["ftp://a.example/", "file:///etc/passwd", "//a.example/", "a.example", "", "https:a"]
    )
    def test_others_never(self, url):
        assert refused(url, OPEN) == "url_invalid"


class TestShape:
    @pytest.mark.parametrize(
        "url",
        [
            pytest.param("https://user@a.example/", id="user"),
            pytest.param("https://user:pw@a.example/", id="password"),
            pytest.param("https://@a.example/", id="empty user"),
            pytest.param("https://allowed.example\\@evil.example/", id="CVE-2026-24779, backslash"),
            pytest.param("https://evil.example\\.allowed.example/", id="backslash in the host"),
            pytest.param("https://a.example/\\", id="backslash in the path"),
            pytest.param("https://a.example/\r\nHost: evil", id="header injection"),
            pytest.param("https://a.exa\tmple/", id="tab, which urlsplit drops"),
            pytest.param(" https://a.example/", id="leading blank"),
            pytest.param("https://a.example/a b", id="blank"),
            pytest.param("https://a.example/\u3000", id="ideographic space"),
            pytest.param("https://a.example/\u202egnp", id="right-to-left override"),
            pytest.param("https://a.example/\x00", id="NUL"),
            pytest.param("https://a.example/\x7f", id="DEL"),
            pytest.param("https://", id="no host"),
            pytest.param("https:///a", id="empty host"),
            pytest.param("https://:443/", id="port alone"),
            pytest.param("https://a.example:/x:y:z", id="port without a number"),
            pytest.param("https://a.example:0/", id="port 0"),
            pytest.param("https://a.example:65536/", id="port beyond"),
            pytest.param("https://a.example:٤٤٣/", id="port in Arabic digits"),
            pytest.param("https://a..example/", id="empty label"),
            pytest.param("https://a.example../", id="two dots at the end"),
            pytest.param("https://.a.example/", id="leading dot"),
            pytest.param("https://-a.example/", id="leading hyphen"),
            pytest.param("https://%61.example/", id="escaped host"),
            pytest.param("https://a.example%00.evil/", id="escaped NUL"),
            pytest.param("https://a*.example/", id="asterisk"),
            pytest.param("https://" + "a" * 64 + ".example/", id="label of 64"),
            pytest.param("https://" + "a." * 130 + "example/", id="name of 267"),
            pytest.param("https://a.example/" + "x" * 9000, id="too long"),
            pytest.param("https://[::1", id="open bracket"),
            pytest.param("https://[::1]evil.example/", id="text behind a bracket"),
            pytest.param("https://[::1%25eth0]/", id="zone"),
            pytest.param("https://[v1.x]/", id="future address"),
            pytest.param("https://[127.0.0.1]/", id="IPv4 in brackets"),
            pytest.param("https://a.example/\ud800", id="surrogate"),
            pytest.param("https://\ud800.example/", id="surrogate in the host"),
        ],
    )
    def test_is_not_plain(self, url):
        assert refused(url, OPEN) == "url_invalid"

    @pytest.mark.parametrize(
        "host",
        ["2130706433", "0x7f000001", "0x7f.1", "0x7f.0.0.1", "017700000001", "0177.0.0.1", "127.1", "127.0.1", "1", "0",
         "127.0.0.01", "127.0.0.0x1", "a.example.1", "1.2.3.4.5", "256.1.1.1", "0x", "evil.0x7f"],
    )  # fmt: skip
    def test_odd_forms_of_ipv4_are_refused(self, host):
        assert refused(f"https://{host}/", OPEN) == "url_invalid"
        assert refused(f"https://{host}./", OPEN) == "url_invalid"

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://A.Example", "https://a.example/"),
            ("HTTPS://a.example.:443/x", "https://a.example/x"),
            ("https://a.example?q", "https://a.example/?q"),
            ("https://a.example#f", "https://a.example/"),
            ("https://a.example#@evil.example/", "https://a.example/"),
            ("https://a.example/@evil.example/", "https://a.example/@evil.example/"),
            ("https://a.example//evil.example/", "https://a.example//evil.example/"),
            ("https://a.example/ü?ß=%20&b=[1]", "https://a.example/%C3%BC?%C3%9F=%20&b=[1]"),
            ("https://a.example/%2e%2e/%00", "https://a.example/%2e%2e/%00"),
            ("https://münchen.example/", "https://xn--mnchen-3ya.example/"),
            ("https://a。example/", "https://a.example/"),
            ("https://ａ.example/", "https://a.example/"),
            ("https://１２７.０.０.１/", "https://127.0.0.1/"),
            ("https://my_bucket.a.example/", "https://my_bucket.a.example/"),
            ("https://[2001:DB8::0:1]:443/", "https://[2001:db8::1]/"),
            ("https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/"),
        ],
    )
    def test_is_normalised_and_rebuilt(self, url, expected):
        target = check_url(url, OPEN)
        assert target.text.replace("::ffff:127.0.0.1", "::ffff:7f00:1") == expected
        assert check_url(target.text, OPEN) == target


class TestHosts:
    @pytest.mark.parametrize(
        ("glob", "url"),
        [
            ("allowed.example", "https://allowed.example/"),
            ("allowed.example", "https://ALLOWED.example./"),
            ("Allowed.Example", "https://allowed.example/"),
            ("*.allowed.example", "https://cdn.allowed.example/"),
            ("*.allowed.example", "https://a.b.allowed.example/"),
            ("allowed.example:8443", "https://allowed.example:8443/"),
            ("*:8443", "https://anything.example:8443/"),
            ("allowed.example:443", "https://allowed.example/"),
            ("93.184.216.34", "https://93.184.216.34/"),
            ("[2606:2800::1]", "https://[2606:2800::1]/"),
            ("[2606:2800::1]:8443", "https://[2606:2800::1]:8443/"),
        ],
    )
    def test_is_allowed(self, glob, url):
        assert check_url(url, policy("other.example", glob))

    @pytest.mark.parametrize(
        ("glob", "url"),
        [
            ("allowed.example", "https://allowed.example.evil.com/"),
            ("allowed.example", "https://evil.com/allowed.example"),
            ("allowed.example", "https://evil.com/?allowed.example"),
            ("allowed.example", "https://evil.com#allowed.example"),
            ("allowed.example", "https://evilallowed.example/"),
            ("allowed.example", "https://sub.allowed.example/"),
            ("allowed.example", "https://allowedxexample/"),
            ("allowed.example", "https://allowed.example:8443/"),
            ("allowed.example", "https://allowed.example:80/"),
            ("allowed.example", "https://xn--llowed-8ta.example/"),
            ("allowed.example", "https://аllowed.example/"),  # Cyrillic а
            ("*.allowed.example", "https://allowed.example/"),
            ("*.allowed.example", "https://evilallowed.example/"),
            ("*.allowed.example", "https://a.allowed.example.evil.com/"),
            ("allowed.example:8443", "https://allowed.example/"),
            ("*", "https://allowed.example:22/"),
            ("[a-z].example", "https://b.example/"),
            ("a?.example", "https://ab.example/"),
        ],
    )
    def test_is_not_allowed(self, glob, url):
        assert refused(url, policy(glob)) == "url_not_allowed"


GLOBAL = ["93.184.216.34", "8.8.8.8", "1.1.1.1", "2606:2800:220:1::1", "2a00:1450:4001:81b::200e", "64:ff9b::808:808",
          "::ffff:8.8.8.8"]  # fmt: skip
PRIVATE = ["127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
           "100.127.255.255", "198.18.0.1", "192.0.2.1", "203.0.113.9", "240.0.0.1", "0.0.0.1", "192.0.0.8",
           "::1", "fd00::1", "fc00::1", "fec0::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "2002:808:808::1",
           "3fff::1", "100::1", "5f00::1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "::ffff:127.0.0.1",
           "::ffff:10.0.0.1", "::7f00:1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2606:2800::5efe:7f00:1",
           "2606:2800::200:5efe:a00:1"]  # fmt: skip
NEVER = ["0.0.0.0", "169.254.169.254", "169.254.170.2", "224.0.0.1", "239.255.255.250", "255.255.255.255",
         "168.63.129.16", "192.0.0.192", "100.100.100.200", "::", "fe80::1", "ff02::1", "fd00:ec2::254",
         "fd20:ce::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"]  # fmt: skip


class TestAddresses:
    @pytest.mark.parametrize("text", GLOBAL)
    def test_global_ones_are_fetched(self, text):
        assert is_fetchable(ipaddress.ip_address(text))

    @pytest.mark.parametrize("text", PRIVATE + NEVER)
    def test_others_are_not(self, text):
        assert not is_fetchable(ipaddress.ip_address(text))

    @pytest.mark.parametrize("text", ["127.0.0.1", "10.0.0.1", "192.168.0.1", "::1", "fd00::1", "::ffff:127.0.0.1"])
    def test_private_ones_are_when_a_test_allows(self, text):
        assert is_fetchable(ipaddress.ip_address(text), allow_private=True)

    @pytest.mark.parametrize("text", NEVER)
    def test_metadata_and_multicast_are_never(self, text):
        assert not is_fetchable(ipaddress.ip_address(text), allow_private=True)

    @given(st.ip_addresses())
    def test_agrees_with_the_standard_library_where_that_says_private(self, address):
        if not address.is_global or address.is_multicast:
            assert not is_fetchable(address) or getattr(address, "ipv4_mapped", None)

    @given(st.ip_addresses(v=4))
    def test_an_address_in_disguise_is_judged_as_itself(self, inner):
        for outer in (f"::ffff:{inner}", f"64:ff9b::{inner}"):
            assert is_fetchable(ipaddress.ip_address(outer)) == is_fetchable(inner)


class TestLiteralHosts:
    """Allowed by name (`*`), refused by address, before any connection."""

    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1", "0.0.0.0", "169.254.169.254", "10.1.2.3", "100.64.0.1", "192.168.0.1", "[::1]", "[::]",
         "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fd00::1]", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
         "[::127.0.0.1]", "１２７.０.０.１", "127。0。0。1"],
    )  # fmt: skip
    async def test_are_refused(self, host):
        sources = Sources(OPEN, resolve=never)
        with pytest.raises(SourceRefused) as caught:
            await sources.fetch(ImageUrl(f"http://{host}/latest/meta-data/"))
        assert caught.value.code == "url_address_not_allowed"
        await sources.aclose()

    @pytest.mark.parametrize("name", ["localhost", "localhost.", "LOCALHOST"])
    async def test_localhost_by_the_systems_resolver(self, name):
        sources = Sources(OPEN)
        with pytest.raises(SourceRefused) as caught:
            await sources.fetch(ImageUrl(f"http://{name}/"))
        assert caught.value.code == "url_address_not_allowed"
        await sources.aclose()


class TestNames:
    @pytest.mark.parametrize(
        "answers",
        [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["10.0.0.1", "93.184.216.34"], ["::1"], ["fe80::1%eth0"],
         ["93.184.216.34"] * 9 + ["169.254.169.254"]],
    )  # fmt: skip
    async def test_one_bad_address_refuses_the_name(self, answers):
        sources = Sources(OPEN, resolve=lambda host, port: answering(answers))
        with pytest.raises(SourceRefused) as caught:
            await sources.fetch(ImageUrl("https://rebound.example/a.png"))
        assert caught.value.code == "url_address_not_allowed"
        await sources.aclose()

    @pytest.mark.parametrize("answers", [[], ["nonsense"]])
    async def test_no_address_is_a_failed_fetch(self, answers):
        sources = Sources(OPEN, resolve=lambda host, port: answering(answers))
        with pytest.raises(SourceRefused) as caught:
            await sources.fetch(ImageUrl("https://unknown.example/a.png"))
        assert caught.value.code == "url_fetch_failed"
        await sources.aclose()


async def never(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


async def answering(answers: list[str]) -> list[str]:
    return answers


@given(st.text(max_size=60) | st.text("htps:/[]@.\\#?%0123456789abfx-_ ", max_size=60).map("https://".__add__))
def test_any_text_is_checked_or_refused(text):
    try:
        target = check_url(text, OPEN)
    except SourceRefused:
        return
    assert target.host
    assert target.raw_path.startswith(b"/")
    assert check_url(target.text, OPEN) == target
