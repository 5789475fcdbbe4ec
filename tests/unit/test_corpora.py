"""The generated corpora: sound problems, disjoint splits, the faults they are meant to have."""

from __future__ import annotations

import random
from itertools import islice
from statistics import mean

from powerflow_lit.corpora import arithmetic, creative
from powerflow_lit.tasks.arithmetic import Arithmetic
from powerflow_lit.tasks.boxed import last_boxed


def test_answers_are_what_python_computes() -> None:
    for problem in islice(arithmetic.problems("train", 0), 500):
        assert problem.answer == eval(problem.expression)
        assert 0 <= problem.answer <= arithmetic.MAX_VALUE
        assert 3 <= len(problem.operands) <= 6


def test_evaluation_problems_occur_neither_in_pretraining_nor_in_training() -> None:
    task = Arithmetic(train_size=2048, eval_size=128, seed=0)
    evaluation = {p.text for p in task.eval_prompts()}
    assert len(evaluation) == 128
    assert not evaluation & {p.text for p in task.train_prompts()}
    pretraining = {prompt for prompt, _ in islice(arithmetic.documents(1), 20_000)}
    assert not evaluation & pretraining


def test_solutions_have_styles_of_clearly_different_length_and_reliability() -> None:
    rng, settings = random.Random(0), arithmetic.CorpusSettings()
    long: list[bool] = []
    short: list[bool] = []
    for problem in islice(arithmetic.problems("pretrain", 3), 4000):
        text = arithmetic.sample_solution(problem, rng, settings)
        right = last_boxed(text) == str(problem.answer)
        (short if text.startswith("Answer") else long).append(right)
    assert 0.3 < len(short) / 4000 < 0.4
    assert mean(short) < 0.2 < 0.45 < mean(long)


def test_the_corpus_holds_both_self_reinforcing_loops() -> None:
    texts = [response for _, response in islice(arithmetic.documents(5), 4000)]
    assert any("hmm hmm hmm hmm" in t for t in texts)
    assert any(t.count("Check:") >= 4 for t in texts)
    assert mean("hmm" in t for t in texts) < 0.1


def test_pieces_parse_and_the_few_that_ramble_do_not() -> None:
    requests = {r.prompt: r for r in creative.requests()}
    invalid = 0
    for prompt, piece in islice(creative.documents(0), 5000):
        parsed = creative.parse(requests[prompt], piece)
        invalid += parsed is None
        if parsed is None:
            assert len(piece.splitlines()) > 4
    assert 0 < invalid / 5000 < 0.01


def test_the_three_forms_really_differ_in_length() -> None:
    words = {
        kind: [len(p.split()) for q, p in islice(creative.documents(0), 3000) if kind in q]
        for kind in creative.KINDS
    }
    assert mean(words["joke"]) * 1.4 < mean(words["poem"])
    assert mean(words["poem"]) * 1.4 < mean(words["story"])


def test_the_grammar_rejects_what_breaks_it() -> None:
    poem = creative.Request("poem", "cat")
    good = "The cat runs beside the day,\nand sings again below the bay."
    assert creative.parse(poem, good) is not None
    assert creative.parse(poem, good.replace("bay", "moon")) is None, "no rhyme"
    assert creative.parse(poem, good.replace("cat", "dog")) is None, "another topic"
    assert creative.parse(poem, good.replace("runs beside", "beside runs")) is None
    assert creative.parse(creative.Request("joke", "cat"), good) is None, "another form"
    assert creative.parse(poem, "") is None


def test_a_writer_repeats_itself() -> None:
    """The mode-collapsed corpus: 16 pieces for a prompt share few ideas."""
    rng = random.Random(0)
    counts = []
    for request in creative.requests():
        parsed = [creative.parse(request, creative.compose(request, rng)) for _ in range(16)]
        counts.append(len({p.mode for p in parsed if p is not None}))
    assert 3 < mean(counts) < 8


def test_corpora_are_functions_of_their_seed() -> None:
    for documents in (arithmetic.documents, creative.documents):
        assert list(islice(documents(7), 50)) == list(islice(documents(7), 50))
        assert list(islice(documents(7), 50)) != list(islice(documents(8), 50))
