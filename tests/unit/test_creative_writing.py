"""`task=creative_writing`: prompt lists, their templates, the split and the figures by genre."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from powerflow_lit.config import conf_dir
from powerflow_lit.tasks.base import Response, Sampled, TaskError
from powerflow_lit.tasks.creative_writing import SHIPPED, CreativeWriting, stratified_split
from powerflow_lit.types import Prompt

BUILD = yaml.safe_load((Path(conf_dir()) / "task" / "creative_writing.yaml").read_text())["build"]


def task(**other: Any) -> CreativeWriting:
    return CreativeWriting(**{k: v for k, v in (BUILD | other).items() if k != "_target_"})


def lists(folder: Path, **lines: list[str]) -> dict[str, str]:
    for genre, texts in lines.items():
        (folder / f"{genre}.txt").write_text("\n".join(texts) + "\n")
    return {genre: str(folder / f"{genre}.txt") for genre in lines}


def texts(prompts: Any) -> set[str]:
    return {prompt.text for prompt in prompts}


def refusal(**other: Any) -> str:
    with pytest.raises(TaskError) as caught:
        task(**other)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_lists_are_varied_and_split_as_the_papers_prompts_are() -> None:
    shipped = task()
    train, held_out = shipped.train_prompts(), shipped.eval_prompts()
    assert (len(train), len(held_out)) == (108, 72)
    assert Counter(map(shipped.genre, train)) == {"poem": 36, "story": 36, "joke": 36}
    assert len(texts(train) | texts(held_out)) == 180
    assert [p.id for p in (*train, *held_out)] == list(range(180))
    assert shipped.notes == []
    lines = [x for path in SHIPPED.glob("*.txt") for x in path.read_text().splitlines()]
    assert len({" ".join(line.split()[:3]).lower() for line in lines}) > 160, "varied openings"


def test_a_bare_line_is_set_into_its_genres_template_and_a_request_is_not(tmp_path: Path) -> None:
    prompts = lists(
        tmp_path,
        poem=["Tell me, O muse,", "Please write a poem about rain."],
        joke=["Tell me a programming joke", "socks"],
    )
    for words, length in ((None, ""), (200, " of about 200 words")):
        found = task(prompts=prompts, words=words)
        assert texts([*found.train_prompts(), *found.eval_prompts()]) == {
            f"Please write a poem{length}, starting with the following line: Tell me, O muse,",
            "Please write a poem about rain.",
            "Tell me a programming joke",
            "Tell me a joke about socks.",
        }
    never = task(prompts=prompts, wrap="never")
    assert "socks" in texts([*never.train_prompts(), *never.eval_prompts()])
    always = task(prompts=prompts, wrap="always")
    every = texts([*always.train_prompts(), *always.eval_prompts()])
    assert "Tell me a joke about Tell me a programming joke." in every


def test_a_genre_can_be_left_out() -> None:
    found = task(skip=["joke", "story"])
    assert {found.genre(p) for p in (*found.train_prompts(), *found.eval_prompts())} == {"poem"}


def test_the_split_is_the_seeds_disjoint_and_not_the_files_order(tmp_path: Path) -> None:
    poems, jokes = [f"line {i}" for i in range(31)], [f"theme {i}" for i in range(10)]
    one = task(prompts=lists(tmp_path, poem=poems, joke=jokes))
    again = task(prompts=lists(tmp_path, poem=poems[::-1], joke=jokes[::-1]))
    other = task(prompts=lists(tmp_path, poem=poems, joke=jokes), split_seed=1)
    assert texts(one.train_prompts()) == texts(again.train_prompts())
    assert texts(one.train_prompts()) != texts(other.train_prompts())
    assert not texts(one.train_prompts()) & texts(one.eval_prompts())
    assert Counter(map(one.genre, one.train_prompts())) == {"poem": 19, "joke": 6}


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.6, 0.999])
def test_each_genre_is_within_one_prompt_of_its_share_and_the_whole_is_exact(share: float) -> None:
    sizes = {"a": 247, "b": 101, "c": 100, "d": 1}
    texts = {genre: [f"{genre}{i}" for i in range(size)] for genre, size in sizes.items()}
    train, held_out = stratified_split(texts, share, 0)
    assert len(train) == round(share * sum(sizes.values()))
    assert sorted([*train, *held_out]) == sorted((g, t) for g in texts for t in texts[g])
    counts = Counter(genre for genre, _ in train)
    assert all(abs(counts[genre] - share * size) < 1 for genre, size in sizes.items())


def test_repeated_prompts_are_left_out_over_all_genres_and_told_of(tmp_path: Path) -> None:
    same = "Please write a poem or story about rain"
    prompts = lists(tmp_path, poem=["a", "A ", "", "b", same], story=[same, "c", "d"])
    found = task(prompts=prompts)
    assert len(found.train_prompts()) + len(found.eval_prompts()) == 5
    assert found.notes == [
        f"{prompts['poem']}: repeated prompts left out: 1",
        f"{prompts['story']}: repeated prompts left out: 1",
    ]


def test_a_list_may_be_a_data_set(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"Write a poem on {i}"} for i in range(4)])
    rows.to_parquet(tmp_path / "poems.parquet")
    found = task(prompts={"poem": str(tmp_path / "poems.parquet")})
    assert {p.text[:-1] for p in found.train_prompts()} == {"Write a poem on "}


def test_nothing_is_right_or_wrong_and_figures_come_whole_and_by_genre() -> None:
    shipped = task()
    poem, joke = (
        next(p for p in shipped.eval_prompts() if shipped.genre(p) == genre)
        for genre in ("poem", "joke")
    )
    assert shipped.is_formatted("anything")
    assert shipped.is_correct(poem, "anything") is None

    def sampled(prompt: Prompt, *responses: str) -> Sampled:
        return Sampled(prompt, tuple(Response(t, (1, 2), truncated=False) for t in responses))

    same, different = sampled(poem, "one sea", "one sea"), sampled(joke, "a b", "c d")
    figures = shipped.evaluate([same, different])
    assert next(iter(figures)) == shipped.headline == "diversity_semantic"
    assert figures["diversity_lexical/poem"] == pytest.approx(0)
    assert figures["diversity_lexical/joke"] == pytest.approx(1)
    assert figures["diversity_lexical"] == pytest.approx(0.5)
    assert "diversity_lexical/story" not in figures


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"prompts": {"poem": "/nowhere/poems.txt"}}, "prompts.poem=/nowhere/poems.txt: cannot be"),
        ({"prompts": {"ode": None}}, "prompts.ode is null, but prompts are shipped for joke, poem"),
        ({"prompts": {}}, "task.build.prompts has no genre left"),
        ({"skip": ["poem", "story", "joke"]}, "task.build.prompts has no genre left"),
        ({"skip": ["ode"]}, "task.build.skip: no genre 'ode', only poem, story, joke"),
        ({"templates": {"poem": "A poem, please."}}, "templates.poem is missing or has no {line}"),
        ({"train_share": 1.0}, "train_share=1.0: must lie in (0, 1)"),
        ({"wrap": "yes"}, "wrap=yes: choose one of auto, always, never"),
    ],
)
def test_a_setting_that_cannot_work_is_named(other: dict[str, Any], words: str) -> None:
    assert words in refusal(**other)


def test_a_file_that_holds_no_prompts_is_named(tmp_path: Path) -> None:
    assert "poem.txt: holds no prompts" in refusal(prompts=lists(tmp_path, poem=["", " "]))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    path = str(tmp_path / "binary.txt")
    assert f"prompts.poem={path}: not a text file in UTF-8" in refusal(prompts={"poem": path})
    assert "1 prompts in all leave 1 to train and 0" in refusal(
        prompts=lists(tmp_path, poem=["one"])
    )
    parquet = str(tmp_path / "poem.parquet")
    assert f"prompts.poem: {parquet}: no such file" in refusal(prompts={"poem": parquet})
