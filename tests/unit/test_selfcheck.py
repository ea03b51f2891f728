"""A replica that would answer wrongly is refused with its reason: a copy of a small checkpoint, broken in each way."""

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sightline import golden
from sightline.golden import Golden
from sightline.memory import GIB, MIB, Profile
from sightline.models import selfcheck
from sightline.models.blip import Blip
from sightline.models.colqwen import ColQwen
from sightline.models.gpt_oss.model import GptOss
from sightline.models.kimi_vl.model import KimiVL
from sightline.models.loading import LoadFailed
from sightline.models.qwen_vl import QwenVL
from sightline.models.selfcheck import check_memory, check_types, checked, profile_largest, refusing_network, tried
from sightline.settings import (
    TINY,
    BlipSettings,
    DescribeSettings,
    EmbedSettings,
    EngineSettings,
    EnhanceSettings,
    GenerateSettings,
)
from tests.unit.checkpoints import change_weights, copy_of, drop_one, reshape_one

KINDS: dict[str, tuple[type[EngineSettings], Any]] = {
    "describe": (DescribeSettings, QwenVL),
    "generate": (GenerateSettings, KimiVL),
    "embed": (EmbedSettings, ColQwen),
    "enhance": (EnhanceSettings, GptOss),
    "blip": (BlipSettings, Blip),
}


def settings_of(name: str, **said: Any) -> EngineSettings:
    return KINDS[name][0](auth="off", threads=1, **said)


def load(name: str, **said: Any) -> Any:
    return checked(KINDS[name][1], settings_of(name, **said))


def reason_of(name: str, **said: Any) -> str:
    with pytest.raises(LoadFailed) as raised:
        load(name, **said)
    return raised.value.reason


@pytest.fixture(scope="module")
def describe() -> QwenVL:
    return QwenVL(settings_of("describe"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_our_own_checkpoints_pass_and_have_a_golden_file(name: str):
    assert (TINY / name / golden.FILE_NAME).is_file()
    load(name)


@pytest.mark.parametrize("name", KINDS)
def test_weights_that_are_missing(name: str, tmp_path: Path):
    copy = copy_of(TINY / name, tmp_path)
    change_weights(copy, drop_one)
    assert reason_of(name, model=str(copy)) == "weights_missing"


def test_weights_of_another_shape(tmp_path: Path):
    copy = copy_of(TINY / "describe", tmp_path)
    change_weights(copy, reshape_one)
    assert reason_of("describe", model=str(copy)) == "weights_mismatched"


@pytest.mark.parametrize("name", KINDS)
def test_weights_that_were_initialised_anew_answer_otherwise_than_the_golden_file_says(name: str, tmp_path: Path):
    def initialise(weights: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        for key, tensor in weights.items():
            if tensor.ndim > 1:
                weights[key] = torch.randn_like(tensor) * 0.02

    copy = copy_of(TINY / name, tmp_path)
    change_weights(copy, initialise)
    assert reason_of(name, model=str(copy)) == "golden_differs"


def test_a_golden_file_that_the_settings_name_wins(tmp_path: Path):
    path = tmp_path / "other.json"
    Golden("torch.float32", tokens=(1, 2, 3)).write(path)
    assert reason_of("describe", golden_file=path) == "golden_differs"
    path.write_text("[]")
    assert reason_of("describe", golden_file=path) == "golden_unreadable"
    assert reason_of("describe", golden_file=tmp_path / "none.json") == "golden_unreadable"


def test_in_another_type_nothing_is_compared():
    load("describe", dtype="bfloat16")


def test_another_type_than_configured(describe: QwenVL):
    check_types(describe, settings_of("describe", dtype="float32"))
    with pytest.raises(LoadFailed) as raised:
        check_types(describe, settings_of("describe", dtype="bfloat16"))
    assert raised.value.reason == "dtype_differs"


def test_weights_that_were_not_quantised_as_asked(describe: QwenVL):
    with pytest.raises(LoadFailed) as raised:
        check_types(describe, settings_of("describe", load_8bit=True))
    assert raised.value.reason == "weights_dequantised"


def test_mxfp4_weights_that_became_wide(tmp_path: Path):
    """The file says MXFP4, the loader made floats of it."""
    from tests.unit.checkpoints import change_config

    model = GptOss(settings_of("enhance"))  # type: ignore[arg-type]
    copy = copy_of(TINY / "enhance", tmp_path)
    change_config(copy, lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    with pytest.raises(LoadFailed) as raised:
        check_types(model, settings_of("enhance", model=str(copy)))
    assert raised.value.reason == "weights_dequantised"


def test_position_ids_that_are_dropped(describe: QwenVL, monkeypatch: pytest.MonkeyPatch):
    tried(describe)
    places = describe._model.model.get_rope_index

    def without_types(input_ids: torch.Tensor, token_types: torch.Tensor, **grids: Any) -> Any:
        return places(input_ids, torch.zeros_like(token_types), image_grid_thw=None)

    monkeypatch.setattr(describe._model.model, "get_rope_index", without_types)
    with pytest.raises(LoadFailed) as raised:
        tried(describe)
    assert raised.value.reason == "positions_dropped"


def test_position_ids_that_are_dropped_from_pages(monkeypatch: pytest.MonkeyPatch):
    model = ColQwen(settings_of("embed"))  # type: ignore[arg-type]
    tried(model)
    page = model.preprocess_page

    def without_types(image: Any, **options: Any) -> Any:
        item = page(image, **options)
        return replace(item, token_types=torch.zeros_like(item.token_types))

    monkeypatch.setattr(model, "preprocess_page", without_types)
    with pytest.raises(LoadFailed) as raised:
        tried(model)
    assert raised.value.reason == "positions_dropped"


def watched(work: Callable[[], None]) -> None:
    with refusing_network(is_offline=True):
        work()


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


class TestNetwork:
    ELSEWHERE = ("192.0.2.1", 9)  # an address for documentation: nobody has it

    def test_what_loading_asks_of_the_network_is_refused_even_if_it_hides_that(self):
        def reach() -> None:
            with contextlib.suppress(OSError):
                socket.create_connection(self.ELSEWHERE, timeout=60)

        with pytest.raises(LoadFailed) as raised:
            watched(reach)
        assert raised.value.reason == "network_touched"
        assert "192.0.2.1" in str(raised.value)

    def test_a_thread_that_loading_began_is_loading(self):
        def reach() -> None:
            with contextlib.suppress(OSError):
                socket.getaddrinfo("hub.invalid", 443)

        with pytest.raises(LoadFailed, match=r"hub\.invalid"):
            watched(lambda: in_a_thread(reach))

    def test_this_machine_is_not_the_network(self):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            with refusing_network(is_offline=True):
                socket.create_connection(server.getsockname(), timeout=60).close()

    def test_other_threads_go_on(self):
        begin, done = threading.Event(), threading.Event()
        faults: list[BaseException] = []

        def reach() -> None:
            begin.wait(60)
            try:
                socket.getaddrinfo("192.0.2.1", 9)
            except OSError as fault:
                faults.append(fault)
            done.set()

        threading.Thread(target=reach, daemon=True).start()
        with refusing_network(is_offline=True):
            begin.set()
            assert done.wait(60)
        assert not faults

    def test_online_nothing_is_refused(self):
        with refusing_network(is_offline=False):
            socket.getaddrinfo("192.0.2.1", 9)


class TestMemory:
    def test_weights_that_do_not_fit_are_refused_before_they_are_read(self):
        settings = settings_of("describe", model="Qwen/Qwen2.5-VL-7B-Instruct")
        with pytest.raises(LoadFailed, match=r"15\.4 GiB") as raised:
            check_memory(settings, Profile(12 * GIB, "cuda"))
        assert raised.value.reason == "memory_too_small"

    def test_a_batch_that_does_not_fit_is_a_warning_with_what_does(self, caplog: pytest.LogCaptureFixture):
        settings = settings_of("describe", model="Qwen/Qwen2.5-VL-7B-Instruct", max_batch=64)
        check_memory(settings, Profile(24 * GIB, "cuda"))
        assert "at once fit" in caplog.text

    def test_8_bits_are_counted_as_8_bits(self):
        settings = settings_of("describe", model="Qwen/Qwen2.5-VL-7B-Instruct", load_8bit=True)
        check_memory(settings, Profile(12 * GIB, "cuda"))

    def test_what_is_not_at_hand_is_not_judged(self):
        check_memory(settings_of("describe", model="somebody/else"), Profile(1, "cuda"))

    def test_this_machine_has_room_for_our_own(self):
        check_memory(settings_of("describe"))
        assert selfcheck._main_memory() > 100 * MIB

    def test_the_largest_image_is_run_when_asked_for(self, describe: QwenVL, caplog: pytest.LogCaptureFixture):
        caplog.set_level("INFO")
        peak = profile_largest(describe, settings_of("describe"))
        assert peak > 50 * MIB  # of this process: Python, torch and the model
        assert "largest image, 144 x 144" in caplog.text

    def test_a_largest_image_that_does_not_fit_is_said(self, describe: QwenVL, monkeypatch: pytest.MonkeyPatch):
        def too_large(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(describe, "generate", too_large)
        assert profile_largest(describe, settings_of("describe")) == -1


def test_checks_can_be_switched_off(tmp_path: Path):
    path = tmp_path / "other.json"
    Golden("torch.float32", tokens=(1, 2, 3)).write(path)
    load("describe", golden_file=path, self_checks="off")


def test_the_golden_picture_never_changes():
    pixels = np.asarray(golden.picture())
    assert pixels.shape == (96, 160, 3)
    assert int(pixels.astype(np.int64).sum()) == 5_997_456
