"""What batches take, learnt while they run: which deadlines can be met, and what one more prompt costs the others."""

from collections import deque

FADING = 0.97
"""What a measurement still counts after the next one: about the last thirty decide."""

ENOUGH = 8
"""Measurements without which nothing is predicted."""

CAUTION = 0.5
"""A request is refused only when even half of what it is expected to take is more than it has: machines are shared."""


class Line:
    """seconds = fixed + each · amount, fitted by least squares to what was measured, of which the old fades."""

    def __init__(self) -> None:
        self._seen = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Take one measurement. The very first is not counted: it has what is done once."""
        self._seen += 1
        if self._seen == 1:
            return
        for name, value in (
            ("_n", 1.0),
            ("_x", amount),
            ("_y", seconds),
            ("_xx", amount**2),
            ("_xy", amount * seconds),
        ):
            setattr(self, name, FADING * getattr(self, name) + value)

    @property
    def is_known(self) -> bool:
        return self._seen > ENOUGH

    @property
    def each(self) -> float:
        """Seconds of one more; 0 while all amounts were the same."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * max(1.0, self._n * self._xx):
            return 0.0
        slope = (self._n * self._xy - self._x * self._y) / spread
        return min(max(0.0, slope), self._y / self._x if self._x else 0.0)

    @property
    def fixed(self) -> float:
        """Seconds of none."""
        return max(0.0, (self._y - self.each * self._x) / self._n) if self._n else 0.0

    def of(self, amount: float) -> float:
        """Seconds to expect; 0 while nothing is known."""
        return self.fixed + self.each * amount if self.is_known else 0.0


class Cost:
    """What reading prompts, making tokens and whole batches take on this machine with this model.

    prefill  by what the prompts cost
    step     by rows
    batch    of an engine with a computation of its own, by what its items cost
    """

    def __init__(self) -> None:
        self.prefill, self.step, self.batch = Line(), Line(), Line()
        self._lengths: deque[int] = deque(maxlen=64)

    @property
    def stop(self) -> float:
        """Seconds that reading prompts takes however few they are; 0 while that cannot be told from the rest."""
        return self.prefill.fixed if self.prefill.each > 0 else 0.0

    def answered(self, tokens: int) -> None:
        """An answer of that length ended."""
        self._lengths.append(tokens)

    def tokens(self, most: int) -> int:
        """How many tokens an answer has at least, going by nine in ten of the last ones."""
        if len(self._lengths) < ENOUGH:
            return 1
        return min(most, sorted(self._lengths)[len(self._lengths) // 10])

    def can_answer(self, cost: float, most: int, seconds: float) -> bool:
        """Whether a prompt may be answered in the seconds that it has left, if it began now and alone."""
        return CAUTION * (self.prefill.of(cost) + self.tokens(most) * self.step.of(1)) <= seconds

    def can_compute(self, cost: float, seconds: float) -> bool:
        """The same of an engine with a computation of its own."""
        return CAUTION * self.batch.of(cost) <= seconds
