"""How much memory a run will need, from the architecture alone: no weight is loaded.

What a tensor costs is counted, not measured: parameters on the meta device, where they take none;
activations by the formula of `layer_bytes` (docs/scaling.md). What is alive at once is added
up: weights, gradients, moments and base always; then the largest of four moments: a rollout, a
scoring pass, the log-probs at the end of an update's forward pass, and its backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from powerflow_lit.models.architecture import BYTES, Architecture, architecture, count, short
from powerflow_lit.models.lora import LoraSettings
from powerflow_lit.models.workload import Pass, Workload
from powerflow_lit.models.z_head import ZHead

ADAM_MOMENTS = 2
GATHERED_LAYERS = 2  # a sharded model holds the layer at work and the next one whole
ENGINE_RESERVE = 0.1  # of an engine's share of a GPU, for what is neither weight nor cache
MOMENTS = ("rollout", "score", "log-probs", "backward")
# what is there at which of them
PHASES = {
    "always": MOMENTS,
    "refill": ("rollout", "score"),
    "update": ("log-probs", "backward"),
    "passes": ("score", "log-probs", "backward"),
    **{moment: (moment,) for moment in MOMENTS},
}


@dataclass(frozen=True)
class Item:
    """One line of the estimate."""

    name: str
    size: int  # bytes
    how: str
    phase: str  # a key of PHASES


@dataclass(frozen=True)
class Estimate:
    """All lines of one device; what is of different moments is not there at once."""

    items: tuple[Item, ...]

    def at(self, moment: str) -> int:
        """Bytes at one of the four."""
        return sum(item.size for item in self.items if moment in PHASES[item.phase])

    @property
    def total(self) -> int:
        """The largest sum alive at once, bytes."""
        return max(self.at(moment) for moment in MOMENTS)


def estimate(model: Architecture, work: Workload) -> Estimate:
    """What one device of a run needs at its peak."""
    size, shards = BYTES[work.dtype], work.spread.shards
    trained = 4 if work.lora else size  # an adapter is float32
    what = "adapter" if work.lora else "all weights"
    part = "" if shards == 1 else f", 1/{shards} here"

    def held(numbers: int, each: int) -> int:
        return math.ceil(numbers / shards) * each

    trainable = model.trainable
    items = [
        Item("policy weights", held(model.parameters, size),
             f"{short(model.parameters)} {work.dtype}{part}", "always"),
        Item("gradients", held(trainable, trained), f"{short(trainable)} ({what}){part}",
             "always"),
        Item("AdamW moments", ADAM_MOMENTS * held(trainable, trained),
             f"two a trained weight{part}", "always"),
    ]  # fmt: skip
    if work.lora:
        items.append(Item("adapter", held(trainable, trained), f"float32{part}", "always"))
    if work.base_dtype is None:
        items.append(Item("frozen base", 0, "none: the policy, its adapter off", "always"))
    else:
        copied = held(model.parameters, BYTES[work.base_dtype])
        items.append(Item("frozen base", copied, f"a copy in {work.base_dtype}{part}", "always"))
    if work.head_width is not None:
        with torch.device("meta"):
            weights = count(ZHead(model.hidden, work.head_width).parameters())
        items.append(Item("Z' head", weights * 16, "with gradients and moments", "always"))
    if work.spread.bucketed:
        sent = trainable * trained
        items.append(Item("gradients' buckets", sent, "a second copy, to be sent", "always"))
    items += _gathered(model, work)
    items += _score(model, work)
    items += _update(model, work)
    items += _engine(model, work)
    return Estimate(tuple(items))


def _gathered(model: Architecture, work: Workload) -> list[Item]:
    """What a sharded model holds whole for a while."""
    if work.spread.shards == 1:
        return []
    size = BYTES[work.dtype]  # in which they are kept; autocast rounds what is whole
    whole = GATHERED_LAYERS * model.layer + model.ends
    found = [
        Item("gathered weights", whole * size, "two layers and both ends", "passes"),
        Item("a weight whole", model.vocabulary * model.hidden * BYTES[work.dtype],
             "the largest, at a sync", "rollout"),
    ]  # fmt: skip
    if not work.lora:
        found.append(Item("whole gradients", model.layer * size, "of one layer", "backward"))
    return found


def _score(model: Architecture, work: Workload) -> list[Item]:
    """A pass without gradients: one layer's tensors and the logits of a chunk."""
    rows, size = work.largest_scoring, compute_size(work)
    wide = 3 * model.feed_forward * rows.tokens
    attention = 5 * model.attention * rows.tokens + 2 * model.attention * rows.copies
    layer = 2 * model.hidden * rows.tokens + max(wide, attention)
    how = f"{short(rows.tokens)} tokens, one layer"
    return [Item("scoring", layer * size + _logits(model, work, rows), how, "score")]


def _logits(model: Architecture, work: Workload, rows: Pass) -> int:
    """Logits of a chunk and one array of their size, bytes."""
    return 2 * _chunk(model, work, rows) * model.vocabulary * 4


def _chunk(model: Architecture, work: Workload, rows: Pass) -> int:
    return min(max(int(work.logit_chunk_mb * 1e6 / 4 / model.vocabulary), 1), rows.predictors)


def _update(model: Architecture, work: Workload) -> list[Item]:
    """What one microbatch's forward and backward pass holds.

    Of the prompts' keys and values each packed response keeps a copy, 2 a numbers a copied token
    and layer. With checkpointing the layers' inputs are kept, and all of one layer while that is
    computed again.
    """
    rows, size = work.largest_pass, compute_size(work)
    how = f"{short(rows.tokens)} tokens"
    one_layer = rows.tokens * layer_bytes(model, work)
    copied = 2 * model.attention * rows.copies * size  # in a layer
    copies = f"of {short(rows.copies)} prompt tokens"
    if work.gradient_checkpointing:
        kept = rows.tokens * (model.layers + 3) * _stream(model, work)
        items = [
            Item("activations", kept, f"{how}, checkpointed", "update"),
            Item("a layer's, again", one_layer, how, "backward"),
            Item("copies of keys and values", copied, f"{copies}, one layer", "backward"),
        ]
    else:
        kept = model.layers * one_layer + rows.tokens * 3 * _stream(model, work)
        items = [
            Item("activations", kept, how, "update"),
            Item("copies of keys and values", model.layers * copied, copies, "update"),
        ]
    # gate, up and their product have a gradient each while a layer's backward pass is under way
    flying = 3 * model.feed_forward * rows.tokens * size + copied
    items.append(Item("their gradients", flying, "of one layer", "backward"))
    logits = _logits(model, work, rows)
    # the output layer's gradient is summed in float32
    logits += 0 if work.lora else model.vocabulary * model.hidden * 4
    how = f"{short(_chunk(model, work, rows))} rows of {short(model.vocabulary)}"
    items.append(Item("log-probs", logits, how, "log-probs"))
    if work.autocast and work.spread.shards == 1:
        items.append(Item("autocast weights", model.parameters * 2, "in bfloat16", "update"))
    return items


def compute_size(work: Workload) -> int:
    """Bytes of a number in products and activations."""
    return 2 if work.autocast else BYTES[work.dtype]


def layer_bytes(model: Architecture, work: Workload) -> int:
    """Bytes that autograd keeps of a token in one layer, copies of prompts apart.

    In numbers: two norms of 3 h (input, in float32 always, normalised input and output), queries,
    the attention's output twice, keys and values (3 a + 2 k; packed rows repeat keys and values
    for all query heads, 5 a), and four of the feed-forward's width f (gate, its activation, up,
    and their product): 6 h + 3 a + 2 k + 4 f. Attention is fused and keeps no matrix of scores.
    """
    size = compute_size(work)
    norms = model.hidden * (20 if work.autocast else 8 + 4 * size)
    keys = model.attention if work.packing else model.key_value
    return norms + (3 * model.attention + 2 * keys + 4 * model.feed_forward) * size


def _stream(model: Architecture, work: Workload) -> int:
    """Bytes of a token between layers; embedding, last norm and its output are kept of it too."""
    return model.hidden * (4 if work.autocast else compute_size(work))


def _engine(model: Architecture, work: Workload) -> list[Item]:
    engine = work.engine
    merged = [
        Item("merged weights", model.parameters * BYTES[work.dtype], "at a sync", "rollout")
    ] if work.lora and work.spread.shards == 1 else []  # fmt: skip
    if engine.engines is not None:
        return [Item(f"{engine.name} engine", 0, "on devices of its own", "always"), *merged]
    weights = math.ceil(engine_weights(model, work) / engine.tensor_parallel)
    room = engine_room(model, work)
    if engine.share_bytes is not None and room is not None:
        how = f"its share: weights {weights / 2**30:.1f} GiB, a cache of {short(room)} tokens"
        phase = "refill" if engine.sleeps else "always"
        return [Item(f"{engine.name} engine", engine.share_bytes, how, phase), *merged]
    items = [
        Item(f"{engine.name} engine's weights", weights, f"a copy in {engine.dtype}", "always")
    ]
    if engine.kv_cache_bytes is not None:
        items.append(Item("its key-value cache", engine.kv_cache_bytes, "set aside", "always"))
    else:
        held = engine.sequences * work.longest_row * cache_bytes(model, work)
        # the last layer's is copied as it grows; logits are sorted and normalised in float32
        held += held // max(model.layers, 1) + 4 * engine.sequences * model.vocabulary * 4
        how = f"{short(engine.sequences)} sequences of {short(work.longest_row)}"
        items.append(Item("its key-value cache", held, how, "rollout"))
    return items + merged


def engine_weights(model: Architecture, work: Workload) -> int:
    """Bytes of an engine's weights, over all its ranks; vLLM's has no tied ends."""
    numbers = model.parameters
    if work.engine.name != "hf" and model.tied:
        numbers += model.vocabulary * model.hidden
    return numbers * BYTES[work.engine.dtype]


def cache_bytes(model: Architecture, work: Workload) -> int:
    """Bytes of a token's keys and values in the engine, over all its ranks.

    Ranks beyond the number of key heads hold copies.
    """
    copies = max(work.engine.tensor_parallel / model.key_value_heads, 1.0)
    return int(2 * model.layers * model.key_value * BYTES[work.engine.dtype] * copies)


def engine_room(model: Architecture, work: Workload) -> int | None:
    """Tokens that the cache of an engine with a share of each GPU holds; below 0: its weights do
    not fit. None where the cache has no such bound."""
    engine = work.engine
    if engine.share_bytes is None:
        return None
    ranks = engine.tensor_parallel
    share = (1 - ENGINE_RESERVE) * engine.share_bytes * ranks
    return int((share - engine_weights(model, work)) // cache_bytes(model, work))


def remedies(
    config: PretrainedConfig, work: Workload, adapter: LoraSettings, *, trust_remote_code: bool
) -> list[tuple[str, int]]:
    """(override, bytes needed with it), the most effective first; `all of these` comes last."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if work.lora is None:
        changes.append(("finetune=lora", {"lora": adapter, "base_dtype": None}))
        if work.base_dtype == "float32":
            changes.append(("model.base_dtype=bfloat16", {"base_dtype": "bfloat16"}))
    if not work.gradient_checkpointing:
        changes.append(("model.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if work.tokens_per_microbatch > work.longest_row and work.rows_per_update > 1:
        fewer = {"tokens_per_microbatch": work.longest_row}
        changes.append((f"tokens_per_microbatch={work.longest_row}", fewer))
    if work.dtype == "float32":
        half = {"dtype": "bfloat16", "base_dtype": work.base_dtype and "bfloat16"}
        changes.append(("model.dtype=bfloat16", half))
    if work.spread.devices > 1 and work.spread.shards == 1:
        sharded = replace(work.spread, shards=work.spread.devices, bucketed=False)
        changes.append(("trainer=fsdp", {"spread": sharded}))
    if work.engine.share_bytes is not None and not work.engine.sleeps:
        asleep = replace(work.engine, sleeps=True)
        changes.append(("rollout.engine.sleep=true", {"engine": asleep}))

    models = {
        lora: architecture(config, lora, trust_remote_code=trust_remote_code)
        for lora in {work.lora, work.lora or adapter}
    }

    def cost(change: dict[str, Any]) -> int:
        changed = replace(work, **change)
        if changed.engine.name == "hf":
            changed = replace(changed, engine=replace(changed.engine, dtype=changed.dtype))
        return estimate(models[changed.lora], changed).total

    found = sorted(((name, cost(change)) for name, change in changes), key=lambda x: x[1])
    if len(changes) > 1:
        everything: dict[str, Any] = {}
        for _, change in reversed(changes):  # finetune=lora has the last word on the base
            everything |= change
        found.append(("all of these", cost(everything)))
    return found
