"""`sightline fit` and `sightline self-check` as people call them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sightline.cli import app
from sightline.golden import Golden
from sightline.memory import GIB
from sightline.settings import TINY

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_model_that_fits_exits_0_and_says_how_many_at_once():
    done = run("fit", QWEN, "--profile", "gpu-1x48", "--quantization", "none")
    assert done.exit_code == 0
    assert "15.4 GiB" in done.output
    assert "fits; at most" in done.output
    assert "Assumed, not measured" in done.output


def test_a_model_that_does_not_fit_exits_1():
    assert run("fit", QWEN, "--memory", "12GiB", "--quantization", "none").exit_code == 1
    assert run("fit", QWEN, "--memory", "15GiB").exit_code == 0  # in 8 bits it does


def test_json_is_bytes_and_adds_up():
    said = json.loads(run("fit", "openai/gpt-oss-120b", "--profile", "gpu-1x80", "--json").output)
    first = said["estimates"][0]
    assert (first["scheme"], first["predictor"], said["fits"]) == ("mxfp4", "enhance", True)
    assert first["parameters"] == 116_829_156_672
    assert first["limit"] == 79 * GIB
    assert first["total"] == sum(first[part] for part in ("weights", "cache", "activations", "overhead"))


def test_more_sequences_of_a_longer_context_need_more():
    def cache(*words: str) -> int:
        return json.loads(run("fit", QWEN, "--json", *words).output)["estimates"][0]["cache"]

    assert cache("--concurrency", "16") == 2 * cache("--concurrency", "8")
    assert cache("--context", "8192") == pytest.approx(2 * cache("--context", "4096"))


def test_a_folder_is_read_and_the_cpu_is_a_device():
    done = run("fit", str(TINY / "describe"), "--profile", "cpu")
    assert done.exit_code == 0, done.output
    assert "5.0 MiB" in done.output  # 1.32 million parameters in float32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no/such/model",), "neither a folder"),
        ((QWEN, "--profile", "gpu-8x80"), "gpu-2x80"),
        ((QWEN, "--memory", "lots"), "20GiB"),
        ((QWEN, "--quantization", "4bit"), "8bit, none"),
        ((QWEN, "--dtype", "int3"), "bfloat16"),
        ((QWEN, "--memory", "1GiB", "--device", "tpu"), "cuda or cpu"),
    ],
)
def test_a_wrong_word_exits_2_and_is_named(words: tuple[str, ...], said: str):
    done = run("fit", *words)
    assert done.exit_code == 2
    assert said in done.output


def test_self_check_writes_what_it_then_passes(tmp_path: Path):
    path = tmp_path / "golden.json"
    assert run("self-check", "blip", "--write", str(path), "--threads", "1").exit_code == 0
    assert Golden.read(path) == Golden.read(TINY / "blip" / "sightline_golden.json")
    assert run("self-check", "blip", "--golden-file", str(path), "--threads", "1").exit_code == 0
    Golden("torch.float32", tokens=(1,)).write(path)
    done = run("self-check", "blip", "--golden-file", str(path), "--threads", "1")
    assert (done.exit_code, "golden_differs" in done.output) == (1, True)
    assert run("self-check", "nobody").exit_code == 2
