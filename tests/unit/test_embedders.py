"""Embedders: unit rows whatever comes in, honest names, clear refusals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from powerflow_lit.config import conf_dir
from powerflow_lit.judging.embedders import (
    Embedder,
    HashingEmbedder,
    OpenAIEmbedder,
    SentenceTransformerEmbedder,
)
from powerflow_lit.judging.endpoint import JudgeError
from powerflow_lit.metrics.text import diversity_semantic, hashing_embedding
from tests.chat_server import Server, chat_server

TEXTS = ["the cat sat", "", "a dog ran off", "  \n", "the cat sat"]


def built(*overrides: str) -> Embedder:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("evaluate", overrides=list(overrides))
    return instantiate(config.embedder)


def openai_embedder(server: Server, cache: Path | None = None, **changes: Any) -> OpenAIEmbedder:
    settings: dict[str, Any] = {
        "base_url": server.base_url, "model": "judge-1", "api_key_env": None, "timeout_s": 10.0,
        "max_retries": 1, "concurrency": 2, "batch_size": 2, "max_chars": 100,
        "cache": None if cache is None else str(cache), "probe": True,
    }  # fmt: skip
    return OpenAIEmbedder(**settings | changes)


def letters(body: dict[str, Any]) -> tuple[int, Any]:
    """Counts of a, b and c and the length, rows in reverse order; refuses empty texts."""
    texts = body["input"]
    if not all(texts):
        return 400, "empty input"
    rows = [[float(t.count(x)) for x in "abc"] + [float(len(t))] for t in texts]
    return 200, list(enumerate(rows))[::-1]


def test_the_default_is_offline_and_says_that_it_is_not_semantic() -> None:
    embed = built("embedder=hashing")
    assert embed.name == "hashing-512 (bag of words; not semantic)"
    texts = ["the cat sat", "a dog ran off", "the cat ran"]
    assert np.allclose(embed(texts)[:, :-1], hashing_embedding(texts))
    assert diversity_semantic(texts, embed) == pytest.approx(
        diversity_semantic(texts, hashing_embedding)
    )
    paraphrase = ["the feline rested", "a cat was sitting"]
    assert diversity_semantic(paraphrase, embed) > 0.9  # what the name warns of


def cases() -> list[str]:
    return ["hashing", "openai"]


@pytest.mark.parametrize("kind", cases())
def test_rows_have_unit_length_and_texts_without_words_are_like_each_other_only(kind: str) -> None:
    with chat_server(letters) as server:
        embed = HashingEmbedder(dimensions=16) if kind == "hashing" else openai_embedder(server)
        rows = embed(TEXTS)
        only_empty = embed(["", " "])
        none = embed([])
    assert rows.shape == (5, {"hashing": 17, "openai": 5}[kind])
    cosine = rows @ rows.T
    assert np.allclose(np.diag(cosine), 1)
    assert cosine[1, 3] == pytest.approx(1)
    assert np.allclose(cosine[[1, 3]][:, [0, 2, 4]], 0)
    assert cosine[0, 4] == pytest.approx(1)
    assert np.allclose(only_empty @ only_empty.T, 1)
    assert len(none) == 0


class Fixed(Embedder):
    name = "fixed"

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self.vectors)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 0.0]], r"fixed gives vectors of shape \(1, 2\) for 2 texts"),
        ([1.0, 0.0], r"shape \(2,\)"),
        ([[1.0, 0.0], [np.nan, 1.0]], "not finite"),
    ],
)
def test_vectors_of_a_wrong_shape_are_refused(vectors: Any, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        Fixed(vectors)(["a", "b"])


def test_a_zero_vector_still_gives_a_unit_row() -> None:
    assert np.allclose(Fixed([[0.0, 0.0], [3.0, 4.0]])(["a", "b"]), [[0, 0, 1], [0.6, 0.8, 0]])


def test_a_server_embeds_in_batches_each_text_once_and_in_order(tmp_path: Path) -> None:
    texts = ["a", "bb", "abc", "a", "", "ccc", "b" * 500]
    with chat_server(letters) as server:
        embed = openai_embedder(server, tmp_path / "v")
        rows = embed(texts)
        assert embed.name == "openai:judge-1"
        assert embed.requests == 3
        assert sorted(len(body["input"]) for body in server.bodies) == [1, 2, 2]
        assert max(len(t) for body in server.bodies for t in body["input"]) == 100
        again = openai_embedder(server, tmp_path / "v")
        assert np.array_equal(again(texts), rows)
        assert again.requests == 0
    expected = np.array([[1, 0, 0, 1], [0, 2, 0, 2], [1, 1, 1, 3]], dtype=float)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(rows[:3, :-1], expected, atol=1e-6)


def test_vectors_of_two_lengths_name_the_cache(tmp_path: Path) -> None:
    with chat_server(letters) as server:
        openai_embedder(server, tmp_path / "v")(["a"])
    with (
        chat_server(lambda body: (200, [(0, [1.0, 2.0])])) as server,
        pytest.raises(JudgeError, match=r"2 and 4 numbers: a cache from another model"),
    ):
        openai_embedder(server, tmp_path / "v")(["a", "b"])


def test_a_server_that_refuses_a_text_is_heard() -> None:
    with (
        chat_server(lambda body: (400, "this model does not embed")) as server,
        pytest.raises(JudgeError, match="answers 400: this model does not embed"),
    ):
        openai_embedder(server)(["a"])


def test_without_sentence_transformers_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(JudgeError, match=r"pip install 'powerflow-lit\[embed\]'"):
        SentenceTransformerEmbedder(model="x", device=None, batch_size=8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers' format: a random BERT and mean pooling."""
    library = pytest.importorskip(
        "sentence_transformers", reason="needs the optional package sentence-transformers"
    )
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dog", "ran"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **shape)).save_pretrained(
        folder / "plain"
    )
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "plain")
    library.SentenceTransformer(str(folder / "plain"), device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def test_a_local_sentence_transformer_embeds(bert: Path) -> None:
    embed = built("embedder=sentence_transformers", f"embedder.model={bert}", "embedder.device=cpu")
    rows = embed(["the cat sat", "", "the dog ran", "the cat sat"])
    assert embed.name == f"sentence-transformers:{bert}"
    assert rows.shape == (4, 17)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert rows[0] @ rows[3] == pytest.approx(1)
    assert rows[0] @ rows[2] < 0.9999


def test_a_folder_that_is_no_model_is_named(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=f"cannot load embedder.model={tmp_path}"):
        SentenceTransformerEmbedder(model=str(tmp_path), device="cpu", batch_size=8)
