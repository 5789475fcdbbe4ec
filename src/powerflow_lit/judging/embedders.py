"""Embedders: texts to vectors of unit length, for semantic diversity.

Figures of two embedders never compare; `name` says which one made them.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from powerflow_lit.judging.cache import AnswerCache, key_of
from powerflow_lit.judging.endpoint import Endpoint, JudgeError
from powerflow_lit.metrics.text import hashing_embedding


class Embedder(ABC):
    """Texts to unit rows.

    A text without words has no direction of its own: it gets one axis that no other text uses, so
    that two of them are alike (cosine 1) and differ from all others (cosine 0).

    Attributes:
        name: what made the vectors, as reports show it.
    """

    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, d + 1) float64 rows of unit length; the last axis is that of texts without words.

        Raises:
            JudgeError: the embedder fails, or gives vectors of a wrong shape or without a length.
        """
        worded = [i for i, text in enumerate(texts) if text.strip()]
        vectors = self.embed([texts[i] for i in worded]) if worded else np.zeros((0, 0))
        vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(worded):
            raise JudgeError(
                f"{self.name} gives vectors of shape {vectors.shape} for {len(worded)} texts"
            )
        if not np.isfinite(vectors).all():
            raise JudgeError(f"{self.name} gives vectors that are not finite")
        rows = np.zeros((len(texts), vectors.shape[1] + 1))
        rows[worded, :-1] = vectors
        rows[:, -1] = np.where(rows.any(axis=1), 0.0, 1.0)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(N, d) vectors of any length for N >= 1 texts with words."""

    def close(self) -> None:
        """Lets go of what it holds; safe to call twice."""
        return None


class HashingEmbedder(Embedder):
    """Hashed words and word pairs: offline and free, and no measure of meaning.

    Two texts that say the same in other words are far apart, so diversity comes out too high.

    Args:
        dimensions: length of the vectors.
    """

    def __init__(self, *, dimensions: int) -> None:
        if dimensions < 1:
            raise JudgeError(f"embedder.dimensions={dimensions}: must be 1 or more")
        self.dimensions = dimensions
        self.name = f"hashing-{dimensions} (bag of words; not semantic)"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return hashing_embedding(texts, self.dimensions)


class SentenceTransformerEmbedder(Embedder):
    """A model of the package sentence-transformers, on this machine.

    Args:
        model: hub id or local folder.
        device: `cpu`, `cuda`; None lets the package choose.
        batch_size: texts at once.

    Raises:
        JudgeError: the package is not installed, or the model cannot be loaded.
    """

    def __init__(self, *, model: str, device: str | None, batch_size: int) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise JudgeError(
                f"embedder=sentence_transformers needs its package ({error}): "
                "pip install 'powerflow-lit[embed]'"
            ) from error
        try:
            self._model: Any = SentenceTransformer(model, device=device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise JudgeError(
                f"sentence-transformers cannot load embedder.model={model}: {reason}"
            ) from error
        self.name = f"sentence-transformers:{model}"
        self._batch_size = batch_size

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(
            self._model.encode(
                list(texts),
                batch_size=self._batch_size,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        )


class OpenAIEmbedder(Embedder):
    """The `/embeddings` of an OpenAI-compatible server: batched, cached and resumable.

    Args:
        base_url, model, api_key_env, timeout_s, max_retries, concurrency, probe: see `Endpoint`.
        batch_size: texts in one request.
        max_chars: longest text sent; the rest is cut off.
        cache: jsonl file of the vectors; None keeps them for this process only.

    Attributes:
        requests: batches that the server answered.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout_s: float,
        max_retries: int,
        concurrency: int,
        batch_size: int,
        max_chars: int,
        cache: str | None,
        probe: bool,
    ) -> None:
        if batch_size < 1 or max_chars < 1:
            raise JudgeError("embedder.batch_size and embedder.max_chars must be 1 or more")
        self.name = f"openai:{model}"
        self.model, self.requests = model, 0
        self._batch_size, self._max_chars = batch_size, max_chars
        self._cache = AnswerCache(cache)
        self._endpoint = Endpoint(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            max_retries=max_retries,
            concurrency=concurrency,
            probe=probe,
        )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        texts = [text[: self._max_chars] for text in texts]
        keys = [key_of({"embed": text, "model": self.model}) for text in texts]
        missing = {
            key: text for key, text in zip(keys, texts, strict=True) if self._cache.get(key) is None
        }
        todo = list(missing.items())
        size = self._batch_size
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        self._endpoint.map(self._ask, batches, lambda done: None)
        self.requests += len(batches)
        return _stacked([self._vector(key) for key in keys], self.name)

    def _ask(self, batch: Sequence[tuple[str, str]]) -> None:
        with self._endpoint.errors():
            answer = self._endpoint.client.embeddings.create(
                model=self.model, input=[text for _, text in batch], encoding_format="float"
            )
        rows = sorted(answer.data, key=lambda row: row.index)
        if len(rows) != len(batch):
            raise JudgeError(f"{self.name} gives {len(rows)} vectors for {len(batch)} texts")
        for (key, _), row in zip(batch, rows, strict=True):
            vector = np.asarray(row.embedding, dtype="<f4")
            packed = base64.b64encode(vector.tobytes()).decode()
            self._cache.put(key, {"model": self.model, "vector": packed})

    def _vector(self, key: str) -> np.ndarray:
        answer = self._cache.get(key)
        assert answer is not None
        return np.frombuffer(base64.b64decode(answer["vector"]), dtype="<f4")

    def close(self) -> None:
        self._endpoint.close()


def _stacked(vectors: Sequence[np.ndarray], name: str) -> np.ndarray:
    lengths = sorted({len(vector) for vector in vectors})
    if len(lengths) > 1:
        raise JudgeError(
            f"{name} gives vectors of {' and '.join(map(str, lengths))} numbers: a cache from "
            "another model of that name? Use another file"
        )
    return np.stack(vectors)
