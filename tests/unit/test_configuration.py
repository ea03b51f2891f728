"""Several predictors in one process: whose flag and variable is whose, what is refused, and what show-config says."""

import os
from pathlib import Path

import pytest

from sightline.configuration import Configured, configure, local_steps, shown_as_table, told
from sightline.settings import (
    BlipSettings,
    DescribeSettings,
    EmbedSettings,
    EnhanceSettings,
    GenerateSettings,
    PipelineSettings,
    load,
)

KINDS = {
    "describe": DescribeSettings,
    "enhance": EnhanceSettings,
    "generate": GenerateSettings,
    "embed": EmbedSettings,
    "blip": BlipSettings,
    "pipeline": PipelineSettings,
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that says nothing but AUTH=off, and a folder without `.env`."""
    for name in list(os.environ):
        if name not in {"PATH", "HOME"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AUTH", "off")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(names: str, *argv: str) -> dict[str, Configured]:
    return configure({name: KINDS[name] for name in names.split()}, argv, prog="sightline serve")


def refusal(capsys: pytest.CaptureFixture[str], names: str, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        configured(names, *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


class TestFlags:
    def test_what_a_process_has_once_is_given_once(self):
        both = configured("describe blip", "--port", "9000", "--log-level=warning")

        assert {item.settings.port for item in both.values()} == {9000}
        assert both["blip"].origins["port"] == "flag --port"
        assert both["describe"].origins["log_level"] == "flag --log-level"

    def test_a_predictor_s_own_flag_has_its_name(self):
        both = configured("describe blip", "--describe.model", "x", "--blip.model=y", "--blip.max-batch", "3")

        assert [item.settings.model for item in both.values()] == ["x", "y"]
        assert both["blip"].settings.max_batch == 3
        assert both["describe"].settings.max_batch == 8

    @pytest.mark.parametrize("flag", ["--model", "--model-name", "--max-batch", "--revision", "--max-tokens"])
    def test_a_flag_that_several_have_is_refused_with_what_to_say(self, flag: str, capsys):
        said = refusal(capsys, "describe blip", flag, "1")

        assert flag in said
        assert f"--describe.{flag[2:]} or --blip.{flag[2:]}" in said

    def test_a_flag_that_only_one_has_needs_no_name(self):
        both = configured("describe enhance", "--load-8bit", "true", "--reasoning-level", "high")

        assert both["describe"].settings.load_8bit is True
        assert both["enhance"].settings.reasoning_level == "high"

    def test_what_means_the_same_to_all_goes_to_all_who_have_it(self):
        all_three = configured("describe enhance pipeline", "--reasoning-level", "medium", "--device", "cpu")

        assert all_three["enhance"].settings.reasoning_level == "medium"
        assert all_three["pipeline"].settings.reasoning_level == "medium"
        assert all_three["describe"].settings.device == "cpu"

    def test_one_s_own_wins_over_the_common_one(self):
        both = configured("describe blip", "--describe.url-hosts", "b.example", "--url-hosts", "a.example")

        assert both["describe"].settings.url_hosts == ("b.example",)
        assert both["blip"].settings.url_hosts == ("a.example",)

    def test_switches_stand_alone(self):
        assert configured("blip", "--reload")["blip"].settings.reload is True
        assert configured("blip", "--no-reload")["blip"].settings.reload is False
        assert configured("describe blip", "--blip.reload", "--port", "1")["blip"].settings.reload is True

    @pytest.mark.parametrize(
        ("argv", "reason"),
        [
            (["--describe.port", "1"], "a process has one port; say --port"),
            (["--describe.auth", "off"], "a process has one auth"),
            (["--enhance.model", "x"], "enhance is not served by this process"),
            (["--describe.frob", "x"], "describe has no such setting"),
            (["--frob", "x"], "no setting is called --frob"),
            (["--port"], "--port needs a value"),
            (["8080"], "'8080' is no flag"),
            (["--port", "0"], "port"),
        ],
    )
    def test_refusals(self, argv: list[str], reason: str, capsys):
        assert reason in refusal(capsys, "describe blip", *argv)

    @pytest.mark.parametrize("name", KINDS)
    def test_one_predictor_alone_has_the_flags_it_always_had(self, name: str):
        argv = ["--port", "9", "--model-name", "x", "--queue-size", "3"]

        (item,) = configured(name, *argv).values()

        assert item.settings == load(KINDS[name], argv)
        assert configured(name, f"--{name}.port", "9", "--model-name", "x", "--queue-size", "3") == {
            name: Configured(item.settings, dict(item.origins) | {"port": f"flag --{name}.port"})
        }


class TestVariables:
    def test_a_predictor_s_own_variable_has_its_name(self, monkeypatch):
        monkeypatch.setenv("DESCRIBE__MODEL", "x")
        monkeypatch.setenv("blip__model", "y")

        both = configured("describe blip")

        assert [item.settings.model for item in both.values()] == ["x", "y"]
        assert both["describe"].origins["model"] == "env DESCRIBE__MODEL"

    def test_the_older_services_names_say_whose_they_are(self, monkeypatch):
        monkeypatch.setenv("QWEN_MODEL_NAME", "qwen")
        monkeypatch.setenv("KIMI_MODEL_PATH", "kimi")
        monkeypatch.setenv("GPT_OSS_MODEL_ID", "oss")
        monkeypatch.setenv("COLQWEN_MODEL_ID", "col")

        four = configured("describe generate enhance embed")

        assert [item.settings.model for item in four.values()] == ["qwen", "kimi", "oss", "col"]

    @pytest.mark.parametrize("variable", ["MODEL", "MODEL_PATH"])
    def test_a_variable_that_several_would_take_is_refused_with_what_to_say(self, variable, monkeypatch, capsys):
        monkeypatch.setenv(variable, "x")

        said = refusal(capsys, "generate blip")

        assert variable in said
        assert "GENERATE__MODEL or BLIP__MODEL" in said

    def test_a_variable_that_decides_nothing_is_no_fault(self, monkeypatch):
        monkeypatch.setenv("MODEL", "x")

        both = configured("generate blip", "--generate.model", "a", "--blip.model", "b")

        assert [item.settings.model for item in both.values()] == ["a", "b"]

    def test_blip_s_model_name_is_its_model_and_not_its_name_in_the_routes(self, monkeypatch):
        monkeypatch.setenv("MODEL_NAME", "Salesforce/blip-image-captioning-large")

        (item,) = configured("blip").values()

        assert item.settings.model == "Salesforce/blip-image-captioning-large"
        assert item.settings.model_name == "blip"
        assert item.origins["model"] == "env MODEL_NAME"
        assert item.origins["model_name"] == "default"
        assert configured("blip", "--model-name", "captions")["blip"].settings.model_name == "captions"

    def test_a_port_of_one_of_several_is_refused(self, monkeypatch, capsys):
        monkeypatch.setenv("DESCRIBE__PORT", "9000")

        assert "say PORT" in refusal(capsys, "describe blip")
        assert configured("describe")["describe"].settings.port == 9000

    def test_the_nearest_wins(self, folder: Path, monkeypatch):
        (folder / ".env").write_text("DESCRIBE__MODEL=4\n")
        assert configured("describe")["describe"].origins["model"] == ".env DESCRIBE__MODEL"
        monkeypatch.setenv("QWEN_MODEL_NAME", "3")
        assert configured("describe")["describe"].settings.model == "3"
        monkeypatch.setenv("DESCRIBE__MODEL", "2")
        assert configured("describe")["describe"].settings.model == "2"
        assert configured("describe", "--model", "1")["describe"].settings.model == "1"
        assert configured("describe", "--model", "1", "--describe.model", "0")["describe"].settings.model == "0"

    def test_an_empty_variable_says_nothing(self, monkeypatch):
        monkeypatch.setenv("DESCRIBE__MODEL", "")
        monkeypatch.setenv("MODEL", "")

        assert configured("describe blip")["describe"].is_default("model")


class TestStepsOfTheSameProcess:
    def test_are_taken_when_no_address_is_said(self):
        assert local_steps(configured("pipeline describe enhance blip")) == {"describe", "enhance"}
        assert local_steps(configured("pipeline describe")) == {"describe"}
        assert local_steps(configured("describe enhance")) == set()

    def test_an_address_wins(self, monkeypatch):
        monkeypatch.setenv("ENHANCE_URL", "http://elsewhere")

        assert local_steps(configured("pipeline describe enhance")) == {"describe"}


class TestShowing:
    def test_every_value_has_an_origin(self, monkeypatch, folder: Path):
        (folder / ".env").write_text("PORT=9000\n")
        monkeypatch.setenv("QWEN_MODEL_NAME", "qwen")

        answer = told(configured("describe pipeline", "--step-api-key", "hunter2", "--max-pixels", "5"))

        assert set(answer["describe"]) == set(DescribeSettings.model_fields)
        assert answer["describe"]["model"] == {"value": "qwen", "from": "env QWEN_MODEL_NAME"}
        assert answer["describe"]["port"] == {"value": 9000, "from": ".env PORT"}
        assert answer["describe"]["max_pixels"] == {"value": 5, "from": "flag --max-pixels"}
        assert answer["describe"]["auth"] == {"value": "off", "from": "env AUTH"}
        assert answer["describe"]["prompt"]["from"] == "default"
        assert answer["pipeline"]["describe_url"] == {"value": None, "from": "served in this process"}

    def test_secrets_are_hidden_in_both_forms(self):
        answer = told(
            configured(
                "pipeline", "--step-api-key", "hunter2", "--api-keys", "hunter3", "--describe-url", "http://a:hunter4@b"
            )
        )

        assert "hunter" not in str(answer)
        assert "hunter" not in shown_as_table(answer)
        assert answer["pipeline"]["step_api_key"]["from"] == "flag --step-api-key"

    def test_the_table_has_a_line_a_value(self):
        table = shown_as_table(told(configured("enhance")))

        assert len(table.splitlines()) == len(EnhanceSettings.model_fields) + 1
        assert any(line.split() == ["port", "8080", "default"] for line in table.splitlines())

    def test_help_of_several_lists_the_common_once_and_the_others_by_name(self, capsys):
        with pytest.raises(SystemExit) as caught:
            configured("describe blip", "--help")

        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert said.count("--port") == 1
        assert "--describe.model " in said
        assert "--blip.model " in said
