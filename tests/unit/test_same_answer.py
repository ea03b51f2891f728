"""One answer, whoever else is there: every small checkpoint alone, in company, after cancellations, and by `generate`.

What is compared are tokens, and logits in float32 to 1e-4: those that the running decoder chose from, at every token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from sightline.engines.base import Draft
from sightline.models.blip import Blip
from sightline.models.gpt_oss.model import GptOss
from sightline.models.kimi_vl.model import KimiVL
from sightline.models.qwen_vl import QwenVL
from sightline.settings import BlipSettings, DescribeSettings, EnhanceSettings, GenerateSettings
from sightline.wire import Sampling, Turn

TOLERANCE = 1e-4
HERE: dict[str, Any] = {"_env_file": None, "auth": "off", "device": "cpu", "threads": 1}
GREEDY = Sampling(max_tokens=24)


def picture(color: str = "red", size: tuple[int, int] = (160, 100)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=color)
    return image


@dataclass(frozen=True)
class Case:
    """A model and prompts for it: short, long, and with other numbers of images where it takes several.

    plainly  the tokens that transformers' own `generate` makes of one prompt
    """

    model: Any
    prompts: Sequence[Any]
    plainly: Callable[[Any], tuple[int, ...]]


def describe() -> Case:
    model = QwenVL(DescribeSettings(**HERE))
    texts = ["What?", "Describe this image in detail", "Describe this image in one short sentence, please. " * 4]
    prompts = [model.preprocess(picture(), text) for text in texts]
    for colors in (["blue", "green"], ["black", "red", "blue"]):
        prompts.append(model.preprocess_chat([("user", [*[picture(c, (90, 200)) for c in colors], texts[1]])]))

    def plainly(prompt: Any) -> tuple[int, ...]:
        return generated(
            model,
            prompt.input_ids,
            mm_token_type_ids=prompt.token_types[None],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        )

    return Case(model, prompts, plainly)


def generate() -> Case:
    model = KimiVL(GenerateSettings(**HERE))
    prompts = [
        model.preprocess([picture()], "Describe this image in detail"),
        model.preprocess([], "Which image holds a red shape? " * 6),
        model.preprocess([picture("blue"), picture("green", (90, 200))], "Which image holds a green shape?"),
        model.preprocess([], "a"),
        model.preprocess([picture("black")] * 3, "What is in the images?"),
    ]

    def plainly(prompt: Any) -> tuple[int, ...]:
        images = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixel_values}
        if images:
            images["image_grid_thw"] = prompt.image_grid_thw
        return generated(model, prompt.input_ids, **images)

    return Case(model, prompts, plainly)


def enhance() -> Case:
    """One prompt is longer than the window of the layers that have one."""
    model = GptOss(EnhanceSettings(**HERE))
    captions = ["A red circle.", "Two small blue squares on a white background.", "A green triangle. " * 30, "a"]
    prompts = [model.preprocess([Turn("user", (caption,))], "low") for caption in captions]
    assert len(prompts[2].input_ids) > model._model.config.sliding_window > len(prompts[0].input_ids)
    return Case(model, prompts, lambda prompt: generated(model, prompt.input_ids))


def blip() -> Case:
    model = Blip(BlipSettings(**HERE))
    prefixes = ["", "a picture of", "what nobody ever said of any picture in this small world"]
    prompts = [model.preprocess(picture(color), prefix) for color in ("red", "blue") for prefix in prefixes]

    def plainly(prompt: Any) -> tuple[int, ...]:
        with torch.inference_mode():
            seen = model._model.vision_model(pixel_values=prompt.pixel_values[None]).last_hidden_state
        return generated(model, prompt.input_ids, network=model._model.text_decoder, encoder_hidden_states=seen)

    return Case(model, prompts, plainly)


def generated(model: Any, ids: torch.Tensor, network: Any = None, **inputs: Any) -> tuple[int, ...]:
    with torch.inference_mode():
        out = (network or model._model).generate(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=sorted(model.stops),
            pad_token_id=0,
            **inputs,
        )
    return tuple(out[0, len(ids) :].tolist())


@pytest.fixture(scope="module", params=[describe, generate, enhance, blip], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


@dataclass
class Run:
    """Rows of one decoder, told when to join and leave, and the logits each of their tokens was chosen from."""

    case: Case

    def __post_init__(self) -> None:
        self.decoder = self.case.model.decoder()
        self.rows: list[int] = []
        self.drafts: dict[int, Draft] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        chosen = self.decoder._chosen

        def watched(logits: torch.Tensor, choosers: Any) -> list[int]:
            self._newest.extend(logits.clone())
            return chosen(logits, choosers)

        self._newest: list[torch.Tensor] = []
        self.decoder._chosen = watched

    def join(self, *prompts: int, sampling: Sampling = GREEDY) -> None:
        joined = self.decoder.join([self.case.prompts[at] for at in prompts], [sampling] * len(prompts))
        self.rows += [prompts[at] for at, _ in joined]
        for at, _ in joined:
            self.drafts[prompts[at]] = Draft(sampling.max_tokens, self.case.model.stops)
            self.logits[prompts[at]] = []
        self._take([token for _, token in joined], len(self.rows) - len(joined))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            if self.rows:
                self._take(self.decoder.step(), 0)

    def leave(self, prompt: int) -> None:
        row = self.rows.index(prompt)
        self.decoder.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def end(self) -> None:
        while self.rows:
            self.step()

    def _take(self, tokens: Sequence[int], first: int) -> None:
        over: list[int] = []
        for prompt, token, logits in zip(self.rows[first:], tokens, self._newest, strict=True):
            self.logits[prompt].append(logits)
            if self.drafts[prompt].add(token):
                over.append(prompt)
        self._newest.clear()
        for prompt in over:
            self.leave(prompt)


@pytest.fixture(scope="module")
def alone(case: Case) -> Run:
    """Each prompt on its own; the answers all others must equal."""
    whole = Run(case)
    for prompt in range(len(case.prompts)):
        one = Run(case)
        one.join(prompt)
        one.end()
        whole.drafts |= one.drafts
        whole.logits |= one.logits
    return whole


def same(run: Run, alone: Run, *prompts: int) -> None:
    for prompt in prompts or run.drafts:
        assert run.drafts[prompt].token_ids == alone.drafts[prompt].token_ids
        for one, other in zip(run.logits[prompt], alone.logits[prompt], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_is_that_of_generate(case: Case, alone: Run) -> None:
    assert [tuple(alone.drafts[at].token_ids) for at in range(len(case.prompts))] == [
        case.plainly(prompt) for prompt in case.prompts
    ]
    assert max(len(draft.token_ids) for draft in alone.drafts.values()) > 4, "nothing is said"


def test_is_the_same_with_longer_shorter_and_other_images(case: Case, alone: Run) -> None:
    run = Run(case)
    run.join(*range(len(case.prompts)))
    run.end()

    same(run, alone)


def test_is_the_same_in_any_pair(case: Case, alone: Run) -> None:
    for one in range(len(case.prompts)):
        run = Run(case)
        run.join(one, (one + 1) % len(case.prompts))
        run.end()

        same(run, alone)


def test_is_the_same_for_who_joins_late_and_for_whom_others_join(case: Case, alone: Run) -> None:
    run = Run(case)
    for prompt in range(len(case.prompts)):
        run.join(prompt)
        run.step(2)
    run.end()

    same(run, alone)


def test_is_the_same_when_neighbours_leave_and_others_take_their_places(case: Case, alone: Run) -> None:
    first, second, third, last = 0, 1, 2, len(case.prompts) - 1
    run = Run(case)
    run.join(first, second, third)
    run.step(2)
    for gone in (first, second):
        if gone in run.rows:
            run.leave(gone)
    run.join(last)
    run.step(1)
    run.join(first)
    run.end()

    same(run, alone, first, third, last)


def test_is_the_same_after_a_neighbour_that_is_not_finite(case: Case, alone: Run) -> None:
    """What such a row leaves in its place is multiplied by nought, and nought times NaN is NaN."""
    run = Run(case)
    run.join(0, 1)
    run.step()
    with torch.inference_mode():
        for rows in (*run.decoder._slots._keys, *run.decoder._slots._values):
            rows.tensor[run.rows.index(1)] = torch.nan
    run.leave(1)
    run.join(1)
    run.end()

    same(run, alone)


def test_of_a_seed_is_the_same_in_any_company(case: Case) -> None:
    hot = Sampling(max_tokens=16, temperature=1.2, top_p=0.95, seed=5)
    one = Run(case)
    one.join(1, sampling=hot)
    one.end()

    company = Run(case)
    company.join(0)
    company.join(1, sampling=hot)
    company.step()
    company.join(2, sampling=Sampling(max_tokens=16, temperature=2.0))
    company.end()

    assert company.drafts[1].token_ids == one.drafts[1].token_ids
    other = Run(case)
    other.join(1, sampling=Sampling(max_tokens=16, temperature=1.2, top_p=0.95, seed=6))
    other.end()
    assert other.logits[1][0].allclose(one.logits[1][0], atol=TOLERANCE)


def test_a_repetition_penalty_is_that_of_generate(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL ships 1.05; here it is so strong that it changes what is said."""
    network = case.model._model.text_decoder if isinstance(case.model, Blip) else case.model._model
    without = [case.plainly(prompt) for prompt in case.prompts]
    monkeypatch.setattr(network.generation_config, "repetition_penalty", 1.8)
    monkeypatch.setattr(case.model, "repetition_penalty", 1.8)
    run = Run(case)
    run.join(*range(len(case.prompts)))
    run.end()

    theirs = [case.plainly(prompt) for prompt in case.prompts]
    assert [tuple(run.drafts[at].token_ids) for at in range(len(case.prompts))] == theirs
    assert theirs != without


def test_eight_bits_say_nearly_the_same() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")
    whole, eight = QwenVL(DescribeSettings(**HERE)), QwenVL(DescribeSettings(load_8bit=True, **HERE))
    prompts = [whole.preprocess(picture(color), "Describe this image in detail") for color in ("red", "blue")]
    with torch.inference_mode():
        one, other = (model.prefill(prompts, model.see(prompts)).logits.double() for model in (whole, eight))

    assert torch.cosine_similarity(one, other).min() >= 0.999
