"""`make bench-gpu` runs from end to end without a GPU, on tiny models, and says so."""

import json

import pytest
import torch

from tests.bench import gpu

GIVEN = ["--dry", "--seconds", "0.001"]


def test_every_part_gives_figures_beside_a_roofline(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([*GIVEN, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dry"] is True
    whats = [(figure["model"], figure["what"]) for figure in said["figures"]]
    assert ("Qwen2.5-VL-7B", "prefill") in whats
    assert ("ColQwen2.5", "pages") in whats
    assert ("BLIP-large", "encode") in whats
    assert {what for model, what in whats if model == "gpt-oss-shaped"} == {f"decode x{n}" for n in (1, 16, 64)}
    assert all(figure["rate"] > 0 and figure["bound"] > 0 for figure in said["figures"])


def test_a_dry_run_says_that_its_figures_mean_nothing(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([*GIVEN, "--only", "blip"]) == 0
    assert "DRY" in capsys.readouterr().out


def test_the_roofline_counts_the_parameters_that_multiply():
    model = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(100, 8),
            "visual": torch.nn.Linear(8, 8),
            "experts": torch.nn.Linear(8, 80),
            "lm_head": torch.nn.Linear(8, 100),
        }
    )
    assert gpu.matrix_parameters(model) == (640 + 800, 64)
    assert gpu.matrix_parameters(model, active=0.25) == (160 + 800, 64)
