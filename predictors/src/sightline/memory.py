"""How much memory a model takes, by arithmetic on its shape: for `sightline fit`, the chart and a server's start."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

KIB, MIB, GIB = 1024, 1024**2, 1024**3

Scheme = Literal["float32", "bfloat16", "float16", "8bit", "4bit", "mxfp4"]
"""How weights are held. The last three say it of their large matrices only; the rest is in 16 bits."""

FLOATS: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BLOCK = 64
"""Weights that share one float32 scale in 4 bits."""
MXFP4_BLOCK = 32
"""Weights that share one 8-bit exponent in MXFP4 (OCP Microscaling Formats, version 1.0)."""

CUDA_OVERHEAD = int(1.0 * GIB)
"""What a GPU's driver context, cuBLAS' workspaces and the allocator's rounding take. Assumed: no GPU was at hand."""
CPU_OVERHEAD = int(0.9 * GIB)
"""What a server takes in main memory beside its model: servers of the small models had 0.57 to 0.86 GiB resident."""

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(K|M|G|T)?(i)?B?\s*", re.IGNORECASE)


def bytes_of(text: str) -> int:
    """`20GiB`, `500 MB` or `1000` in bytes. Raises ValueError."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory, such as 20GiB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


@dataclass(frozen=True, slots=True)
class Profile:
    """One device of a kind of cluster, as the chart's profiles name them.

    memory   bytes that a process can have there: less than the card is sold with, see docs/fit.md
    device   cpu or cuda
    devices  of a node; a model has one of them
    """

    memory: int
    device: Literal["cpu", "cuda"]
    devices: int = 1


PROFILES: Mapping[str, Profile] = {
    "cpu": Profile(2 * GIB, "cpu"),
    "gpu-1x24": Profile(22 * GIB, "cuda"),
    "gpu-1x48": Profile(44 * GIB, "cuda"),
    "gpu-1x80": Profile(79 * GIB, "cuda"),
    "gpu-2x80": Profile(79 * GIB, "cuda", 2),
}


@dataclass(frozen=True, slots=True)
class Matrices:
    """Parameters that are held in one way: how many, and in how many rows."""

    values: int = 0
    rows: int = 0

    def __add__(self, other: "Matrices") -> "Matrices":
        return Matrices(self.values + other.values, self.rows + other.rows)


def matrix_bytes(matrices: Matrices, scheme: Scheme) -> int:
    """Bytes of matrices, scales included: 8 bits have one float32 scale a row, 4 bits one for 64 values."""
    if scheme in FLOATS:
        return matrices.values * FLOATS[scheme]
    if scheme == "8bit":
        return matrices.values + 4 * matrices.rows
    if scheme == "4bit":
        return matrices.values // 2 + 4 * (matrices.values // NF4_BLOCK)
    return matrices.values // 2 + matrices.values // MXFP4_BLOCK


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower.

    hidden, intermediate  widths; `matrices` counts those of the MLP that are as wide as `intermediate` (3 when gated)
    patch_values          numbers of one patch
    patch_side            its pixels
    merge                 patches of a side that become one token of the text model
    copies                of the state that attention has alive at once
    is_eager              attention keeps its scores: memory grows with the square of the patches
    """

    hidden: int
    intermediate: int
    heads: int
    wide: int
    patch_values: int
    patch_side: int
    merge: int
    copies: int = 11
    is_eager: bool = False


@dataclass(frozen=True, slots=True)
class Decoder:
    """A text model.

    cache          numbers that a full-attention layer keeps of a token, summed over the layers
    window_cache   the same of the layers that keep only `window` tokens
    cross_tokens   tokens of an encoder of which each sequence keeps `cross_cache` numbers
    queries        heads x their width: what attention is as wide as, alive `copies` times at once
    wide           of each token, numbers alive at once inside the MLP, beside the hidden state
    """

    layers: int
    hidden: int
    heads: int
    queries: int
    wide: int
    vocabulary: int
    max_length: int
    cache: int
    window_cache: int = 0
    window: int = 0
    cross_cache: int = 0
    cross_tokens: int = 0
    copies: int = 5
    is_eager: bool = False


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The shape of a model, as its configuration gives it.

    linears      what 8 and 4 bits quantise
    experts      routed experts; all but `float*` quantise them
    rest         parameters that keep the floating type
    exact        numbers that are float32 always
    schemes      in which a predictor here can hold it, the default first
    max_pixels   of one image, as its processor bounds them; None: text only
    stored       the floating type of its file, and how it is quantised there, if it is
    """

    name: str
    kind: str
    parameters: int
    linears: Matrices
    experts: Matrices
    rest: int
    exact: int
    decoder: Decoder | None
    tower: Tower | None
    schemes: tuple[Scheme, ...]
    max_pixels: int | None = None
    stored_dtype: str = "bfloat16"
    stored_scheme: str | None = None
    is_demo: bool = False

    def weights(self, scheme: Scheme, dtype: str = "bfloat16") -> int:
        """Bytes of the weights. `dtype` is the type of what `scheme` does not quantise."""
        rest = FLOATS[scheme if scheme in FLOATS else dtype]
        linears = dtype if scheme == "mxfp4" else scheme  # of gpt-oss only the experts are in MXFP4
        held = matrix_bytes(self.experts, scheme) + _floats_or(self.linears, linears)
        return held + self.rest * rest + self.exact * 4

    def image_tokens(self, pixels: int) -> int:
        """Tokens that the text model sees of an image of so many pixels, or fewer for the last incomplete ones."""
        if self.tower is None:
            return 0
        return max(1, pixels // (self.tower.patch_side * self.tower.merge) ** 2)


def _floats_or(matrices: Matrices, scheme: str) -> int:
    return matrices.values * FLOATS[scheme] if scheme in FLOATS else matrix_bytes(matrices, scheme)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Load:
    """What a server is to hold at once.

    concurrency     sequences in one batch: their images are encoded and their prompts read together
    context         tokens of one sequence at its end: prompt, image and answer
    prompt          of them the prompt with its images
    pixels          of one usual image
    largest_pixels  of the largest one that a request may ask for; it comes alone
    """

    concurrency: int
    context: int
    prompt: int
    pixels: int = 0
    largest_pixels: int = 0


MAX_PIXELS = 40_000_000
"""Of a decoded image, by the servers' default limit."""
TEXT_TOKENS = 512
"""Of a prompt beside its images, when nothing is said."""


def load_of(
    anatomy: Anatomy,
    *,
    concurrency: int,
    new_tokens: int,
    width: int | None = None,
    text_tokens: int = TEXT_TOKENS,
    images: int = 1,
    batch_tokens: int | None = None,
) -> Load:
    """The load of a server with these settings.

    width         images are resized to it, and to twice it in height; None: the processor's own bound is the only one
    batch_tokens  a batch's bound beside `concurrency`, where there is one
    """
    largest = min(anatomy.max_pixels or 0, MAX_PIXELS)
    usual = min(largest, 2 * width * width) if width else largest
    seen = images * anatomy.image_tokens(usual) if anatomy.tower and anatomy.kind != "blip" else 0
    longest = anatomy.decoder.max_length if anatomy.decoder else seen
    prompt = min(longest, seen + min(text_tokens, longest // 2))
    if batch_tokens is not None:
        concurrency = max(1, min(concurrency, batch_tokens // max(1, prompt)))
    context = min(longest, prompt + new_tokens)
    return Load(concurrency, context, prompt, images * usual, max(images * usual, largest))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory in bytes of a model under a load, and whether `limit` suffices.

    cache_per_token   of one sequence, growing; `cache` is of all sequences at their full context
    activations       the larger of: all prompts of a batch read together, the largest image alone
    overhead          see CUDA_OVERHEAD, CPU_OVERHEAD
    largest           sequences at once for which the limit would suffice; 0: not even one
    """

    scheme: Scheme
    dtype: str
    weights: int
    cache_per_token: int
    cache: int
    activations: int
    overhead: int
    limit: int
    load: Load
    largest: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def estimate(anatomy: Anatomy, scheme: Scheme, load: Load, profile: Profile, dtype: str = "bfloat16") -> Estimate:
    """What a model takes on a device, and the largest concurrency that fits there (up to 4,096)."""
    floats = scheme if scheme in FLOATS else dtype
    made = _estimated(anatomy, scheme, load, profile, floats)
    low, high = 0, 4097
    while high - low > 1:
        middle = (low + high) // 2
        fits = _estimated(anatomy, scheme, replace(load, concurrency=middle), profile, floats).fits
        low, high = (middle, high) if fits else (low, middle)
    return replace(made, largest=low)


def _estimated(anatomy: Anatomy, scheme: Scheme, load: Load, profile: Profile, dtype: str) -> Estimate:
    size = FLOATS[dtype]
    decoder = anatomy.decoder
    return Estimate(
        scheme=scheme,
        dtype=dtype,
        weights=anatomy.weights(scheme, dtype),
        cache_per_token=0 if decoder is None else decoder.cache * size,
        cache=0 if decoder is None else load.concurrency * cache_bytes(decoder, load.context, size),
        activations=activation_bytes(anatomy, load, size),
        overhead=CUDA_OVERHEAD if profile.device == "cuda" else CPU_OVERHEAD,
        limit=profile.memory,
        load=load,
    )


def cache_bytes(decoder: Decoder, length: int, size: int) -> int:
    """Keys and values of one sequence of `length` tokens, of `size` bytes each.

    A growing cache is copied layer by layer at each token, so that the largest layer is there twice.
    """
    growing = decoder.cache * length + decoder.window_cache * min(length, decoder.window)
    fixed = decoder.cross_cache * decoder.cross_tokens
    return size * (growing + growing // max(1, decoder.layers) + fixed)


def activation_bytes(anatomy: Anatomy, load: Load, size: int) -> int:
    """The most that is alive beside weights and cache: of a whole batch's prompts, or of one largest image alone."""
    together = _pass_bytes(anatomy, load.concurrency, load.prompt, load.concurrency * load.pixels, size)
    if load.largest_pixels <= load.pixels:
        return together
    more = anatomy.image_tokens(load.largest_pixels) - anatomy.image_tokens(load.pixels)
    return max(together, _pass_bytes(anatomy, 1, load.prompt + more, load.largest_pixels, size))


def _pass_bytes(anatomy: Anatomy, rows: int, length: int, pixels: int, size: int) -> int:
    """Images are encoded first, then all prompts are read: the larger of the two, with the images' result in both."""
    tower, decoder = anatomy.tower, anatomy.decoder
    patches = 0 if tower is None else pixels // tower.patch_side**2
    inputs = 0 if tower is None else patches * tower.patch_values * (4 + (size if size < 4 else 0))
    encoding = inputs + (0 if tower is None else tower_bytes(tower, patches, rows, size))
    if decoder is None:
        return encoding
    return max(encoding, inputs + decoder_bytes(decoder, rows, length, size))


def tower_bytes(tower: Tower, patches: int, images: int, size: int) -> int:
    """What is alive at once in a layer.

    In attention `copies` numbers for each of the state, some in float32 (fitted to what was measured: the state, its
    norm, queries, keys and values, turned and cut into windows); in the MLP the state twice and what is `intermediate`
    wide. Eager attention keeps the scores of each image's patches.
    """
    attention = patches * tower.hidden * (tower.copies * size + 10)
    mlp = patches * (2 * tower.hidden + tower.wide * tower.intermediate) * size
    scores = 0
    if tower.is_eager and images:
        scores = tower.heads * (patches // images + 1) ** 2 * images * 2 * size
    return max(attention + scores, mlp)


def decoder_bytes(decoder: Decoder, rows: int, length: int, size: int) -> int:
    """Alive at once while `rows` prompts of `length` tokens are read: a layer, or the scores of the next token."""
    tokens = rows * length
    state = 2 * decoder.hidden * size + 4 * decoder.hidden
    attention = tokens * (state + decoder.copies * decoder.queries * size)
    scores = rows * decoder.heads * length**2 * (2 * size + 4) if decoder.is_eager else 0
    masks = 1 + (decoder.window > 0)
    mask = masks * rows * length**2 * (size if decoder.is_eager else 1)
    mlp = tokens * (state + decoder.wide * size)
    last = rows * decoder.vocabulary * (size + 8)
    return max(attention + scores, mlp, last) + mask


def shown(amount: int) -> str:
    """Bytes for people: `15.4 GiB`, `812 MiB`, `56.0 KiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if amount >= unit:
            return f"{amount / unit:.1f} {name}" if amount < 100 * unit else f"{amount / unit:.0f} {name}"
    return f"{amount} B"


def as_json(made: Estimate) -> dict[str, object]:
    """An estimate for programs; bytes throughout."""
    return {
        "scheme": made.scheme,
        "dtype": made.dtype,
        "weights": made.weights,
        "cache_per_token": made.cache_per_token,
        "cache": made.cache,
        "activations": made.activations,
        "overhead": made.overhead,
        "total": made.total,
        "limit": made.limit,
        "fits": made.fits,
        "concurrency": made.load.concurrency,
        "context": made.load.context,
        "largest_concurrency": made.largest,
    }


def table(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Estimates of several models or schemes as aligned text."""
    head = ("model", "weights in", "weights", "cache/token", "cache", "activations", "overhead", "total", "limit", "")
    body = [
        (
            name,
            made.scheme,
            *(
                shown(amount)
                for amount in (
                    made.weights,
                    made.cache_per_token,
                    made.cache,
                    made.activations,
                    made.overhead,
                    made.total,
                    made.limit,
                )
            ),
            f"fits; at most {made.largest} at once" if made.fits else _short(made),
        )
        for name, made in rows
    ]
    widths = [max(len(line[at]) for line in [head, *body]) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in (0, 1, len(head) - 1) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *body]
    )


def _short(made: Estimate) -> str:
    if made.largest:
        return f"does not fit; {made.largest} at once would"
    return "does not fit"
