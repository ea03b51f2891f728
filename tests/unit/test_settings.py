"""Settings: flag over environment over `.env` over default, the older services' names, and what refuses to start."""

import os
import pathlib

import pydantic
import pytest

from sightline import settings
from sightline.settings import DescribeSettings, EnhanceSettings, PipelineSettings, ServerSettings, load, shown

OFF = ("--auth", "off")


def all_names() -> set[str]:
    names: set[str] = set()
    for cls in (DescribeSettings, EnhanceSettings, PipelineSettings):
        for name, field in cls.model_fields.items():
            names.add(name)
            if isinstance(field.validation_alias, pydantic.AliasChoices):
                names |= {str(choice) for choice in field.validation_alias.choices}
    return {name.upper() for name in names}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """An environment that says nothing and a folder without `.env`."""
    for name in all_names() & {key.upper() for key in os.environ}:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(cls: type[ServerSettings], *argv: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What a process that does not start says on stderr."""
    with pytest.raises(SystemExit) as caught:
        load(cls, argv)
    assert caught.value.code == code
    return capsys.readouterr().err


class TestPrecedence:
    @pytest.mark.parametrize(
        ("flag", "environment", "dotenv", "expected"),
        [
            (True, True, True, 1001),
            (False, True, True, 1002),
            (False, False, True, 1003),
            (False, False, False, 8080),
            (True, False, True, 1001),
        ],
        ids=["flag", "environment", ".env", "default", "flag over .env"],
    )
    def test_the_nearest_wins(
        self,
        flag: bool,
        environment: bool,
        dotenv: bool,
        expected: int,
        monkeypatch: pytest.MonkeyPatch,
        folder: pathlib.Path,
    ) -> None:
        if environment:
            monkeypatch.setenv("PORT", "1002")
        if dotenv:
            (folder / ".env").write_text("PORT=1003\n")

        loaded = load(ServerSettings, [*OFF, *(("--port", "1001") if flag else ())])

        assert loaded.port == expected

    @pytest.mark.parametrize("in_environment", ["MODEL", "QWEN_MODEL_NAME", "VLM_MODEL_ID"])
    @pytest.mark.parametrize("in_dotenv", ["MODEL", "QWEN_MODEL_NAME", "VLM_MODEL_ID"])
    def test_the_environment_wins_over_dotenv_under_any_name(
        self, in_environment: str, in_dotenv: str, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
    ) -> None:
        monkeypatch.setenv(in_environment, "nearer")
        (folder / ".env").write_text(f"{in_dotenv}=farther\n")

        assert load(DescribeSettings, OFF).model == "nearer"
        assert load(DescribeSettings, [*OFF, "--model", "nearest"]).model == "nearest"

    def test_an_empty_variable_counts_as_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PORT", "")

        assert load(ServerSettings, OFF).port == 8080

    def test_foreign_variables_and_dotenv_lines_are_no_fault(
        self, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
    ) -> None:
        monkeypatch.setenv("WORKERS", "4")
        (folder / ".env").write_text("RELOAD=true\nHF_TOKEN=x\n")

        load(DescribeSettings, OFF)


class TestNamesOfTheOlderServices:
    @pytest.mark.parametrize(
        ("cls", "variable", "value", "field", "expected"),
        [
            # A10
            (
                DescribeSettings,
                "QWEN_MODEL_NAME",
                "Qwen/Qwen2.5-VL-7B-Instruct",
                "model",
                "Qwen/Qwen2.5-VL-7B-Instruct",
            ),
            (DescribeSettings, "QWEN_MAX_MEMORY_GPU", "10GiB", "max_memory_gpu", "10GiB"),
            (DescribeSettings, "QWEN_MAX_MEMORY_CPU", "20GiB", "max_memory_cpu", "20GiB"),
            (DescribeSettings, "HUGGINGFACE_CACHE_DIR", "/cache", "cache_dir", pathlib.Path("/cache")),
            (DescribeSettings, "PROMPT", "What is this?", "prompt", "What is this?"),
            (DescribeSettings, "PORT", "9000", "port", 9000),
            # B9, B10
            (DescribeSettings, "API_KEY_FILE", "/keys", "api_key_file", pathlib.Path("/keys")),
            # D5
            (DescribeSettings, "AWS_REGION", "eu-central-1", "aws_region", "eu-central-1"),
            (DescribeSettings, "VLM_MODEL_ID", "x/y", "model", "x/y"),
            (DescribeSettings, "VLM_LOAD_8BIT", "true", "load_8bit", True),
            (PipelineSettings, "USE_GPT_OSS", "0", "enhance_by_default", False),
            (PipelineSettings, "USE_GPT_OSS", "true", "enhance_by_default", True),
            (PipelineSettings, "GPT_OSS_REASONING_LEVEL", "high", "reasoning_level", "high"),
            (EnhanceSettings, "GPT_OSS_REASONING_LEVEL", "medium", "reasoning_level", "medium"),
            (EnhanceSettings, "GPT_OSS_MODEL_ID", "openai/gpt-oss-120b", "model", "openai/gpt-oss-120b"),
            # D6
            (DescribeSettings, "AWS_ENDPOINT_URL", "http://s3", "s3_endpoint_url", "http://s3"),
            (DescribeSettings, "AWS_ENDPOINT_URL_S3", "http://s3", "s3_endpoint_url", "http://s3"),
            # E9
            (PipelineSettings, "HOST", "127.0.0.1", "host", "127.0.0.1"),
            (PipelineSettings, "LOG_LEVEL", "warning", "log_level", "warning"),
            (PipelineSettings, "LOG_LEVEL", "WARNING", "log_level", "warning"),
            (EnhanceSettings, "MODEL_NAME", "prose", "model_name", "prose"),
        ],
    )
    def test_are_understood(
        self,
        cls: type[ServerSettings],
        variable: str,
        value: str,
        field: str,
        expected: object,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv(variable, value)

        assert getattr(load(cls, OFF), field) == expected

    def test_s3_s_own_endpoint_wins_over_the_general_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")

        assert load(DescribeSettings, OFF).s3_endpoint_url == "http://s3"

    def test_the_key_of_a_service_that_had_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_KEY", "hunter2")

        keys = load(DescribeSettings).api_keys

        assert keys is not None
        assert keys.get_secret_value() == "hunter2"

    def test_lists_are_comma_separated(self) -> None:
        assert load(ServerSettings, [*OFF, "--url-hosts", "a.example, *.b.example,"]).url_hosts == (
            "a.example",
            "*.b.example",
        )

    def test_a_list_with_a_default_can_be_emptied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load(ServerSettings, OFF).s3_buckets == ("*",)
        assert load(ServerSettings, [*OFF, "--s3-buckets", "none"]).s3_buckets == ()

        monkeypatch.setenv("S3_BUCKETS", "None")

        assert load(ServerSettings, OFF).s3_buckets == ()


class TestRefusals:
    @pytest.mark.parametrize("cls", [EnhanceSettings, PipelineSettings])
    def test_an_unknown_reasoning_level_does_not_start(
        self, cls: type[ServerSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("GPT_OSS_REASONING_LEVEL", "extreme")

        said = refusal(cls, *OFF, capsys=capsys)

        assert "reasoning_level" in said
        assert "'low', 'medium' or 'high'" in said

    @pytest.mark.parametrize("cls", [DescribeSettings, EnhanceSettings, PipelineSettings])
    def test_authentication_must_be_decided(
        self, cls: type[ServerSettings], capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = refusal(cls, capsys=capsys)

        assert "API_KEY" in said
        assert "AUTH=off" in said

    def test_an_empty_key_decides_nothing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("API_KEY", "")

        refusal(ServerSettings, capsys=capsys)
        refusal(ServerSettings, "--api-keys", "", capsys=capsys)

    def test_off_must_be_said_by_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        refusal(ServerSettings, "--auth", "none", capsys=capsys)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--port", "0"),
            ("--port", "65536"),
            ("--port", "http"),
            ("--deadline-seconds", "0"),
            ("--deadline-seconds", "nan"),
            ("--max-pixels", "-1"),
            ("--url-max-redirects", "4"),
            ("--log-level", "loud"),
            ("--queue-size", "0"),
            ("--max-tokens", "4097"),
            ("--device", "tpu"),
        ],
        ids=" ".join,
    )
    def test_values_out_of_range(self, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(DescribeSettings, *OFF, *flags, capsys=capsys)

        assert flags[0].removeprefix("--").replace("-", "_") in said.replace("-", "_")

    def test_an_unknown_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--prot" in refusal(ServerSettings, *OFF, "--prot", "1", capsys=capsys)

    def test_every_fault_is_said_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(ServerSettings, *OFF, "--port", "0", "--queue-size", "0", capsys=capsys)

        assert "port" in said
        assert "queue_size" in said

    def test_a_refusal_does_not_show_the_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "hunter2" not in refusal(ServerSettings, "--api-keys", "hunter2", "--port", "0", capsys=capsys)


class TestShowing:
    @pytest.mark.parametrize("cls", [DescribeSettings, EnhanceSettings, PipelineSettings])
    def test_help_lists_the_settings_and_ends_well(
        self, cls: type[ServerSettings], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            load(cls, ["--help"], prog="sightline serve x")

        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert "--deadline-seconds" in said
        assert "sightline serve x" in said

    @pytest.mark.parametrize("form", [str, repr, lambda settings: str(shown(settings))], ids=["str", "repr", "shown"])
    def test_secrets_are_hidden(self, form) -> None:
        loaded = load(PipelineSettings, ["--api-keys", "hunter2,hunter3", "--step-api-key", "hunter4"])

        assert "hunter" not in form(loaded)

    def test_passwords_in_addresses_are_hidden(self) -> None:
        loaded = load(PipelineSettings, [*OFF, "--describe-url", "https://me:hunter2@models.example:8443/x"])

        assert shown(loaded)["describe_url"] == "https://**********@models.example:8443/x"
        assert loaded.describe_url == "https://me:hunter2@models.example:8443/x"

    def test_the_rest_is_shown(self) -> None:
        told = shown(load(DescribeSettings, [*OFF, "--url-hosts", "a.example", "--cache-dir", "/cache"]))

        assert told["url_hosts"] == ["a.example"]
        assert told["cache_dir"] == "/cache"
        assert told["api_keys"] is None
        assert told["port"] == 8080

    def test_settings_never_change(self) -> None:
        loaded = load(ServerSettings, OFF)

        with pytest.raises(pydantic.ValidationError):
            loaded.port = 1

    def test_the_small_models_are_the_default(self) -> None:
        assert pathlib.Path(load(DescribeSettings, OFF).model) == settings.TINY / "describe"
        assert pathlib.Path(load(EnhanceSettings, OFF).model) == settings.TINY / "enhance"


class TestCpuQuota:
    @pytest.mark.parametrize(
        ("cgroup", "cpus", "expected"),
        [
            ("max 100000", 8, 8),
            ("200000 100000", 8, 2),
            ("350000 100000", 8, 3),
            ("50000 100000", 8, 1),
            ("1600000 100000", 8, 8),
            ("nonsense", 8, 8),
            ("", 8, 8),
            ("max 100000", 0, 1),
        ],
    )
    def test_is_the_smaller_of_affinity_and_quota_and_at_least_one(
        self, cgroup: str, cpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path: cgroup)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)

        assert settings.cpu_quota() == expected

    @pytest.mark.parametrize(("quota", "expected"), [("100000", 1), ("250000", 2), ("-1", 8), ("nonsense", 8)])
    def test_of_cgroups_of_the_first_version(self, quota: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
        there = {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"}

        def read(path: pathlib.Path) -> str:
            if path.parent.name == "cpu" and path.name in there:
                return there[path.name]
            raise FileNotFoundError

        monkeypatch.setattr(pathlib.Path, "read_text", read)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

        assert settings.cpu_quota() == expected

    def test_without_cgroups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: pathlib.Path) -> str:
            raise FileNotFoundError

        monkeypatch.setattr(pathlib.Path, "read_text", missing)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: None)

        assert settings.cpu_quota() == 1

    def test_here(self) -> None:
        assert settings.cpu_quota() >= 1
