"""Our own decoding: rows of many prompts go on together, join and leave between two tokens, each with its own limits.

Dims     n rows that run · B prompts of a prefill · T tokens of its longest · H heads · C columns of the cache · V words
Why      `generate` of transformers runs a batch until its last row ends, chooses tokens for all rows alike and copies
         the whole cache for each token. Here a row's keys stand from column 0 on and stay where they are: a new token's
         are written behind them, and what lies behind a row's own is masked. Nothing of a row depends on its company.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from transformers import Cache

from sightline.engines.base import MIN_TEMPERATURE, Draft, Generated, IsAbandoned, OnToken
from sightline.engines.packing import packs
from sightline.wire import Sampling

PREFILL_TOKENS = 8_192
"""Tokens of one forward over prompts, padding included; a longer prompt goes alone."""

Prompt = TypeVar("Prompt")
Prompt_contra = TypeVar("Prompt_contra", contravariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Prefilled:
    """Prompts that were read.

    logits     (B, V) of each prompt's next token
    layers     keys and values of each layer, (B, H, T, width); past a prompt's end anything
    lengths    tokens of each prompt
    positions  of the next token of each prompt
    others     what else stays with a row, such as the keys of its image: tensors (B, …), one shape for all rows
    """

    logits: torch.Tensor
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    lengths: Sequence[int]
    positions: Sequence[int]
    others: Sequence[torch.Tensor] = ()


class Network(Protocol[Prompt_contra]):
    """What the loop needs of a model."""

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    @property
    def repetition_penalty(self) -> float:
        """Of tokens that the prompt or the answer has already; 1 for none."""
        ...

    def token_ids(self, prompt: Prompt_contra) -> torch.Tensor:
        """(T,) of a prompt."""
        ...

    def see(self, prompts: Sequence[Prompt_contra]) -> Sequence[Any]:
        """What the vision encoder makes of each prompt's images, all in one go."""
        ...

    def prefill(self, prompts: Sequence[Prompt_contra], seen: Sequence[Any]) -> Prefilled:
        """Read prompts, padded on the right."""
        ...

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, slots: "Slots") -> torch.Tensor:
        """One more token for each row: `tokens` (n,) at `positions` (n,) → logits (n, V)."""
        ...

    def most_tokens(self, prompt: Prompt_contra, sampling: Sampling) -> int:
        """New tokens that an answer may have."""
        ...

    def result(self, prompt: Prompt_contra, draft: Draft) -> Generated:
        """An answer with its counts."""
        ...


class Rows:
    """A tensor with one entry for each running row, of which it holds the first n: (rows, …) that grows.

    columns  the dimension that grows with the length of rows, None when there is none
    """

    def __init__(self, like: torch.Tensor, columns: int | None) -> None:
        self._columns = columns
        shape = list(like.shape)
        shape[0] = 0
        if columns is not None:
            shape[columns] = 0
        self.tensor = like.new_zeros(shape)

    def fit(self, rows: int, columns: int = 0) -> None:
        """Make room, doubling, so that growing costs a constant for each token."""
        shape = list(self.tensor.shape)
        if rows > shape[0]:
            shape[0] = max(rows, 2 * shape[0])
        if self._columns is not None and columns > shape[self._columns]:
            shape[self._columns] = max(columns, 2 * shape[self._columns])
        if shape == list(self.tensor.shape):
            return
        grown = self.tensor.new_zeros(shape)  # zeros, since what is masked is still multiplied by nought
        grown[tuple(slice(size) for size in self.tensor.shape)] = self.tensor
        self.tensor = grown

    def put(self, row: int, entries: torch.Tensor) -> None:
        """Write entries into the rows from `row` on; columns behind them become zero: whoever was there is gone."""
        target = self.tensor[row : row + len(entries)]
        if self._columns is None:
            target.copy_(entries)
            return
        width = entries.shape[self._columns]
        target.narrow(self._columns, 0, width).copy_(entries)
        target.narrow(self._columns, width, target.shape[self._columns] - width).zero_()

    def move(self, source: int, target: int) -> None:
        self.tensor[target] = self.tensor[source]


class Slots(Cache):
    """Keys and values of the rows that run; a cache of transformers for one more token of each row at a time.

    lengths  columns that each row fills
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Rows] = []
        self._values: list[Rows] = []
        self._others: list[Rows] = []
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, read: Prefilled) -> None:
        """Rows for prompts that were read, behind those that run."""
        first, count, columns = len(self.lengths), len(read.lengths), max(read.lengths)
        if not self._keys:
            self._keys = [Rows(keys, 2) for keys, _ in read.layers]
            self._values = [Rows(values, 2) for _, values in read.layers]
            self._others = [Rows(other, None) for other in read.others]
        room = max([columns, *self.lengths]) + 1
        for rows, values in zip(
            [*self._keys, *self._values, *self._others],
            [*(keys for keys, _ in read.layers), *(values for _, values in read.layers), *read.others],
            strict=True,
        ):
            rows.fit(first + count, room)
            rows.put(first, values)
        self.lengths += read.lengths

    def leave(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for rows in (*self._keys, *self._values, *self._others):
                rows.move(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def open(self) -> None:
        """Make a column for the next token of each row."""
        width = max(self.lengths) + 1
        for rows in (*self._keys, *self._values):
            rows.fit(len(self.lengths), width)
        self._places = {}

    def close(self) -> None:
        """The column is filled."""
        self.lengths = [length + 1 for length in self.lengths]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401 - as transformers declares it
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token's (n, H, 1, width) and give back all, (n, H, C, width)."""
        return (
            self._written(self._keys[layer_idx].tensor, key_states),
            self._written(self._values[layer_idx].tensor, value_states),
        )

    def _written(self, tensor: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        count, width = len(self.lengths), max(self.lengths) + 1
        if self.is_even:
            tensor[:count, :, width - 1] = states[:, :, 0]
        else:
            rows, columns = self._places_on(tensor.device)
            tensor[rows, :, columns] = states[:, :, 0]
        return tensor[:count, :, :width]

    def _places_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._places:
            lengths = torch.tensor(self.lengths, device=device)
            self._places[device] = (torch.arange(len(self.lengths), device=device), lengths)
        return self._places[device]

    @property
    def is_even(self) -> bool:
        """Whether all rows fill as many columns, so that nothing needs masking."""
        return min(self.lengths) == max(self.lengths)

    def seen(self, device: torch.device, window: int | None = None) -> torch.Tensor | None:
        """(n, 1, 1, C): which columns the next token of each row attends to; None for all.

        window  of the newest columns that are seen, for layers with one
        """
        width = max(self.lengths) + 1
        if self.is_even and (window is None or width <= window):
            return None
        columns, lengths = torch.arange(width, device=device), self._places_on(device)[1][:, None]
        seen = columns <= lengths
        if window is not None:
            seen &= columns > lengths - window
        return seen[:, None, None]

    @property
    def others(self) -> list[torch.Tensor]:
        """What else stays with the rows that run, (n, …) each."""
        return [rows.tensor[: len(self.lengths)] for rows in self._others]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the next token."""
        return max(self.lengths, default=0)


def causal(length: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """(1, 1, T, T): what each token of a prompt attends to."""
    places = torch.arange(length, device=device)
    seen = places[None] <= places[:, None]
    if window is not None:
        seen &= places[None] > places[:, None] - window
    return seen[None, None]


def additive(seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as a number to add to scores, for attention that takes no other."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def padded(sequences: Sequence[torch.Tensor], value: int = 0) -> torch.Tensor:
    """(T_i,) → (B, T), padded on the right, where causal attention does not look."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)


def last_of(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(B, T, D) → (B, D) at each prompt's last token."""
    ends = torch.tensor(lengths, device=hidden.device) - 1
    return hidden[torch.arange(len(lengths), device=hidden.device), ends]


def layers_of(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values as a prefill left them."""
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]


class _Chooser:
    """Chooses the tokens of one row: its own chance, whoever else is there.

    known  (V,) which words the prompt or the answer has, where that counts
    """

    def __init__(self, sampling: Sampling, device: torch.device, known: torch.Tensor | None) -> None:
        self.known = known
        self.is_greedy = sampling.temperature < MIN_TEMPERATURE
        self._sampling = sampling
        if not self.is_greedy:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """From (V,) float32, by temperature and nucleus (top-p), at least one word."""
        scores = logits / self._sampling.temperature
        if self._sampling.top_p < 1:
            ordered, places = scores.sort()
            is_out = ordered.softmax(-1).cumsum(-1) <= 1 - self._sampling.top_p
            is_out[-1] = False
            scores = scores.masked_fill(is_out.scatter(0, places, is_out), -torch.inf)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class Decoder(Generic[Prompt]):
    """The rows of one model that run; see `engines.base.Decoder`."""

    def __init__(self, network: Network[Prompt]) -> None:
        self._network = network
        self._slots = Slots()
        self._choosers: list[_Chooser] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._device = torch.device("cpu")

    @torch.inference_mode()
    def join(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[tuple[int, int]]:
        """Read prompts and add a row for each. Rows that run are as they were when this raises.

        returns  index of the prompt and its first token, in the order of the new rows
        """
        seen = self._network.see(prompts)
        lengths = [len(self._network.token_ids(prompt)) for prompt in prompts]
        read: list[tuple[list[int], Prefilled]] = []
        for pack in packs(lengths, len(prompts), PREFILL_TOKENS):
            read.append((pack, self._network.prefill([prompts[at] for at in pack], [seen[at] for at in pack])))
        joined: list[tuple[int, int]] = []
        for pack, part in read:
            self._device = part.logits.device
            choosers = [self._chooser(prompts[at], samplings[at], part.logits) for at in pack]
            tokens = self._chosen(part.logits, choosers)
            self._slots.add(part)
            self._choosers += choosers
            self._tokens += tokens
            self._positions += part.positions
            joined += zip(pack, tokens, strict=True)
        return joined

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each row."""
        self._slots.open()
        device = self._device
        logits = self._network.decode(
            torch.tensor(self._tokens, device=device), torch.tensor(self._positions, device=device), self._slots
        )
        self._slots.close()
        self._positions = [position + 1 for position in self._positions]
        self._tokens = self._chosen(logits, self._choosers)
        return self._tokens

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        self._slots.leave(row)
        for each in (self._choosers, self._tokens, self._positions):
            entries = cast("list[Any]", each)
            entries[row] = entries[-1]
            entries.pop()

    def _chooser(self, prompt: Prompt, sampling: Sampling, logits: torch.Tensor) -> _Chooser:
        known = None
        if self._network.repetition_penalty != 1:
            known = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            ids = self._network.token_ids(prompt).to(logits.device)
            known[ids[ids < len(known)]] = True  # a begin token may be past the words that can be said
        return _Chooser(sampling, logits.device, known)

    def _chosen(self, logits: torch.Tensor, choosers: Sequence[_Chooser]) -> list[int]:
        logits = logits.float()
        if self._network.repetition_penalty != 1:
            logits = _penalised(logits, choosers, self._network.repetition_penalty)
        tokens: list[int] = logits.argmax(-1).tolist()
        for row, chooser in enumerate(choosers):
            if not chooser.is_greedy:
                tokens[row] = chooser.choose(logits[row])
            if chooser.known is not None:
                chooser.known[tokens[row]] = True
        return tokens


def _penalised(logits: torch.Tensor, choosers: Sequence[_Chooser], penalty: float) -> torch.Tensor:
    known = torch.stack([cast("torch.Tensor", chooser.known) for chooser in choosers])
    return torch.where(known, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def generate(
    network: Network[Prompt],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    is_abandoned: IsAbandoned,
    on_token: OnToken | None = None,
) -> list[Generated]:
    """Answer prompts that begin together; see `engines.base.GenerativeModel`. The engine itself lets others join."""
    decoder = Decoder(network)
    drafts = [Draft(network.most_tokens(prompt, sampling), network.stops) for prompt in prompts]
    rows: list[int] = []  # which prompt each row of the decoder is
    joined = decoder.join(prompts, [sampling] * len(prompts))
    rows, tokens = [at for at, _ in joined], [token for _, token in joined]
    while rows:
        over: list[int] = []
        for row, (at, token) in enumerate(zip(rows, tokens, strict=True)):
            if on_token is not None:
                on_token(at, token)
            if drafts[at].add(token) or is_abandoned(at):
                over.append(row)
        for row in reversed(over):
            decoder.leave(row)
            rows[row] = rows[-1]
            rows.pop()
        tokens = decoder.step() if rows else []
    return [network.result(prompt, draft) for prompt, draft in zip(prompts, drafts, strict=True)]
