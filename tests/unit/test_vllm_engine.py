"""The vLLM engine's own part, with a client behind gates instead of vLLM: deadlines, aborts, death, sleep; no clock."""

import asyncio
import sys
import types
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from sightline.engines import vllm
from sightline.engines.base import Generated, Runtime
from sightline.engines.vllm import EngineDied, EngineMissing, Step, VLLMEngine, engine_arguments
from sightline.errors import DeadlineExceeded, InternalError, InvalidParameter, SightlineError, Unavailable
from sightline.settings import DescribeSettings, EnhanceSettings, GenerateSettings
from sightline.wire import Deadline, Sampling

PATIENCE_SECONDS = 10
GREEDY = Sampling(max_tokens=8)


class Front:
    repetition_penalty = 1.0
    stops = frozenset({2})

    def __init__(self) -> None:
        self.runtime = Runtime("hf", "meta", "torch.float32")


@dataclass(frozen=True)
class Prompt:
    input_ids: Sequence[int] = (5, 6, 7)
    image_tokens: int = 2


@dataclass
class FakeClient:
    """Answers with `steps`, each when the test has released one; tells what it was asked."""

    steps: list[Step | Exception]
    context: int = 16
    runtime: Runtime = field(default_factory=lambda: Runtime("vllm", "cpu", "torch.float32"))
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    events: list[str] = field(default_factory=list)
    has_died: bool = False

    async def submit(self, prompt: Prompt, sampling: Sampling, *, in_steps: bool) -> AsyncGenerator[Step]:
        self.events.append("submitted in steps" if in_steps else "submitted")
        try:
            for step in self.steps:
                await self.gate.acquire()
                if isinstance(step, Exception):
                    raise step
                yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.events.append("aborted")
            raise

    def is_dead(self) -> bool:
        return self.has_died

    async def sleep(self) -> None:
        self.events.append("asleep")

    async def wake(self) -> None:
        self.events.append("awake")

    def shut_down(self) -> None:
        self.events.append("shut down")

    def let_go(self, times: int = 8) -> None:
        for _ in range(times):
            self.gate.release()


ANSWER: list[Step | Exception] = [Step((8,), None), Step((9, 2), "stop")]


async def started(client: FakeClient, **options: float) -> VLLMEngine[Front]:
    engine = VLLMEngine(Front, lambda front: client, **options)
    await engine.start()
    return engine


async def until(condition: object) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def later() -> Deadline:
    return Deadline.after(60)


async def test_an_answer_has_all_tokens_and_the_counts_of_its_prompt() -> None:
    client = FakeClient(ANSWER)
    client.let_go()
    engine = await started(client)

    made = await engine.generate(Prompt(), GREEDY, later())

    assert made == Generated((8, 9, 2), "stop", prompt_tokens=3, image_tokens=2)
    assert client.events == ["submitted"]
    assert engine.model.runtime.backend == "vllm"
    await engine.close()


async def test_a_stream_gives_tokens_as_they_come_and_then_the_whole() -> None:
    client = FakeClient(ANSWER)
    engine = await started(client)

    parts = engine.stream(Prompt(), GREEDY, later())
    client.let_go(1)
    assert await anext(parts) == [8]
    client.let_go(1)

    assert [part async for part in parts] == [[9, 2], Generated((8, 9, 2), "stop", 3, 2)]
    await engine.close()


async def test_a_stream_ends_where_its_reader_has_enough() -> None:
    client = FakeClient([Step((8,), None)] * 5)
    client.let_go()
    engine = await started(client)
    heard: list[list[int] | Generated] = []

    async for part in engine.stream(Prompt(), GREEDY, later(), is_enough=lambda: len(heard) >= 2):
        heard.append(part)

    assert heard == [[8], [8], Generated((8, 8), "length", 3, 2)]
    assert client.events == ["submitted in steps", "aborted"]
    await engine.close()


async def test_a_cancelled_answer_is_aborted() -> None:
    client = FakeClient(ANSWER)
    engine = await started(client)
    task = asyncio.create_task(engine.generate(Prompt(), GREEDY, later()))
    await until(lambda: client.events)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert client.events == ["submitted", "aborted"]
    await engine.close()


async def test_a_closed_stream_is_aborted() -> None:
    client = FakeClient(ANSWER)
    client.let_go(1)
    engine = await started(client)

    async with aclosing(engine.stream(Prompt(), GREEDY, later())) as parts:
        await anext(parts)

    assert client.events == ["submitted in steps", "aborted"]
    await engine.close()


async def test_a_missed_deadline_aborts_the_answer() -> None:
    client = FakeClient(ANSWER)
    engine = await started(client)

    with pytest.raises(DeadlineExceeded):
        await engine.generate(Prompt(), GREEDY, Deadline.after(0.05))

    assert client.events == ["submitted", "aborted"]
    await engine.close()


async def test_an_expired_request_never_reaches_the_engine() -> None:
    client = FakeClient(ANSWER)
    engine = await started(client)

    with pytest.raises(DeadlineExceeded):
        await engine.generate(Prompt(), GREEDY, Deadline.after(-1))

    assert not client.events
    await engine.close()


async def test_a_prompt_longer_than_the_engine_reads_is_refused() -> None:
    engine = await started(FakeClient(ANSWER, context=3))

    with pytest.raises(InvalidParameter) as caught:
        await engine.generate(Prompt(), GREEDY, later())

    assert caught.value.code == "prompt_too_long"
    await engine.close()


async def test_the_death_of_the_engine_is_told_to_who_waits_and_to_who_comes() -> None:
    client = FakeClient([EngineDied("ended")])
    client.let_go()
    engine = await started(client)
    assert engine.fault is None

    with pytest.raises(EngineDied):
        await engine.generate(Prompt(), GREEDY, later())
    client.has_died = True
    with pytest.raises(EngineDied) as caught:
        await engine.generate(Prompt(), GREEDY, later())

    assert (caught.value.status, caught.value.code) == (503, "engine_died")
    assert engine.fault is not None
    assert client.events == ["submitted"]  # the second one was not handed over
    await engine.close()


async def test_an_answer_without_an_end_is_no_answer() -> None:
    client = FakeClient([Step((8,), None)])
    client.let_go()
    engine = await started(client)

    with pytest.raises(InternalError):
        await engine.generate(Prompt(), GREEDY, later())
    await engine.close()


async def test_nothing_is_answered_before_the_start_and_after_the_end() -> None:
    client = FakeClient(ANSWER)
    engine = VLLMEngine(Front, lambda front: client)
    with pytest.raises(Unavailable):
        _ = engine.model
    with pytest.raises(Unavailable):
        await engine.generate(Prompt(), GREEDY, later())
    await engine.start()

    await engine.close()

    assert client.events == ["shut down"]
    assert engine.fault is None
    with pytest.raises(Unavailable):
        await engine.generate(Prompt(), GREEDY, later())


async def test_what_keeps_the_engine_from_starting_is_raised() -> None:
    def connect(front: Front) -> FakeClient:
        raise EngineMissing("no vLLM")

    with pytest.raises(EngineMissing, match="no vLLM"):
        await VLLMEngine(Front, connect).start()


async def test_an_engine_that_comes_after_its_start_was_given_up_is_shut_down() -> None:
    client, may_connect = FakeClient(ANSWER), asyncio.Event()
    loop = asyncio.get_running_loop()

    def connect(front: Front) -> FakeClient:
        asyncio.run_coroutine_threadsafe(may_connect.wait(), loop).result(PATIENCE_SECONDS)
        return client

    start = asyncio.create_task(VLLMEngine(Front, connect).start())
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    may_connect.set()

    await until(lambda: client.events == ["shut down"])


async def test_an_idle_engine_sleeps_and_the_next_request_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "WATCH_SECONDS", 0.01)
    client = FakeClient(ANSWER)
    engine = await started(client, sleep_seconds=0.05)
    await until(lambda: client.events == ["asleep"])

    client.let_go()
    made = await asyncio.gather(*(engine.generate(Prompt(), GREEDY, later()) for _ in range(2)))

    assert len(made) == 2
    assert client.events[:4] == ["asleep", "awake", "submitted", "submitted"]
    await engine.close()


async def test_an_engine_that_has_work_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "WATCH_SECONDS", 0.01)
    client = FakeClient(ANSWER)
    engine = await started(client, sleep_seconds=0.02)
    task = asyncio.create_task(engine.generate(Prompt(), GREEDY, later()))
    await until(lambda: client.events)

    await asyncio.sleep(0.2)
    assert "asleep" not in client.events[client.events.index("submitted") :]
    client.let_go()
    await task
    await engine.close()


# --- what vLLM is started with ---------------------------------------------------------------------------------------


def describe(**values: object) -> DescribeSettings:
    return DescribeSettings(auth="off", engine="vllm", **values)  # type: ignore[arg-type]


def test_the_type_is_the_checkpoints_own_and_pixels_are_normalised_once() -> None:
    arguments = engine_arguments(describe(queue_size=7), "torch.float32", is_cpu=True)

    assert arguments["dtype"] == "float32"
    assert arguments["mm_device_do_normalize"] is False
    assert arguments["max_num_seqs"] == 7
    assert arguments["enforce_eager"] is True
    assert arguments["kv_cache_memory_bytes"] == 1024**3
    assert arguments["enable_prefix_caching"] is False
    assert arguments["trust_remote_code"] is False


def test_a_gpu_compiles_and_shares_its_memory_as_told() -> None:
    arguments = engine_arguments(describe(vllm_memory_share=0.5), "torch.bfloat16", is_cpu=False)

    assert arguments["enforce_eager"] is False
    assert arguments["gpu_memory_utilization"] == 0.5
    assert "kv_cache_memory_bytes" not in arguments


def test_a_text_model_has_no_image_settings() -> None:
    arguments = engine_arguments(EnhanceSettings(auth="off", engine="vllm"), "torch.float32", is_cpu=True)

    assert "limit_mm_per_prompt" not in arguments


@pytest.mark.parametrize("values", [{"load_8bit": True}])
def test_describe_is_not_quantised_by_vllm(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="takes a checkpoint as it is"):
        describe(**values)


def test_generate_is_not_quantised_by_vllm() -> None:
    with pytest.raises(ValueError, match="takes a checkpoint as it is"):
        GenerateSettings(auth="off", engine="vllm", quantization="8bit")


def test_without_vllm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm.os, "environ", dict(vllm.os.environ))

    with pytest.raises(EngineMissing, match=r"sightline\[vllm\]"):
        vllm.connect(describe(), Front())


@pytest.mark.parametrize("threads", [1, 999])
def test_threads_are_bound_only_where_every_core_is_ours(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    environment: dict[str, str] = {}
    fake = types.SimpleNamespace(environ=environment, sched_getaffinity=lambda _: {3})
    monkeypatch.setattr(vllm, "os", fake)

    vllm._set_environment(describe(threads=threads))

    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ("3" if threads == 1 else "nobind")


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    monkeypatch.setattr(vllm, "os", types.SimpleNamespace(environ=environment))

    vllm._set_environment(describe(vllm_batch_invariant=True))

    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert environment["VLLM_BATCH_INVARIANT"] == "1"


def test_every_fault_of_the_engine_is_one_that_a_client_may_see() -> None:
    assert issubclass(EngineDied, SightlineError)
