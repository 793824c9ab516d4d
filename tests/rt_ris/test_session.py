from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rt_ris.backends.base import Runner
from rt_ris.backends.fake import FakeRunner
from rt_ris.errors import PlanError
from rt_ris.predictor import Predictor
from rt_ris.session import Session, open_runners
from rt_ris.spec import LOGITS, Dependency, StageGraph, StageSpec, TensorSpec

WORDS = ("red", "green", "blue", "white", "the red", "the blue", "green white", "red blue")


class Faked(Protocol):
    predictor: Predictor
    runners: dict[str, FakeRunner]

    def runs(self) -> dict[str, int]: ...


MakeFaked = Callable[..., Faked]
Picture = npt.NDArray[np.uint8]


def test_the_image_stage_runs_once_per_picture(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked()
    fake.predictor.set_image(picture)
    assert fake.runs() == {"image": 1, "text": 0, "fusion": 0}
    fake.predictor.segment("red")
    fake.predictor.segment("blue")
    assert fake.runs() == {"image": 1, "text": 2, "fusion": 2}
    fake.predictor.set_image(picture.copy())
    fake.predictor.segment("green", image=picture.copy())
    assert fake.runs() == {"image": 1, "text": 3, "fusion": 3}
    fake.predictor.set_image(picture[::-1])
    assert fake.runs()["image"] == 2


def test_only_new_distinct_sentences_are_encoded(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked()
    fake.predictor.set_image(picture)
    fake.predictor.segment(["red", "blue"])
    fake.predictor.segment(["green", "red", "green", "white", "blue"])
    assert fake.runners["text"].rows == [2, 2]
    assert fake.runners["fusion"].rows == [2, 5]
    fake.predictor.segment("white")
    assert fake.runners["text"].rows == [2, 2]


def test_sentences_that_become_the_same_tokens_share_an_entry(
    make_faked: MakeFaked, picture: Picture
) -> None:
    fake = make_faked()
    fake.predictor.set_image(picture)
    one, two = fake.predictor.segment(["red  thing", "RED thing"])
    assert fake.runners["text"].rows == [1]
    assert (one.sentence, two.sentence) == ("red  thing", "RED thing")


def test_a_network_that_cannot_be_split_works(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked("joint")
    fake.predictor.set_image(picture)
    masks = fake.predictor.segment(["red", "blue"])
    again = fake.predictor.segment("blue")
    assert fake.runners["all"].rows == [2, 1]
    assert np.array_equal(masks[1].logits, again.logits)
    other = fake.predictor.segment("blue", image=picture[::-1])
    assert not np.array_equal(other.logits, again.logits)


@pytest.mark.parametrize("kind", ["cached", "joint"])
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    calls=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=7), min_size=1, max_size=4
    ),
    most=st.integers(1, 5),
    text_cache=st.integers(0, 3),
    image_cache=st.sampled_from([0, 2000, 1 << 20]),
)
def test_no_order_batch_or_cache_changes_an_answer(
    make_faked: MakeFaked,
    picture: Picture,
    kind: str,
    calls: list[list[str]],
    most: int,
    text_cache: int,
    image_cache: int,
) -> None:
    fake = make_faked(
        kind,
        max_expressions=most,
        text_cache_sentences=text_cache,
        image_cache_bytes=image_cache,
    )
    plain = make_faked(kind, text_cache_sentences=0, image_cache_bytes=0)
    for number, call in enumerate(calls):
        image = picture if number % 2 else picture[::-1]
        found = fake.predictor.segment(call, image=image)
        for mask, sentence in zip(found, call, strict=True):
            expected = plain.predictor.segment(sentence, image=image)
            assert mask.sentence == sentence
            assert np.array_equal(mask.logits, expected.logits)
            assert mask.existence == expected.existence
    assert max(fake.runners["fusion" if kind == "cached" else "all"].rows) <= most


def test_many_sentences_are_split_evenly(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked(max_expressions=4)
    fake.predictor.segment([*WORDS, "white red"], image=picture)
    assert fake.runners["fusion"].rows == [3, 3, 3]
    assert fake.runners["text"].rows == [3, 3, 3]


def test_caches_stay_within_their_limits(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked(image_cache_bytes=2500, text_cache_sentences=3)
    for shift in range(5):
        fake.predictor.segment(list(WORDS), image=np.roll(picture, shift, axis=1))
    stats = fake.predictor.stats
    assert stats.image_cache.entries == 2
    assert stats.image_cache.weight <= 2500
    assert stats.text_cache.entries == 3
    fake.predictor.session.clear()
    assert fake.predictor.stats.image_cache.weight == 0


def test_what_was_used_last_is_kept(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked(text_cache_sentences=2)
    fake.predictor.set_image(picture)
    for sentence in ("red", "blue", "red", "green", "red"):
        fake.predictor.segment(sentence)
    assert fake.runs()["text"] == 3
    fake.predictor.segment("blue")
    assert fake.runs()["text"] == 4


def test_features_cannot_be_spoilt(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked()
    features = fake.predictor.encode_image(picture)
    with pytest.raises(ValueError, match="read-only"):
        features.values["grid"][...] = 0
    with pytest.raises(TypeError):
        features.values["grid"] = None  # type: ignore[index]
    assert set(features.values) == {"grid", "valid_box"}
    text = fake.predictor.encode_text(["red", "blue"])
    assert set(text.values) == {"words", "token_mask"}
    with pytest.raises(ValueError, match="read-only"):
        text.values["words"][...] = 0


def test_stats_count_and_time_each_stage(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked()
    fake.predictor.set_image(picture)
    fake.predictor.segment(["red", "blue"])
    fake.predictor.segment("red")
    stats = fake.predictor.stats
    assert {name: timing.runs for name, timing in stats.stages.items()} == fake.runs()
    assert all(0 <= timing.last_ms <= timing.total_ms for timing in stats.stages.values())
    assert (stats.text_cache.hits, stats.text_cache.misses) == (1, 2)


def test_threads_share_a_session(make_faked: MakeFaked, picture: Picture) -> None:
    fake = make_faked(text_cache_sentences=2, image_cache_bytes=3000)
    pictures = [np.roll(picture, shift, axis=1) for shift in range(3)]
    jobs = [(pictures[n % 3], WORDS[n % len(WORDS)]) for n in range(64)]
    expected = [fake.predictor.segment(word, image=image).logits for image, word in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: fake.predictor.segment(job[1], image=job[0]), jobs))
    for mask, logits in zip(found, expected, strict=True):
        assert np.array_equal(mask.logits, logits)


def test_a_stage_without_a_runner_is_named(make_faked: MakeFaked) -> None:
    fake = make_faked()
    with pytest.raises(PlanError, match="'text' has no runner"):
        Session(fake.predictor.session.graph, {"image": fake.runners["image"]})


def test_logits_must_depend_on_both() -> None:
    pixels = TensorSpec(name="pixels", dtype="uint8", shape=(1, 8, 8, 3))
    logits = TensorSpec(name=LOGITS, dtype="float32", shape=(1, 8, 8))
    stage = StageSpec(id="all", role="decoder", inputs=(pixels,), outputs=(logits,))
    with pytest.raises(PlanError, match="depends on the image alone"):
        Session(StageGraph(stages=(stage,)), {"all": FakeRunner(stage)})


def test_runners_are_closed_if_one_does_not_open(make_faked: MakeFaked) -> None:
    closed: list[str] = []

    class Noted(FakeRunner):
        def close(self) -> None:
            closed.append(self.spec.id)

    def opened(spec: StageSpec) -> Runner:
        if spec.id == "fusion":
            raise KeyboardInterrupt
        return Noted(spec)

    with pytest.raises(KeyboardInterrupt):
        open_runners(make_faked().predictor.session.graph.stages, opened)
    assert closed == ["image", "text"]


def test_dependencies_are_derived(make_faked: MakeFaked) -> None:
    graph = make_faked().predictor.session.graph
    assert [graph.dependency(name) for name in ("image", "text", "fusion")] == [
        Dependency.IMAGE,
        Dependency.TEXT,
        Dependency.BOTH,
    ]
    assert [spec.name for spec in graph.held(Dependency.IMAGE)] == ["grid", "valid_box"]
    assert sum(spec.nbytes() for spec in graph.held(Dependency.IMAGE)) == 4 * 8 * 8 * 4 + 16
