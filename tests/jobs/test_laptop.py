"""`sightline batch` as a person uses it: real processes where signals matter, a stub pipeline, folders and S3."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import sightline as sightline_package
from sightline.cli import app
from sightline.jobs.laptop import CHUNK_SIZE
from tests.jobs.pictures import caption_of, enhanced, picture
from tests.jobs.stub import Stub, running_stub
from tests.jobs.terminal import TERMINALS
from tests.nursery import Forked
from tests.s3 import S3Server

PATIENCE_SECONDS = 60
OPEN_ITEMS = 2 * CHUNK_SIZE


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of its own, who sits in an empty folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture
def photos(home: Path) -> Path:
    """Thirty pictures, one of them in a folder, and what is none."""
    return album(home / "photos", 29) / ".."


def album(folder: Path, count: int, faults: dict[int, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(picture(number, (faults or {}).get(number, "")))
    (folder / "trip").mkdir()
    (folder / "trip" / "last.PNG").write_bytes(picture(count))
    (folder / "notes.md").write_text("no image")
    return folder / "trip"


def sightline(*words: str, code: int = 0) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(app, ["batch", *words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def run(source: str, stub: Stub, *words: str, code: int = 0, out: str = "captions.jsonl") -> Result:
    return sightline("run", source, "--out", out, "--url", stub.url, *words, code=code)


def rows(name: str = "captions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def names(count: int = 29) -> list[str]:
    return [*(f"{number:03}.png" for number in range(count)), "trip/last.PNG"]


class TestAFolder:
    def test_every_image_is_captioned_once_in_order(self, photos: Path, stub: Stub) -> None:
        result = run("photos", stub)

        assert [row["custom_id"] for row in rows()] == names()
        assert [row["caption"] for row in rows()] == [enhanced(caption_of(picture(n))) for n in range(30)]
        assert rows()[0]["uri"] == f"file://{Path('photos').absolute()}/000.png"
        assert set(stub.answered.values()) == {1}
        assert stub.priorities == {"batch": 30}
        assert "30 of 30 done" in result.stderr
        assert not Path("captions.errors.jsonl").exists()

    def test_failures_are_listed_apart_and_the_exit_code_says_so(self, home: Path, stub: Stub) -> None:
        album(home / "photos", 29, {4: "422", 20: "422", 7: "unenhanced"})

        result = run("photos", stub, code=1)

        assert [row["custom_id"] for row in rows()] == [name for name in names() if name not in ("004.png", "020.png")]
        assert [row["custom_id"] for row in rows("captions.errors.jsonl")] == ["004.png", "020.png"]
        assert {row["error"]["http_status"] for row in rows("captions.errors.jsonl")} == {422}
        assert "2 failed" in result.stderr
        assert "captions.errors.jsonl" in result.stderr
        assert "1 of them could not be enhanced" in result.stderr

    def test_the_same_command_again_asks_nobody_and_writes_what_was_deleted(self, photos: Path, stub: Stub) -> None:
        run("photos", stub)
        before = Path("captions.jsonl").read_bytes()
        Path("captions.jsonl").unlink()

        result = run("photos/", stub)

        assert Path("captions.jsonl").read_bytes() == before
        assert stub.given == 30
        assert "complete" in result.stderr

    def test_again_begins_anew(self, photos: Path, stub: Stub) -> None:
        run("photos", stub)
        (photos / "new.png").write_bytes(picture(99))

        assert "1 images more now" in run("photos", stub).stderr
        run("photos", stub, "--again", "--overwrite")

        assert len(rows()) == 31
        assert stub.given == 61

    def test_another_question_is_another_batch_and_does_not_write_over_the_first(
        self, photos: Path, stub: Stub
    ) -> None:
        run("photos", stub)
        before = Path("captions.jsonl").read_bytes()

        refused = run("photos", stub, "--prompt", "What colour?", code=2)
        assert "--overwrite" in refused.stderr
        assert Path("captions.jsonl").read_bytes() == before
        run("photos", stub, "--prompt", "What colour?", "--no-enhance", out="colours.jsonl")

        assert {row["caption"] for row in rows("colours.jsonl")} == {
            caption_of(picture(n), "What colour?") for n in range(30)
        }

    def test_sidecars_lie_beside_their_images_and_may_be_skipped(self, photos: Path, stub: Stub) -> None:
        (photos / "003.txt").write_text("a caption by hand\n")

        result = run("photos", stub, "--existing", "skip")

        assert "29 items (1 have a caption)" in result.stderr
        assert (photos / "003.txt").read_text() == "a caption by hand\n"
        assert (photos / "trip" / "last.txt").read_text() == enhanced(caption_of(picture(29))) + "\n"
        assert len(rows()) == 29

    def test_sidecars_of_a_list_lie_beside_its_images(self, photos: Path, stub: Stub) -> None:
        Path("some.jsonl").write_text('{"uri": "photos/001.png"}\n{"uri": "photos/trip/last.PNG"}\n')

        run("some.jsonl", stub, "--sidecars")

        assert (photos / "001.txt").read_text() == enhanced(caption_of(picture(1))) + "\n"
        assert (photos / "trip" / "last.txt").read_text() == enhanced(caption_of(picture(29))) + "\n"

    def test_the_same_bytes_are_asked_once_where_that_is_wanted(self, photos: Path, stub: Stub) -> None:
        for number in range(5):
            (photos / f"copy-{number}.png").write_bytes(picture(0))

        run("photos", stub, "--reuse")

        assert len(rows()) == 35
        assert stub.given == 30

    def test_a_table_too(self, photos: Path, stub: Stub) -> None:
        parquet = pytest.importorskip("pyarrow.parquet")

        run("photos", stub, "--parquet")

        assert parquet.read_table("captions.parquet").column("custom_id").to_pylist() == names()

    def test_a_dry_run_asks_nobody_and_writes_nothing(self, photos: Path, stub: Stub, tmp_path: Path) -> None:
        result = run("photos", stub, "--dry-run")

        assert "30 items" in result.stdout
        assert stub.asks == 0
        assert not Path("captions.jsonl").exists()
        assert "There are no batches" in sightline("status").stdout

    def test_sidecars_of_a_prefix_that_is_no_folder_lie_beside_the_images(
        self, s3_server: S3Server, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name, value in s3_server.environment().items():
            monkeypatch.setenv(name, value)
        for year in (2024, 2025):
            s3_server.put("laptop", f"{tmp_path.name}/side/{year}-a.png", picture(year))

        run(f"s3://laptop/{tmp_path.name}/side/2024-", stub, "--sidecars")

        listed = s3_server.client.list_objects_v2(Bucket="laptop", Prefix=f"{tmp_path.name}/side/")["Contents"]
        found = {item["Key"].removeprefix(f"{tmp_path.name}/side/") for item in listed}
        assert found == {"2024-a.png", "2024-a.txt", "2025-a.png"}


class TestOtherInputs:
    def test_a_list_with_its_own_names_and_prompts(self, photos: Path, stub: Stub) -> None:
        lines = [
            {"custom_id": "one", "uri": "photos/000.png"},
            {"custom_id": "two", "uri": "photos/001.png", "prompt": "Why?"},
            {"custom_id": "lost", "uri": "photos/nowhere.png"},
        ]
        Path("list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        run("list.jsonl", stub, "--no-enhance", code=1)

        assert {row["custom_id"]: row["caption"] for row in rows()} == {
            "one": caption_of(picture(0)),
            "two": caption_of(picture(1), "Why?"),
        }
        assert [row["error"]["code"] for row in rows("captions.errors.jsonl")] == ["input_not_found"]

    def test_a_csv_list(self, photos: Path, stub: Stub) -> None:
        Path("list.csv").write_text("custom_id,uri\nfirst,photos/002.png\n")

        run("list.csv", stub)

        assert [row["custom_id"] for row in rows()] == ["first"]

    def test_a_batch_file_of_openai_s(self, stub: Stub) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
        Path("requests.jsonl").write_text(json.dumps(line) + "\n")

        run("requests.jsonl", stub)

        (row,) = rows()
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["choices"][0]["message"]["content"] == caption_of(b"Hello", "Hello")

    def test_a_predictor_itself(self, photos: Path, stub: Stub) -> None:
        run("photos", stub, "--predictor", "describe", "--max-tokens", "9")

        assert {row["caption"] for row in rows()} == {caption_of(picture(n)) for n in range(30)}

    def test_a_bucket_and_a_store_in_one(
        self, s3_server: S3Server, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name, value in s3_server.environment().items():
            monkeypatch.setenv(name, value)
        for number in range(12):
            s3_server.put("laptop", f"{tmp_path.name}/in/{number:02}.png", picture(number))
        store = f"s3://laptop/{tmp_path.name}/batches"

        run(f"s3://laptop/{tmp_path.name}/in/", stub, "--store", store)

        assert [row["custom_id"] for row in rows()] == [f"{tmp_path.name}/in/{number:02}.png" for number in range(12)]
        assert "complete  12 of 12" in sightline("status", "--store", store).stdout
        assert "There are no batches" in sightline("status").stdout


class TestBadInput:
    @pytest.mark.parametrize(
        ("source", "code", "words"),
        [
            ("nowhere", 2, "no such folder"),
            ("empty", 42, "it is empty"),
            ("texts", 42, "none of the 2 objects below it ends in"),
            ("photos/000.png", 2, "one file"),
            ("broken.jsonl", 42, "line 2 is not JSON"),
            ("twice.csv", 42, "line 3 has the same custom_id as line 2"),
            ("ftp://host/photos", 2, "ftp://"),
        ],
    )
    def test_is_told_in_one_sentence(self, photos: Path, stub: Stub, source: str, code: int, words: str) -> None:
        Path("empty").mkdir()
        Path("texts").mkdir()
        for name in ("a.txt", "b.md"):
            Path("texts", name).write_text("text")
        Path("broken.jsonl").write_text('{"uri": "photos/000.png"}\n{"uri": \n')
        Path("twice.csv").write_text("custom_id,uri\na,photos/000.png\na,photos/001.png\n")

        result = run(source, stub, code=code)

        assert words in " ".join(result.stderr.replace("│", "").split())
        assert "Traceback" not in result.stderr
        assert stub.asks == 0
        assert not Path("captions.jsonl").exists()

    def test_a_missing_bucket_and_wrong_credentials(
        self, s3_server: S3Server, stub: Stub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in s3_server.environment().items():
            monkeypatch.setenv(name, value)
        s3_server.put("laptop", "guarded/a.png", picture(1))
        assert "no such bucket" in run("s3://nobody-has-this/x/", stub, code=42).stderr
        if s3_server.is_real:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            assert "access denied" in run("s3://laptop/guarded/", stub, code=42, out="other.jsonl").stderr

    def test_a_pipeline_that_is_not_there(self, photos: Path) -> None:
        words = ["run", "photos", "--out", "x.jsonl", "--url", "http://127.0.0.1:9"]

        assert "nothing answers at http://127.0.0.1:9" in sightline(*words, code=75).stderr

    def test_an_image_that_goes_or_changes_meanwhile_fails_alone(self, photos: Path, stub: Stub) -> None:
        def meddle(ask: int) -> None:
            if ask == 1:
                (photos / "027.png").unlink()
                (photos / "028.png").write_bytes(picture(500))

        stub.on_ask = meddle

        run("photos", stub, code=1)

        said = {row["custom_id"]: row["error"]["code"] for row in rows("captions.errors.jsonl")}
        assert said == {"027.png": "input_not_found", "028.png": "input_changed"}
        assert len(rows()) == 28

    def test_another_pipeline_on_the_way(self, photos: Path, stub: Stub) -> None:
        def change(ask: int) -> None:
            if ask == 15:
                stub.revision = "another"

        stub.on_ask = change

        assert "another" in run("photos", stub, code=44).stderr
        assert "began with revision" in run("photos", stub, code=44).stderr
        stub.revision = "stub-revision-1"
        stub.on_ask = None
        run("photos", stub)
        assert [row["custom_id"] for row in rows()] == names()


class TestAfterwards:
    def test_status_for_people_and_for_programs(self, home: Path, stub: Stub) -> None:
        album(home / "photos", 29, {4: "422"})
        run("photos", stub, code=1)

        (line,) = sightline("status").stdout.splitlines()
        said = json.loads(sightline("status", "photos", "--json").stdout)

        assert line.startswith("photos-")
        assert "complete  30 of 30  1 failed" in line
        assert (said["status"], said["done"], said["total"], said["failed"]) == ("complete", 30, 30, 1)
        manifest = Path(said["outputs"]["manifest"].removeprefix("file://"))
        assert json.loads(manifest.read_text())["items"] == 30

    def test_only_what_failed_once_more(self, home: Path, stub: Stub) -> None:
        album(home / "photos", 29, {4: "422", 9: "unenhanced"})
        run("photos", stub, code=1)
        asked = stub.asks

        sightline("retry", "photos", "--out", "again.jsonl", code=1)
        sightline("retry", "photos-", "--only", "unenhanced", "--out", "better.jsonl", code=1)

        assert stub.asks == asked + 3
        assert [row["custom_id"] for row in rows("again.errors.jsonl")] == ["004.png"]
        assert [row["custom_id"] for row in rows("better.jsonl")] == ["009.png"]

    @pytest.mark.parametrize("verb", ["resume", "cancel", "status"])
    def test_a_batch_that_nobody_knows(self, verb: str) -> None:
        assert "no such batch" in sightline(verb, "nobody", code=2).stderr


# --- real processes --------------------------------------------------------------------------------------------------

Launch = Callable[..., Forked]


@pytest.fixture(scope="module", autouse=True)
def _terminals() -> Iterator[None]:
    yield
    TERMINALS.close()


@pytest.fixture
def launch(home: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts the command as a process of its own; what it says is in said.log."""
    started: list[Forked] = []

    def start(*words: str) -> Forked:
        started.append(TERMINALS.start(list(words), tmp_path / "said.log", dict(os.environ), home))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(PATIENCE_SECONDS)


def asked(stub: Stub, count: int) -> None:
    """Wait until so many captions were given."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while stub.given < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(process: Forked) -> tuple[int, str]:
    """Its exit code and all that it said."""
    code = process.wait(PATIENCE_SECONDS)
    return code, Path("../said.log").read_text()


def killed(process: Forked) -> None:
    process.kill()
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL


COUNT = 149


class TestStopping:
    @pytest.fixture
    def words(self, home: Path, stub: Stub) -> list[str]:
        album(home / "photos", COUNT, {31: "422", 80: "flaky"})
        stub.delay_seconds = 0.03
        return ["run", "photos", "--out", "captions.jsonl", "--url", stub.url]

    @pytest.fixture
    def undisturbed(self, words: list[str], stub: Stub) -> bytes:
        """What becomes of it when nobody stops anything; from another store, so that nothing is known of it."""
        stub.delay_seconds = 0.0
        sightline(*words, "--store", "elsewhere", code=1)
        data = Path("captions.jsonl").read_bytes()
        Path("captions.jsonl").unlink()
        stub.answered.clear()
        stub.given = 0
        stub.delay_seconds = 0.03
        return data

    def check(self, stub: Stub, undisturbed: bytes, rework: int) -> None:
        assert Path("captions.jsonl").read_bytes() == undisturbed
        assert [row["custom_id"] for row in rows("captions.errors.jsonl")] == ["031.png"]
        assert len(stub.answered) == COUNT
        assert stub.given - COUNT <= rework

    def test_ctrl_c_finishes_what_is_open_and_the_same_command_goes_on(
        self, words: list[str], undisturbed: bytes, stub: Stub, launch: Launch
    ) -> None:
        process = launch(*words)
        asked(stub, 30)
        process.send_signal(signal.SIGINT)
        code, said = ended(process)

        assert code == 130
        assert "Finishing what is open" in said
        assert "sightline batch resume photos-" in said
        assert not Path("captions.jsonl").exists()
        assert "unfinished" in sightline("status").stdout
        sightline(*words, code=1)
        self.check(stub, undisturbed, rework=0)

    def test_a_second_ctrl_c_leaves_at_once_and_resume_goes_on(
        self, words: list[str], undisturbed: bytes, stub: Stub, launch: Launch
    ) -> None:
        stub.delay_seconds = 2.0
        process = launch(*words, "--max-in-flight", "16")
        asked(stub, 16)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, said = ended(process)

        assert code == 130
        assert time.monotonic() - began < 1.9
        assert "sightline batch resume photos-" in said
        stub.delay_seconds = 0.0
        sightline("resume", "photos", code=1)
        self.check(stub, undisturbed, rework=OPEN_ITEMS)

    def test_kill_9_again_and_again_costs_open_chunks_only(
        self, words: list[str], undisturbed: bytes, stub: Stub, launch: Launch
    ) -> None:
        kills = 3
        for kill in range(kills):
            process = launch(*words)
            asked(stub, stub.given + 17 + 11 * kill)
            killed(process)

        sightline(*words, code=1)

        self.check(stub, undisturbed, rework=kills * OPEN_ITEMS)

    def test_sigterm_exits_143_and_nothing_is_lost(
        self, words: list[str], undisturbed: bytes, stub: Stub, launch: Launch
    ) -> None:
        process = launch(*words)
        asked(stub, 40)
        process.terminate()

        assert ended(process)[0] == 143
        sightline(*words, code=1)
        self.check(stub, undisturbed, rework=OPEN_ITEMS)

    def test_an_outage_is_waited_out(self, words: list[str], undisturbed: bytes, stub: Stub, launch: Launch) -> None:
        process = launch(*words)
        asked(stub, 30)
        stub.go_down()
        time.sleep(1.0)
        assert process.poll() is None
        stub.come_up()

        assert ended(process)[0] == 1
        self.check(stub, undisturbed, rework=OPEN_ITEMS)

    def test_a_second_process_is_sent_away(self, words: list[str], stub: Stub, launch: Launch) -> None:
        process = launch(*words)
        asked(stub, 10)

        said = sightline(*words, code=2).stderr

        assert f"process {process.pid}" in said
        assert ended(process)[0] == 1
        assert stub.given == COUNT

    def test_cancel_ends_it_elsewhere_and_keeps_what_is_done(
        self, words: list[str], stub: Stub, launch: Launch
    ) -> None:
        stub.delay_seconds = 0.3
        process = launch(*words)
        asked(stub, 30)

        sightline("cancel", "photos")
        code, _ = ended(process)

        assert code == 1
        done, left = rows(), rows("captions.errors.jsonl")
        assert sorted(row["custom_id"] for row in [*done, *left]) == names(COUNT)
        assert len(done) >= 10
        assert {row["error"]["code"] for row in left} <= {"batch_cancelled", "caption_rejected"}
        assert "cancelled  150 of 150" in sightline("status").stdout
        assert sightline(*words, code=1).stderr.count("complete") == 1

    def test_cancel_of_one_that_was_stopped(self, words: list[str], stub: Stub, launch: Launch) -> None:
        process = launch(*words)
        asked(stub, 30)
        killed(process)

        sightline("cancel", "photos")

        done, left = rows(), rows("captions.errors.jsonl")
        assert [row["custom_id"] for row in [*done, *left]] == names(COUNT)
        assert len(done) % CHUNK_SIZE == 0


def test_the_terminal_shows_a_bar_with_a_rate(home: Path, stub: Stub) -> None:
    """The command as people start it, on a terminal of its own."""
    import pty

    album(home / "photos", 59)
    stub.delay_seconds = 0.05
    packages = str(Path(sightline_package.__file__).resolve().parent.parent)
    terminal = os.environ | {"TERM": "xterm", "PYTHONPATH": packages}
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "sightline", "batch", "run", "photos", "-o", "c.jsonl", "--url", stub.url]
    with subprocess.Popen(command, stderr=follower, stdout=follower, env=terminal) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        process.wait(PATIENCE_SECONDS)
    os.close(leader)

    assert process.returncode == 0
    assert "60/60" in shown.decode()
    assert "━" in shown.decode()
