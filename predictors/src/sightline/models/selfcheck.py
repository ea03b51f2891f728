"""What a model must show before its server is ready: a replica that would answer wrongly ends with a reason instead."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sightline import golden
from sightline.fit import load_for
from sightline.golden import Golden
from sightline.memory import FLOATS, MIB, Anatomy, Profile, Scheme, estimate, shown
from sightline.models.anatomy import anatomy_of
from sightline.models.loading import LoadFailed, is_elsewhere
from sightline.settings import DescribeSettings, EmbedSettings, EngineSettings, GenerateSettings
from sightline.wire import Sampling

log = logging.getLogger("sightline.models")

Model = TypeVar("Model")

GOLDEN_TOKENS = 8
SLACK = 1.15
"""Weights may take so much more than their arithmetic: buffers, a module that a loader kept in a wider type."""
_THREADS_OF_OTHERS = ("asyncio_", "decode", "preprocess", "AnyIO")


def checked(build: Callable[[Any], Model], settings: EngineSettings) -> Model:
    """A loaded model that passed all checks. Slow; on the engine's thread. Raises LoadFailed with its reason."""
    if settings.self_checks == "off":
        return build(settings)
    try:
        if not is_elsewhere(settings):
            check_memory(settings)
        with refusing_network():
            model = build(settings)
            if is_elsewhere(settings):  # there are no weights here to be looked at
                return model
            check_types(model, settings)
            made = tried(model)
        check_golden(made, settings)
        if settings.profile_memory == "on" or (settings.profile_memory == "auto" and _is_on_gpu(model)):
            profile_largest(model, settings)
    except LoadFailed as fault:
        log.critical("self-check failed model=%s reason=%s: %s", settings.model, fault.reason, fault)
        raise
    return model


# --- before loading --------------------------------------------------------------------------------------------------


def check_memory(settings: EngineSettings, room: Profile | None = None) -> None:
    """Refuse weights that the device, and main memory where a loader may put some there, cannot hold.

    room  default: what is free now. A model whose configuration is not at hand is not judged.
    Raises LoadFailed (memory_too_small); logs a warning when only fewer sequences than `max_batch` fit.
    """
    anatomy = _anatomy(settings)
    if anatomy is None:
        return
    here = room or _room(settings)
    scheme, dtype = _scheme(anatomy, settings)
    made = estimate(anatomy, scheme, load_for(anatomy, settings=settings), here, dtype)
    spill = _main_memory() if here.device == "cuda" and room is None else 0
    if made.weights + made.overhead > here.memory + spill:
        raise LoadFailed(
            f"{settings.model} in {scheme} takes {shown(made.weights)} and {shown(made.overhead)} beside; "
            f"{here.device} has {shown(here.memory)}",
            reason="memory_too_small",
        )
    if made.fits:
        log.info("memory model=%s needs=%s of=%s", settings.model, shown(made.total), shown(here.memory))
    else:
        log.warning(
            "memory model=%s: max_batch %d may need %s of %s; %d at once fit (sightline fit says more)",
            settings.model,
            made.load.concurrency,
            shown(made.total),
            shown(here.memory),
            made.largest,
        )


def _anatomy(settings: EngineSettings) -> Anatomy | None:
    try:
        return anatomy_of(settings.model)
    except LoadFailed:
        return None  # on the hub, an adapter, or no model at all: loading tells


def _scheme(anatomy: Anatomy, settings: EngineSettings) -> tuple[Scheme, str]:
    """How settings say that the weights are held, and the floating type of the rest."""
    stored = anatomy.stored_dtype if anatomy.stored_dtype in FLOATS else "bfloat16"
    dtype = stored if settings.dtype == "auto" else settings.dtype
    floating: Scheme = "float32" if dtype == "float32" else "float16" if dtype == "float16" else "bfloat16"
    if isinstance(settings, DescribeSettings) and settings.load_8bit:
        return "8bit", dtype
    if isinstance(settings, GenerateSettings) and settings.quantization in ("8bit", "4bit"):
        return settings.quantization, dtype
    if isinstance(settings, GenerateSettings) and settings.quantization == "auto" and not anatomy.is_demo:
        return "8bit", dtype
    if anatomy.stored_scheme == "mxfp4":
        return "mxfp4", dtype
    return floating, dtype


def _room(settings: EngineSettings) -> Profile:
    if settings.device != "cpu" and torch.cuda.is_available():
        return Profile(sum(torch.cuda.mem_get_info(at)[0] for at in range(torch.cuda.device_count())), "cuda")
    return Profile(_main_memory(), "cpu")


def _main_memory() -> int:
    """Bytes that this process may still take: of the host, or of its cgroup when that has less."""
    host = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or `max`
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return min(host, limit - used)
    return host


# --- while loading ---------------------------------------------------------------------------------------------------


class _Watch:
    """Network calls of the loading thread, and of threads begun since, that are refused and remembered."""

    def __init__(self) -> None:
        self.touched: list[str] = []
        self._loading = threading.get_ident()
        self._before = {thread.ident for thread in threading.enumerate()} - {self._loading}

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        thread = threading.current_thread()
        if thread.ident in self._before or thread.name.startswith(_THREADS_OF_OTHERS):
            return
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        if not isinstance(host, str) or host.startswith(("127.", "/")) or host in ("localhost", "::1", ""):
            return
        self.touched.append(host)
        raise OSError("no network in offline mode")


_watches: list[_Watch] = []
_has_hook = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watches and event in ("socket.connect", "socket.getaddrinfo"):
        for watch in list(_watches):
            watch.hear(event, arguments)


@contextlib.contextmanager
def refusing_network(*, is_offline: bool | None = None) -> Generator[None]:
    """In offline mode (HF_HUB_OFFLINE), keep what loads off the network.

    Raises LoadFailed (network_touched) at the end when it tried, even where a library hid that.
    """
    from huggingface_hub import constants

    if not (constants.HF_HUB_OFFLINE if is_offline is None else is_offline):
        yield
        return
    global _has_hook  # noqa: PLW0603 - an audit hook can never be taken away: there is one
    if not _has_hook:
        sys.addaudithook(_hook)
        _has_hook = True
    watch = _Watch()
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
        if watch.touched:
            raise LoadFailed(
                f"loading asked for {', '.join(sorted(set(watch.touched)))} in offline mode", reason="network_touched"
            )


# --- after loading ---------------------------------------------------------------------------------------------------


def check_types(model: Any, settings: EngineSettings) -> None:  # noqa: ANN401 - any of ours
    """Refuse weights of another floating type than configured, or larger than their scheme makes them.

    Raises LoadFailed (dtype_differs, weights_dequantised).
    """
    module = model._model
    tensors = [*module.parameters(), *module.buffers()]
    if settings.dtype != "auto":  # of matrices, as norms may be wider, and buffers hold scales
        wanted = getattr(torch, settings.dtype)
        matrices = [weight for weight in module.parameters() if weight.is_floating_point() and weight.ndim > 1]
        others = [weight for weight in matrices if weight.dtype != wanted]
        if sum(weight.numel() for weight in others) > 0.01 * sum(weight.numel() for weight in matrices):
            found = ", ".join(sorted({str(weight.dtype) for weight in others}))
            raise LoadFailed(f"{settings.model} was asked for in {wanted} and is in {found}", reason="dtype_differs")
    anatomy = _anatomy(settings)
    if anatomy is None or isinstance(settings, EmbedSettings):
        return
    scheme, dtype = _scheme(anatomy, settings)
    expected, held = anatomy.weights(scheme, dtype), sum(tensor.nbytes for tensor in tensors)
    if held > SLACK * expected + MIB:
        raise LoadFailed(
            f"{settings.model} should take {shown(expected)} in {scheme} and takes {shown(held)}: "
            "its weights were dequantised, or left as they were",
            reason="weights_dequantised",
        )


def tried(model: Any) -> Golden:  # noqa: ANN401 - any of ours
    """Show a model the golden picture, and see that it looks at where things are.

    Raises LoadFailed (positions_dropped, output_not_finite).
    """
    item = model.trial(golden.picture())
    with _positions(model) as seen:
        if hasattr(model, "encode"):
            (vectors,) = model.encode([item])
            if not isinstance(vectors, np.ndarray) or not np.isfinite(vectors).all():
                raise LoadFailed("the model returns numbers that are not finite", reason="output_not_finite")
            numbers = tuple(round(float(number), 4) for number in [*vectors[0, :8], *vectors[-1, :8]])
            made = Golden(model.runtime.dtype, numbers=numbers)
        else:
            (answer,) = model.generate([item], Sampling(max_tokens=GOLDEN_TOKENS), _nobody_leaves)
            made = Golden(model.runtime.dtype, tokens=answer.token_ids)
    if seen and not any(_is_spatial(positions) for positions in seen):
        raise LoadFailed(
            "image tokens stand in a row, not in rows and columns: mm_token_type_ids were dropped",
            reason="positions_dropped",
        )
    return made


@contextlib.contextmanager
def _positions(model: Any) -> Generator[list[torch.Tensor]]:  # noqa: ANN401
    """The position ids that a text model with positions in three dimensions is given meanwhile; else none."""
    seen: list[torch.Tensor] = []
    text = next((module for name, module in model._model.named_modules() if _is_spatial_text(name, module)), None)
    if text is None:
        yield seen
        return

    def remember(module: Any, arguments: Any, named: dict[str, Any]) -> None:  # noqa: ANN401
        if named.get("position_ids") is not None:
            seen.append(named["position_ids"].detach())
        elif not seen:
            seen.append(torch.zeros(1))  # none at all: a row

    handle = text.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _is_spatial_text(name: str, module: Any) -> bool:  # noqa: ANN401
    rope = getattr(getattr(module, "config", None), "rope_parameters", None)
    return name.endswith("language_model") and isinstance(rope, dict) and "mrope_section" in rope


def _is_spatial(positions: torch.Tensor) -> bool:
    """Whether rows and columns differ somewhere: (3 or 4, B, T), time, height and width last."""
    return positions.ndim == 3 and bool((positions[-1] != positions[-2]).any())


def _nobody_leaves(row: int) -> bool:
    return False


def check_golden(made: Golden, settings: EngineSettings) -> None:
    """Compare with the golden file that settings name, or that lies beside the weights.

    Raises LoadFailed (golden_differs, golden_unreadable).
    """
    path = settings.golden_file or Path(settings.model) / golden.FILE_NAME
    if settings.golden_file is None and not path.is_file():
        return
    try:
        wanted = Golden.read(path)
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{path} cannot be read: {error}", reason="golden_unreadable") from error
    if wanted.dtype != made.dtype:
        log.info("golden file %s is of %s, the model in %s: not compared", path, wanted.dtype, made.dtype)
    elif wanted.differs(made):
        raise LoadFailed(
            f"of the golden picture {settings.model} makes {made.tokens or made.numbers}, "
            f"not {wanted.tokens or wanted.numbers} as {path} says",
            reason="golden_differs",
        )


# --- the largest image -----------------------------------------------------------------------------------------------


def profile_largest(model: Any, settings: EngineSettings) -> int:  # noqa: ANN401
    """Run the largest image that a request may bring; log and return the peak in bytes, -1 when it does not fit.

    On a GPU the peak is the allocator's; on a CPU it is the process's resident memory (Linux).
    """
    anatomy = _anatomy(settings)
    pixels = min(settings.max_pixels, (anatomy.max_pixels if anatomy else None) or settings.max_pixels)
    side = max(settings.min_side, int(pixels**0.5))
    is_on_gpu = _is_on_gpu(model)
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    try:
        item = model.trial(golden.picture(side, side))
        if hasattr(model, "encode"):
            model.encode([item])
        else:
            model.generate([item], Sampling(max_tokens=1), _nobody_leaves)
    except (torch.OutOfMemoryError, MemoryError):
        log.warning("the largest image, %d x %d, does not fit: it will be seen at half its pixels", side, side)
        return -1
    peak = torch.cuda.max_memory_allocated() if is_on_gpu else _resident_peak()
    log.info("memory peak=%s with the largest image, %d x %d", shown(peak), side, side)
    return peak


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _is_on_gpu(model: Any) -> bool:  # noqa: ANN401
    return str(model.runtime.device).startswith("cuda")
