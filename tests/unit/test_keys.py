"""API keys: which are accepted, that a file is read again, and that trouble with it locks nobody in or out."""

import os
from pathlib import Path

import pytest

from sightline.server.keys import Keys
from sightline.settings import ServerSettings


def keys_of(*, auth: str = "api-key", api_keys: str | None = None, api_key_file: Path | None = None) -> Keys:
    settings = ServerSettings(_env_file=None, auth=auth, api_keys=api_keys, api_key_file=api_key_file)
    return Keys(settings)


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEYS", "API_KEY_FILE", "AUTH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("from-file\n")
    return file


def write_later(file: Path, text: str | bytes) -> None:
    """Change a file so that its time of change is another one, however coarse the file system."""
    before = file.stat().st_mtime_ns
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(file, ns=(before + 1_000_000_000, before + 1_000_000_000))


class TestWhichKeys:
    @pytest.mark.parametrize(
        ("presented", "is_accepted"),
        [
            ("first", True),
            ("second", True),
            ("third", False),
            ("First", False),
            ("firs", False),
            ("first ", False),
            ("first,second", False),
            ("", False),
            (",", False),
            (None, False),
            ("schlüssel", False),
            ("x" * 100_000, False),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_of_a_list(self, presented: str | None, is_accepted: bool) -> None:
        keys = keys_of(api_keys=" first , second,,")

        assert (keys.principal(presented) is not None) == is_accepted

    def test_of_a_list_and_a_file_together(self, key_file: Path) -> None:
        keys = keys_of(api_keys="fixed", api_key_file=key_file)

        assert keys.principal("fixed")
        assert keys.principal("from-file")
        assert keys.principal("other") is None

    def test_blank_lines_of_a_file_are_no_keys(self, key_file: Path) -> None:
        key_file.write_text("\n  a  \r\n\nb")

        keys = keys_of(api_key_file=key_file)

        assert keys.principal("a")
        assert keys.principal("b")
        assert keys.principal("") is None

    def test_with_authentication_off_everybody_is_the_same(self) -> None:
        keys = keys_of(auth="off", api_keys="ignored")

        assert keys.principal(None) == keys.principal("anything") == keys.principal("ignored") == ""


class TestPrincipals:
    def test_stand_for_the_key_without_being_it(self) -> None:
        keys = keys_of(api_keys="first,second")

        first, second = keys.principal("first"), keys.principal("second")

        assert first != second
        assert first == keys.principal("first")
        assert first == keys_of(api_keys="first").principal("first"), "replicas must agree"
        assert first
        assert "first" not in first

    def test_are_never_the_one_of_switched_off_authentication(self) -> None:
        assert keys_of(api_keys="first").principal("first") != ""


class TestTheFile:
    def test_is_read_again_when_it_changes(self, key_file: Path) -> None:
        keys = keys_of(api_key_file=key_file)

        write_later(key_file, "new\n")

        assert keys.principal("new")
        assert keys.principal("from-file") is None

    def test_can_be_replaced_as_a_kubernetes_secret_is(self, tmp_path: Path) -> None:
        for name, key in (("one", "old"), ("two", "new!")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "keys").write_text(key)
        link = tmp_path / "current"
        link.symlink_to("one")
        keys = keys_of(api_key_file=link / "keys")
        assert keys.principal("old")

        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").replace(link)

        assert keys.principal("new!")
        assert keys.principal("old") is None

    def test_emptied_it_opens_to_nobody(self, key_file: Path) -> None:
        keys = keys_of(api_key_file=key_file)

        write_later(key_file, "\n")

        assert keys.principal("from-file") is None
        assert keys.principal("") is None

    @pytest.mark.parametrize("damage", ["gone", "a folder", "no text"])
    def test_unreadable_for_a_while_its_last_keys_stay_valid(self, damage: str, key_file: Path) -> None:
        keys = keys_of(api_key_file=key_file)

        if damage == "no text":
            write_later(key_file, b"\xff\xfe\x00")
        else:
            key_file.unlink()
        if damage == "a folder":
            key_file.mkdir()

        assert keys.principal("from-file")
        assert keys.principal("other") is None

    def test_is_read_again_when_it_is_back(self, key_file: Path) -> None:
        keys = keys_of(api_key_file=key_file)
        key_file.unlink()
        assert keys.principal("from-file")

        key_file.write_text("back and longer\n")

        assert keys.principal("back and longer")
        assert keys.principal("from-file") is None


class TestRefusingToStart:
    def test_with_an_empty_file(self, key_file: Path) -> None:
        key_file.write_text(" \n")

        with pytest.raises(ValueError, match="no API key"):
            keys_of(api_key_file=key_file)

    def test_with_a_list_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="no API key"):
            keys_of(api_keys=" , ")

    def test_without_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="absent"):
            keys_of(api_key_file=tmp_path / "absent")

    def test_but_a_file_is_not_needed_with_authentication_off(self, tmp_path: Path) -> None:
        assert keys_of(auth="off", api_key_file=tmp_path / "absent").is_off
