"""Kimi-VL's text model in 8 or 4 bits: routed experts too, computed on the device that holds them.

bitsandbytes quantises modules of type Linear. transformers holds all experts of a layer, 88 % of this model, in one
three-dimensional parameter, which bitsandbytes leaves as it is without a word (bitsandbytes#1849). Here every expert is
its own row-wise int8 (or nf4) matrix, multiplied by bitsandbytes' kernels, and where experts do not fit on the GPU the
activations go to them instead of the weights coming over.

Left in the checkpoint's type: the vision tower and projector (2.6 % of the weights), embeddings, `lm_head`, routers and
norms, and `kv_b_proj`, which reads every cached token at every step and would quantise the cache again each time.
"""

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.models.kimi_vl.keys import Part, Piece
from sightline.models.loading import LoadFailed

Scheme = Literal["8bit", "4bit", "none"]

OUTLIER = 6.0
"""Activations at least this large are multiplied in floating point (LLM.int8(), arXiv 2208.07339)."""
NF4_BLOCK = 64
"""Weights that share one nf4 scale."""

_LINEAR = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)|mlp\.(shared_experts\.)?(gate|up|down)_proj)"
)
_EXPERTS = re.compile(r"model\.language_model\.layers\.(\d+)\.mlp\.experts")


class Matrices(Protocol):
    """`count` matrices of one shape (rows, columns), each of which multiplies activations."""

    weight: Tensor

    def put(self, at: int, rows: slice, values: Tensor) -> None:
        """Take the rows of matrix `at`, on any device and in any floating type."""
        ...

    def multiply(self, x: Tensor, at: int) -> Tensor:
        """Activations (M, columns) times the transpose of matrix `at`: (M, rows), in their type."""
        ...


class Int8Matrices(nn.Module):
    """int8 values and one scale a row.

    An activation row's result does not depend on the rows beside it: outliers are taken out one by one, where
    bitsandbytes takes their whole column out of every row.
    """

    weight: Tensor
    absmax: Tensor

    def __init__(self, count: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty((count, rows, columns), dtype=torch.int8, device=device))
        self.register_buffer("absmax", torch.empty((count, rows), dtype=torch.float32, device=device))

    def put(self, at: int, rows: slice, values: Tensor) -> None:
        values = values.to(self.weight.device, torch.float32)
        absmax = values.abs().amax(dim=1)
        self.absmax[at, rows] = absmax
        self.weight[at, rows] = (values * (127 / absmax.clamp(min=1e-30))[:, None]).round().to(torch.int8)

    def multiply(self, x: Tensor, at: int) -> Tensor:
        weight, absmax = self.weight[at], self.absmax[at]
        outliers = x.abs() >= OUTLIER
        columns = outliers.any(dim=0).nonzero()[:, 0]
        rest = x.masked_fill(outliers, 0).float()
        largest = rest.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        quantised = (rest * (127 / largest)).round().to(torch.int8)
        product = torch.ops.bitsandbytes.int8_linear_matmul(quantised, weight).float()
        product = product * (largest / 127) * (absmax / 127)
        if len(columns):
            large = (x * outliers)[:, columns].float()
            product += large @ (weight[:, columns].float() * (absmax / 127)[:, None]).T
        return product.to(x.dtype)


class Nf4Matrices(nn.Module):
    """4-bit normal floats, two a byte, and one scale for 64 of them."""

    weight: Tensor
    absmax: Tensor

    def __init__(self, count: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if columns % NF4_BLOCK:
            raise LoadFailed(f"4bit needs matrices whose width is a multiple of {NF4_BLOCK}; one is {columns} wide")
        self.shape = torch.Size((rows, columns))
        packed, blocks = (count, rows, columns // 2), (count, rows, columns // NF4_BLOCK)
        self.register_buffer("weight", torch.empty(packed, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.float32, device=device))

    def put(self, at: int, rows: slice, values: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        values = values.to(self.weight.device).contiguous()
        packed, state = quantize_4bit(values, blocksize=NF4_BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        self.weight[at, rows] = packed.view(len(values), -1)
        self.absmax[at, rows] = state.absmax.view(len(values), -1)

    def multiply(self, x: Tensor, at: int) -> Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit
        from bitsandbytes.functional import QuantState, get_4bit_type

        state = QuantState(
            absmax=self.absmax[at].flatten(),
            shape=self.shape,
            code=get_4bit_type("nf4", device=x.device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        return matmul_4bit(x, self.weight[at].view(-1, 1).t(), state)


class FloatMatrices(nn.Module):
    """Not quantised; for experts that live elsewhere than the rest of the model."""

    weight: Tensor

    def __init__(self, count: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty((count, rows, columns), dtype=dtype, device=device))

    def put(self, at: int, rows: slice, values: Tensor) -> None:
        self.weight[at, rows] = values.to(self.weight.device, self.weight.dtype)

    def multiply(self, x: Tensor, at: int) -> Tensor:
        return F.linear(x, self.weight[at])


KINDS = {"8bit": Int8Matrices, "4bit": Nf4Matrices, "none": FloatMatrices}


class QuantizedLinear(nn.Module):
    """A Linear without bias."""

    def __init__(self, matrix: Matrices) -> None:
        super().__init__()
        self.matrix = matrix

    def take(self, piece: Piece) -> None:
        """Quantise the weight; called by `checkpoint.fill`."""
        self.matrix.put(0, slice(None), piece.tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.multiply(x.flatten(0, -2), 0).unflatten(0, x.shape[:-1])


class Experts(nn.Module):
    """The routed experts of one layer, on one device, which need not be the one the activations come from."""

    def __init__(self, gate_up: Matrices, down: Matrices, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.act_fn = act_fn

    @property
    def device(self) -> torch.device:
        return self.down.weight.device

    def take(self, piece: Piece) -> None:
        """Quantise one expert's part of `gate_up_proj` or `down_proj`; called by `checkpoint.fill`."""
        matrices = self.gate_up if piece.name.endswith("gate_up_proj") else self.down
        part = cast("Part", piece.part)
        matrices.put(part.expert, part.rows, piece.tensor)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), the experts of each token and their weights (T, k) → (T, D)."""
        home = hidden_states.device
        x, chosen, weights = (tensor.to(self.device) for tensor in (hidden_states, top_k_index, top_k_weights))
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = torch.where(chosen == expert)
            gate, up = self.gate_up.multiply(x[tokens], expert).chunk(2, dim=-1)
            result = self.down.multiply(self.act_fn(gate) * up, expert)
            output.index_add_(0, tokens, (result * weights[tokens, place, None]).to(output.dtype))
        return output.to(home)


@dataclass(frozen=True, slots=True)
class Room:
    """A device and the bytes that weights may take there; None for no bound."""

    device: torch.device
    limit: int | None = None


def prepare(model: Any, scheme: Scheme, dtype: torch.dtype, rooms: Sequence[Room]) -> None:  # noqa: ANN401
    """Replace what is quantised or lives elsewhere by modules that `checkpoint.fill` can fill.

    model   with its weights on the meta device
    rooms   the first holds all but the experts, and experts as far as there is room; the next ones hold the others

    Raises LoadFailed when the rooms are too small.
    """
    if scheme != "none":
        _require_bitsandbytes()
    rooms_of_layers = _assign(model, scheme, dtype, rooms)
    kind = KINDS[scheme]
    for name, module in list(model.named_modules()):
        if match := _EXPERTS.fullmatch(name):
            room = rooms_of_layers[int(match[1])]
            if scheme == "none" and room is rooms[0]:
                continue  # transformers' own are faster
            stacks = (module.gate_up_proj, module.down_proj)
            matrices = (kind(*stack.shape, dtype=dtype, device=room.device) for stack in stacks)
            model.set_submodule(name, Experts(*matrices, act_fn=module.act_fn))
        elif scheme != "none" and _is_quantised_linear(name, module):
            matrix = kind(1, *module.weight.shape, dtype=dtype, device=rooms[0].device)
            model.set_submodule(name, QuantizedLinear(matrix))


def check(model: Any, scheme: Scheme) -> None:  # noqa: ANN401
    """Raise LoadFailed unless every routed expert is held as `scheme` says."""
    wanted = {"8bit": torch.int8, "4bit": torch.uint8}.get(scheme)
    for name, module in model.named_modules():
        if wanted is not None and _EXPERTS.fullmatch(name):
            held = {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.ndim >= 3}
            if wanted not in held:
                raise LoadFailed(
                    f"{name} should be {wanted} and is {', '.join(map(str, held))}", reason="weights_dequantised"
                )


def bytes_per_dtype(model: Any) -> dict[str, int]:  # noqa: ANN401
    """How many bytes of weights, scales included, a model holds in which type; nf4's two a byte count as `nf4`."""
    sizes: Counter[str] = Counter()
    for module in model.modules():
        for tensor in _weights(module):
            is_nf4 = isinstance(module, Nf4Matrices) and tensor.dtype == torch.uint8
            sizes["nf4" if is_nf4 else str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(sizes.most_common())


def _is_quantised_linear(name: str, module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "bias" not in dict(module.named_parameters())
        and _LINEAR.fullmatch(name) is not None
    )


def _assign(model: Any, scheme: Scheme, dtype: torch.dtype, rooms: Sequence[Room]) -> dict[int, Room]:  # noqa: ANN401
    """The room of each layer's experts: the first that still has place for them."""
    experts: dict[int, int] = {}
    rest = 0
    for name, module in model.named_modules():
        match = _EXPERTS.fullmatch(name)
        held = scheme if match or _is_quantised_linear(name, module) else "none"
        size = sum(_size(tensor, held, dtype) for tensor in _weights(module))
        if match:
            experts[int(match[1])] = size
        else:
            rest += size
    free = [float("inf") if room.limit is None else room.limit for room in rooms]
    if rest > free[0]:
        raise LoadFailed(f"{rooms[0].device} may hold {rooms[0].limit} bytes; all but the experts needs {rest}")
    free[0] -= rest
    assigned: dict[int, Room] = {}
    for layer, size in experts.items():
        at = next((at for at, left in enumerate(free) if size <= left), None)
        if at is None:
            raise LoadFailed(f"no device may hold the {size} bytes of the experts of layer {layer}")
        free[at] -= size
        assigned[layer] = rooms[at]
    return assigned


def _weights(module: Any) -> list[Tensor]:  # noqa: ANN401
    """A module's own parameters and buffers, without tables that follow from the configuration."""
    derived = module._non_persistent_buffers_set
    buffers = (tensor for name, tensor in module.named_buffers(recurse=False) if name not in derived)
    return [*module.parameters(recurse=False), *buffers]


def _size(tensor: Tensor, scheme: Scheme, dtype: torch.dtype) -> int:
    values, rows = tensor.numel(), tensor.numel() // tensor.shape[-1]
    if scheme == "8bit":
        return values + 4 * rows
    if scheme == "4bit":
        return values // 2 + 4 * (values // NF4_BLOCK)
    return values * dtype.itemsize


def _require_bitsandbytes() -> None:
    try:
        importlib.import_module("bitsandbytes")  # registers its kernels
    except ImportError as error:
        raise LoadFailed("8bit and 4bit need the extra `bnb`") from error
