"""vLLM's AsyncLLM in this process, behind the same four verbs as `engines.hf`: `--engine vllm`.

    sightline serve describe --auth off --engine vllm          # extra `vllm`; on a CPU see docs/engine-vllm.md

The prompt is ours: the model class tokenises and cuts images into patches exactly as for `hf`, without its weights,
and vLLM is given those token ids and pixels. So it never sees an image, and both engines answer the same prompt.
vLLM batches, pages its cache and runs in a process of its own. Nothing here imports it before `start`.
"""

import asyncio
import contextlib
import hashlib
import importlib
import itertools
import logging
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from sightline.engines.base import MIN_TEMPERATURE, Generated, Runtime
from sightline.errors import DeadlineExceeded, InternalError, InvalidParameter, Unavailable
from sightline.settings import DescribeSettings, GenerateSettings, VisionSettings, VllmSettings, cpu_quota
from sightline.wire import MAX_IMAGES_PER_PROMPT, Deadline, FinishReason, Sampling

log = logging.getLogger("sightline.engines")

WATCH_SECONDS = 0.5
"""How often the engine's process is looked at; a request that it leaves unanswered learns of its end at once."""

CPU_CACHE_GIB = 1.0
"""Key-value cache on a CPU when nothing is said: vLLM would take nearly all of the machine's memory."""

STOP_SECONDS = 5
"""What the engine's process gets to end by itself."""

T = TypeVar("T")


class Front(Protocol):
    """What of a model stays in this process: it makes prompts and reads answers, and has no weights."""

    runtime: Runtime
    repetition_penalty: float

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...


Model = TypeVar("Model", bound=Front)


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens that came together; `finish_reason` is there with the last ones."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Client(Protocol):
    """The engine's process as seen from here; `AsyncLLMClient` is the only one outside of tests.

    runtime   where it computes
    context   tokens that a prompt and its answer may have together
    """

    @property
    def runtime(self) -> Runtime: ...
    @property
    def context(self) -> int: ...

    def submit(self, prompt: Any, sampling: Sampling, *, in_steps: bool) -> AsyncGenerator[Step]:  # noqa: ANN401
        """New tokens; those of a whole answer together unless `in_steps`. Closing it aborts the request.

        Raises EngineDied.
        """
        ...

    def is_dead(self) -> bool: ...
    async def sleep(self) -> None: ...
    async def wake(self) -> None: ...
    def shut_down(self) -> None:
        """End its processes; blocks."""
        ...


class EngineMissing(RuntimeError):
    """vLLM is not installed, or not one that can do what was asked for; the server exits with this line."""


class EngineDied(Unavailable):
    """The engine's process ended, and nothing in here can bring it back: 503, and the server is not ready any more."""

    default_code = "engine_died"


class VLLMEngine(Generic[Model]):
    """Hands requests to one vLLM engine and their tokens back; see `engines.hf.HFEngine` for what each verb promises.

    load           builds the model's front
    connect        (front) → the running engine; blocks for as long as it loads
    sleep_seconds  without a request, after which the engine gives its memory back until the next one
    """

    def __init__(
        self,
        load: Callable[[], Model],
        connect: Callable[[Model], Client],
        *,
        sleep_seconds: float | None = None,
    ) -> None:
        self._load = load
        self._connect = connect
        self._sleep_seconds = sleep_seconds
        self._model: Model | None = None
        self._client: Client | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_closing = False
        self._is_asleep = False
        self._running = 0
        self._idle_since = time.monotonic()
        self._waking = asyncio.Lock()

    @property
    def model(self) -> Model:
        """The model's front. Raises Unavailable (503) before the engine is there."""
        if self._model is None:
            raise Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)
        return self._model

    @property
    def health(self) -> None:
        """Of the device's memory, which is vLLM's to keep."""
        return None

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, or None."""
        is_dead = self._client is not None and not self._is_closing and self._client.is_dead()
        return "the vLLM engine's process has ended" if is_dead else None

    async def start(self) -> None:
        """Start the engine beside the event loop; returns when it is there, raises what starting raised."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[tuple[Model, Client]] = loop.create_future()

        def run() -> None:
            try:
                model = self._load()
                client = self._connect(model)
            except BaseException as fault:
                _tell(loop, lambda fault=fault: None if started.done() else started.set_exception(fault))
                return
            if self._is_closing:
                client.shut_down()
                return
            _tell(loop, lambda: None if started.done() else started.set_result((model, client)))

        # A daemon: a process told to stop while the engine loads must not wait for it.
        threading.Thread(target=run, name="engine-start", daemon=True).start()
        try:
            model, self._client = await started
        except asyncio.CancelledError:
            self._is_closing = True
            _end_children()
            raise
        model.runtime = self._client.runtime
        self._model = model
        self._idle_since = time.monotonic()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End the engine and its processes; what still runs gets Unavailable (503)."""
        self._is_closing = True
        if self._watching is not None:
            self._watching.cancel()
        if self._client is not None:
            self._client.shut_down()  # not beside the loop: vLLM's reader on it would take this for a crash

    async def generate(
        self,
        prepared: Any,  # noqa: ANN401
        options: Sampling,
        deadline: Deadline,
        *,
        client: str = "",
    ) -> Generated:
        """The answer to one prompt.

        client  who asks: of no account here, as whoever was let in is answered in the order of arrival

        Cancelling the caller aborts it. Raises DeadlineExceeded (504), InvalidParameter (422), EngineDied and
        Unavailable (503).
        """
        parts = self._parts(prepared, options, deadline, in_steps=False)
        async with aclosing(parts):
            return [part async for part in parts if isinstance(part, Generated)][-1]

    async def stream(
        self,
        prepared: Any,  # noqa: ANN401
        options: Sampling,
        deadline: Deadline,
        *,
        client: str = "",
        is_enough: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[list[int] | Generated]:
        """The new token ids as they are made, those that came together in one list, then the whole result.

        is_enough  asked after each list; True ends the answer there, with its result

        Closing the generator aborts the request. Raises what `generate` raises.
        """
        parts = self._parts(prepared, options, deadline, in_steps=True, is_enough=is_enough)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def _parts(
        self,
        prepared: Any,  # noqa: ANN401
        options: Sampling,
        deadline: Deadline,
        *,
        in_steps: bool,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[list[int] | Generated]:
        deadline.check()
        client = self._ready(len(prepared.input_ids))
        ids: list[int] = []
        finish_reason: FinishReason | None = None
        self._running += 1
        try:
            await _before(deadline, self._awake(client))
            async with aclosing(client.submit(prepared, options, in_steps=in_steps)) as steps:
                while finish_reason is None and not is_enough():
                    step = await _before(deadline, anext(steps))
                    ids += step.token_ids
                    finish_reason = step.finish_reason
                    if finish_reason is not None:
                        await anext(steps, None)  # it ends by itself; closing it would abort what is done
                    if step.token_ids:
                        yield list(step.token_ids)
        except StopAsyncIteration as error:
            raise InternalError("The engine ended an answer without a word.") from error
        finally:
            self._running -= 1
            self._idle_since = time.monotonic()
        images = int(getattr(prepared, "image_tokens", 0))
        yield Generated(tuple(ids), finish_reason or "length", len(prepared.input_ids), images)

    def _ready(self, tokens: int) -> Client:
        if self._client is None or self._is_closing:
            raise Unavailable("The model is not ready.", code="model_not_ready", retry_after=5)
        if self.fault is not None:
            raise EngineDied("The engine that makes the answers has ended; the server must be started again.")
        if tokens >= self._client.context:
            raise InvalidParameter(
                f"The prompt has {tokens} tokens; this engine reads {self._client.context}.", code="prompt_too_long"
            )
        return self._client

    async def _awake(self, client: Client) -> None:
        if not self._is_asleep and not self._waking.locked():
            return
        async with self._waking:
            if self._is_asleep:
                await asyncio.shield(client.wake())
                self._is_asleep = False
                log.info("the engine is awake again")

    async def _watch(self) -> None:
        """Say when the engine's process ends, and put it to sleep when nobody asks for anything."""
        client = cast("Client", self._client)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if client.is_dead():
                log.critical("the vLLM engine's process has ended; this server answers no request any more")
                return
            idle = time.monotonic() - self._idle_since
            if self._sleep_seconds is None or self._is_asleep or self._running or idle < self._sleep_seconds:
                continue
            async with self._waking:
                await client.sleep()
                self._is_asleep = True
                log.info("the engine sleeps after %.0f s without a request", idle)


async def _before(deadline: Deadline, work: Any) -> Any:  # noqa: ANN401 - an awaitable and its result
    limit = asyncio.timeout(deadline.remaining())
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("The model did not answer within the deadline.") from error


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # closed: the process is ending and nobody listens
        loop.call_soon_threadsafe(callback)


def _end_children() -> None:
    """End the engine's processes while they still load: there is no engine yet that could be asked to."""
    for child in multiprocessing.active_children():
        if child.name.startswith(("EngineCore", "VllmWorker")):
            child.terminate()


# --- vLLM itself -----------------------------------------------------------------------------------------------------


def vllm(part: str) -> Any:  # noqa: ANN401 - a module
    """A module of vLLM's, imported when it is needed: `vllm(".inputs")`. Raises ImportError."""
    return importlib.import_module(f"vllm{part}")


def connect(settings: VllmSettings, front: Front) -> Client:
    """Start vLLM on a checkpoint. Raises EngineMissing, and whatever keeps vLLM from loading it."""
    _set_environment(settings)
    try:
        client = vllm(".v1.engine.async_llm").AsyncLLM
    except ImportError as error:
        raise EngineMissing(
            "engine vllm needs the extra `vllm` (pip install 'sightline[vllm]'; on a CPU see docs/engine-vllm.md), "
            f"and `import vllm` said: {error}"
        ) from error
    platform = vllm(".platforms").current_platform
    is_cpu = bool(platform.is_cpu())
    if settings.device != "auto" and (settings.device == "cpu") != is_cpu:
        raise EngineMissing(f"device is {settings.device} and this vLLM was built for {platform.device_type}")
    if is_cpu and settings.vllm_batch_invariant:
        raise EngineMissing("vllm_batch_invariant: vLLM has it on GPUs only")
    if is_cpu:  # Kimi-VL's latent attention is compiled there for one size of cache only
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    arguments = engine_arguments(settings, front.runtime.dtype, is_cpu=is_cpu)
    log.info("starting vLLM %s", arguments)
    return AsyncLLMClient(client.from_engine_args(vllm(".engine.arg_utils").AsyncEngineArgs(**arguments)), front)


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`): which of its models are ours."""
    vllm("").ModelRegistry.register_model("KimiVLForConditionalGeneration", "sightline.engines.vllm_kimi:KimiVL")


def engine_arguments(settings: VllmSettings, dtype: str, *, is_cpu: bool) -> dict[str, Any]:
    """AsyncEngineArgs of our settings.

    dtype   of the checkpoint (`torch.bfloat16`): vLLM's own `auto` would make float32 to bfloat16
    """
    arguments: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "tokenizer_revision": settings.revision,
        "download_dir": None if settings.cache_dir is None else str(settings.cache_dir),
        "trust_remote_code": False,
        "dtype": dtype.removeprefix("torch."),
        "max_model_len": settings.vllm_context or -1,  # -1: as much of the model's as the cache can hold
        "max_num_seqs": settings.queue_size,  # what may wait is bounded there: see server.model.Admission
        "enable_prefix_caching": settings.vllm_prefix_cache,
        "mm_processor_cache_gb": 0,  # pixels are ours, so there is nothing of vLLM's to keep
        "enable_sleep_mode": settings.vllm_sleep_seconds is not None,
        "enforce_eager": not settings.vllm_compile if settings.vllm_compile is not None else is_cpu,
        "disable_log_stats": True,
        "generation_config": "vllm",  # every sampling field is said with each request
    }
    if isinstance(settings, VisionSettings):
        arguments["limit_mm_per_prompt"] = {"image": MAX_IMAGES_PER_PROMPT}
        arguments["mm_device_do_normalize"] = False  # else it would normalise pixels that are normalised already
    if isinstance(settings, GenerateSettings):
        arguments["hf_overrides"] = as_deepseek_v3
    if isinstance(settings, DescribeSettings):
        arguments["limit_mm_per_prompt"] |= {"video": 0}
    if settings.vllm_memory_share is not None:
        arguments["gpu_memory_utilization"] = settings.vllm_memory_share
    cache = settings.vllm_cache_gib or (CPU_CACHE_GIB if is_cpu else None)
    if cache is not None:
        arguments["kv_cache_memory_bytes"] = int(cache * 1024**3)
    return arguments


def as_deepseek_v3(config: Any) -> Any:  # noqa: ANN401 - a PretrainedConfig
    """Kimi-VL's configuration with what transformers takes for granted of its text model, and vLLM asks for."""
    config.text_config.topk_method = "noaux_tc"
    config.text_config.scoring_func = "sigmoid"
    return config


def _set_environment(settings: VllmSettings) -> None:
    """What vLLM reads from the environment, before it is imported; whatever is there already stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": settings.log_level.upper()}
    if settings.vllm_batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = settings.threads or cpu_quota()
    # Its own `auto` keeps a core for this process, which halves two. Where the quota is less than what we may run on,
    # all containers of a node would bind themselves to the same first cores.
    if len(cpus) == threads:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    else:
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class AsyncLLMClient:
    """The one place that speaks vLLM's EngineClient protocol."""

    def __init__(self, engine: Any, front: Front) -> None:  # noqa: ANN401 - vllm.engine.protocol.EngineClient
        config = engine.model_config
        self._engine = engine
        self._front = front
        self._numbers = itertools.count()
        self._images = Images.of(config.hf_config, keeps=bool(engine.vllm_config.cache_config.enable_prefix_caching))
        self._pixel_dtype = config.dtype
        self.runtime = Runtime("vllm", str(vllm(".platforms").current_platform.device_type), str(config.dtype))

    @property
    def context(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def submit(self, prompt: Any, sampling: Sampling, *, in_steps: bool) -> AsyncGenerator[Step]:  # noqa: ANN401
        faults = vllm(".v1.engine.exceptions")
        name = f"sightline-{next(self._numbers)}"
        outputs = self._engine.generate(self._input(prompt), self._sampling(sampling, in_steps=in_steps), name)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    (made,) = output.outputs
                    if made.finish_reason not in (None, "stop", "length"):
                        raise Unavailable("The engine gave this answer up.", code="aborted", retry_after=1)
                    yield Step(tuple(made.token_ids), made.finish_reason)
        except faults.EngineDeadError as error:
            raise EngineDied("The engine that makes the answers ended while it made this one.") from error
        except faults.EngineGenerateError as error:
            raise RuntimeError("generation failed") from error

    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    async def sleep(self) -> None:
        await self._engine.sleep(1)

    async def wake(self) -> None:
        await self._engine.wake_up()

    def shut_down(self) -> None:
        self._engine.shutdown(timeout=STOP_SECONDS)

    def _sampling(self, sampling: Sampling, *, in_steps: bool) -> Any:  # noqa: ANN401
        named = vllm(".sampling_params")
        kinds = named.RequestOutputKind
        is_greedy = sampling.temperature < MIN_TEMPERATURE
        return named.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=0.0 if is_greedy else sampling.temperature,
            top_p=1.0 if is_greedy else sampling.top_p,
            top_k=0,
            seed=None if is_greedy else sampling.seed,
            repetition_penalty=self._front.repetition_penalty,
            # Exactly the tokens that end an answer of `hf`; vLLM would add those of the generation configuration.
            ignore_eos=True,
            stop_token_ids=sorted(self._front.stops),
            detokenize=False,
            output_kind=kinds.DELTA if in_steps else kinds.FINAL_ONLY,
        )

    def _input(self, prompt: Any) -> Any:  # noqa: ANN401 - a vLLM EngineInput
        inputs = vllm(".inputs")
        ids = cast("list[int]", prompt.input_ids.tolist())
        pixels = getattr(prompt, "pixel_values", None)
        if pixels is None:
            return inputs.tokens_input(ids)
        assert self._images is not None  # noqa: S101 - a model that makes pixels has a vision tower
        return inputs.mm_input(ids, *self._images.inputs(ids, pixels.to(self._pixel_dtype), prompt.image_grid_thw))


@dataclass(frozen=True, slots=True)
class Images:
    """How a checkpoint's images are handed to vLLM.

    token       what stands for an image in a prompt, as often as it has tokens
    merged      patches that become one token
    grid_name   what vLLM's model calls the sizes of images, in patches
    grid_begin  0: time, height, width; 1: height, width
    keeps       images that were seen before need not be encoded again
    """

    token: int
    merged: int
    grid_name: str
    grid_begin: int
    keeps: bool

    @classmethod
    def of(cls, config: Any, *, keeps: bool) -> "Images | None":  # noqa: ANN401 - a PretrainedConfig
        """None for a model that reads text only."""
        vision = getattr(config, "vision_config", None)
        if vision is None:
            return None
        if config.model_type == "kimi_vl":
            height, width = vision.merge_kernel_size
            return cls(int(config.media_placeholder_token_id), int(height * width), "image_grid_hws", 1, keeps)
        return cls(int(config.image_token_id), int(vision.spatial_merge_size) ** 2, "image_grid_thw", 0, keeps)

    def inputs(self, ids: Sequence[int], pixels: Any, grids: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:  # noqa: ANN401
        """Tensors, names and places of the images of one prompt.

        pixels  (P, …) patches of all images, one after the other; grids (images, 3) in time, height, width
        """
        named = vllm(".multimodal.inputs")
        sizes = grids.prod(-1)
        tensors = {"pixel_values": pixels, self.grid_name: grids[:, self.grid_begin :]}
        fields = {
            "pixel_values": named.MultiModalFieldConfig.flat_from_sizes("image", sizes),
            self.grid_name: named.MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        items = named.MultiModalKwargsItems.from_hf_inputs(tensors, fields)
        counts = [int(size) // self.merged for size in sizes]
        parts = pixels.split([int(size) for size in sizes])
        names = [self._name(part, grid.tolist()) for part, grid in zip(parts, grids, strict=True)]
        places = [named.PlaceholderRange(offset=at, length=count) for at, count in self._places(ids, counts)]
        return items, {"image": names}, {"image": places}

    def _places(self, ids: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = 0
        for count in counts:
            at = ids.index(self.token, at)
            found.append((at, count))
            at += count
        return found

    def _name(self, pixels: Any, grid: Sequence[int]) -> str:  # noqa: ANN401
        """Of the content where it may be met again, else never the same: vLLM keeps what it encoded by this name."""
        if not self.keeps:
            return uuid.uuid4().hex
        import torch

        data = pixels.contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr(grid).encode() + data).hexdigest()
