"""How long a refill will take, from the architecture and a device's data sheet: nothing is run.

Each phase is the larger of its arithmetic and its traffic with memory, at stated shares of the
device's peaks, and what is sent between devices comes on top as if nothing of it were hidden. The
formulas stand in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerflow_lit.models.architecture import Architecture, amount, short
from powerflow_lit.models.memory import (
    BYTES,
    cache_bytes,
    compute_size,
    engine_room,
    engine_weights,
)
from powerflow_lit.models.workload import Pass, Workload

# products of a backward pass for each of the forward pass
LINEAR_BACKWARD = 2.0  # gradients of the input and of the weight
ATTENTION_BACKWARD = 2.5  # five products for two: the scores are computed again


@dataclass(frozen=True)
class Speeds:
    """What a device can do; peaks as the vendor states them, and what share of them is counted on.

    Bytes and operations a second.
    """

    flops_16: float  # in 16 bits, dense
    flops_32: float
    memory: float
    link: float  # to another device of the machine, each way
    network: float  # to another machine, each way and device
    compute_share: float
    memory_share: float
    link_share: float
    decode_step_s: float  # the least time of a decoding step, whatever its size


@dataclass(frozen=True)
class Cost:
    """One line of the plan."""

    name: str
    seconds: float
    how: str


@dataclass(frozen=True)
class Plan:
    """A refill: sampled, scored and trained on, one phase after the other."""

    costs: tuple[Cost, ...]
    response_tokens: int  # over all devices

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)


def plan(model: Architecture, work: Workload, speeds: Speeds) -> Plan:
    """The time of one refill whose rows all have the greatest length."""
    tokens = work.groups_per_refill * work.samples_per_prompt * work.longest_response
    costs = [
        *_rollout(model, work, speeds),
        *_score(model, work, speeds),
        *_update(model, work, speeds),
        _sync(model, work, speeds),
    ]
    return Plan(tuple(costs), tokens * work.spread.devices)


def forward_flops(model: Architecture, rows: Pass) -> tuple[float, float, float]:
    """Operations of one forward pass: layers' products, attention, output layer.

    Two a weight and token, 2 m M; 4 a for each pair of query and key in each layer, the pairs that
    a kernel is given, causal or not; 2 V h for each response token.
    """
    return (
        2.0 * model.multiplied * rows.tokens,
        4.0 * model.layers * model.attention * rows.attended,
        2.0 * model.vocabulary * model.hidden * rows.predictors,
    )


def update_flops(model: Architecture, work: Workload, rows: Pass, *, again: bool) -> float:
    """Operations of forward and backward pass over some rows.

    Args:
        again: the pass is computed anew in the backward pass, as all but an update's last are.
    """
    linear, attention, output = forward_flops(model, rows)
    forwards = 1.0 + again + work.gradient_checkpointing
    # of a layer that is computed again the last product is left out: nothing needs it
    left_out = 2.0 * model.layers * model.feed_forward * model.hidden * rows.tokens
    linear_forward = forwards * linear - work.gradient_checkpointing * left_out
    # logits are made again in the backward pass, unless one chunk holds them all
    chunks = rows.predictors * 4 * model.vocabulary > work.logit_chunk_mb * 1e6
    output_forward = (1.0 + again + chunks) * output
    if work.lora:  # weights that are frozen have no gradient; an adapter's are few
        adapter = 2.0 * model.trainable * rows.tokens
        total = linear_forward + linear + (forwards + LINEAR_BACKWARD) * adapter
        total += output_forward + output
    else:
        total = linear_forward + output_forward + LINEAR_BACKWARD * (linear + output)
    return total + (forwards + ATTENTION_BACKWARD) * attention


def _rollout(model: Architecture, work: Workload, speeds: Speeds) -> list[Cost]:
    engine, ranks = work.engine, work.engine.tensor_parallel
    p, L, n = work.longest_prompt, work.longest_response, work.samples_per_prompt
    groups: float = work.groups_per_refill * ranks  # an engine takes the prompts of all its ranks
    if engine.engines is not None:
        groups = work.groups_per_refill * work.spread.devices / engine.engines
    size = BYTES[engine.dtype]
    peak = (speeds.flops_16 if size == 2 else speeds.flops_32) * speeds.compute_share
    linear, attention, _ = forward_flops(model, Pass(p, 0, 0, p * p))
    prompts = groups * (linear + attention) / ranks

    responses = groups * n
    running = float(min(responses, engine.sequences))
    room = engine_room(model, work)
    if room is not None:  # responses of a prompt share its keys and values
        running = max(min(running, room / (L + p / n)), 1.0)
    steps = responses / running * L
    context = p + L / 2
    read = engine_weights(model, work) - model.vocabulary * model.hidden * size  # no embedding
    read_all = (read + running * context * cache_bytes(model, work)) / ranks
    operations = running * (
        2.0 * (model.multiplied + model.vocabulary * model.hidden)
        + 4.0 * model.layers * model.attention * context
    )
    step = max(
        read_all / (speeds.memory * speeds.memory_share),
        operations / ranks / peak,
        speeds.decode_step_s,
    )
    costs = [
        Cost("rollout: prompts", prompts / peak, amount(prompts, "FLOP")),
        Cost("rollout: decoding", steps * step,
             f"{short(steps)} steps of {running:.0f} sequences, {1000 * step:.1f} ms: "
             f"{amount(read_all, 'B')} read"),
    ]  # fmt: skip
    if ranks > 1:
        crossing = running * steps + groups * p  # tokens that cross between the ranks
        sent = _ring(ranks) * 2 * model.layers * crossing * model.hidden * size
        link = _link(work, speeds, ranks)
        costs.append(Cost("rollout: between ranks", sent / link, f"{amount(sent, 'B')} sent"))
    return costs


def _score(model: Architecture, work: Workload, speeds: Speeds) -> list[Cost]:
    passes = work.passes(work.groups_per_refill) * work.scorings
    rows = work.passed(work.rows_per_refill)
    operations = work.scorings * sum(forward_flops(model, rows))
    costs = [
        Cost("score", operations / _peak(work, speeds),
             f"{amount(operations, 'FLOP')}, {work.scorings} x the refill")
    ]  # fmt: skip
    return costs + _gathers(model, work, speeds, "score", passes)


def _update(model: Architecture, work: Workload, speeds: Speeds) -> list[Cost]:
    spread, updates = work.spread, work.updates_per_refill
    passes = work.passes_per_update
    every = work.rows_per_update
    last = min(work.rows_per_pass, every)  # the only one that is not computed again
    once = update_flops(model, work, work.passed(last), again=False)
    again = update_flops(model, work, work.passed(every), again=True) * (1 - last / every)
    operations = updates * (once + again)
    how = f"{amount(operations, 'FLOP')}, {updates} updates of {passes} passes"
    costs = [Cost("update", operations / _peak(work, speeds), how)]
    if spread.shards > 1:
        # each forward pass gathers the weights, those made again too, and each backward pass
        costs += _gathers(model, work, speeds, "update", updates * (3 * passes - 1))
    if spread.devices > 1:
        each = 4 if work.lora else BYTES[work.dtype]
        sent = updates * model.trainable * each * _ring(spread.devices)
        what = "gradients"
        if spread.shards > 1:  # reduced and scattered after each pass, not gathered again
            sent *= passes / 2
            what = "gradients, a part each"
        costs.append(Cost("update: between devices", sent / _link(work, speeds, spread.devices),
                          f"{amount(sent, 'B')} of {what}"))  # fmt: skip
    return costs


def _gathers(
    model: Architecture, work: Workload, speeds: Speeds, phase: str, passes: int
) -> list[Cost]:
    """Weights that are divided among devices, brought together once a pass."""
    shards = work.spread.shards
    if shards == 1:
        return []
    sent = passes * model.parameters * BYTES[work.dtype] * (shards - 1) / shards
    link = _link(work, speeds, shards)
    return [Cost(f"{phase}: weights gathered", sent / link, f"{amount(sent, 'B')}, {passes} times")]


def _sync(model: Architecture, work: Workload, speeds: Speeds) -> Cost:
    """Weights from the trainer to the engine."""
    size, shards = BYTES[work.dtype], work.spread.shards
    whole = model.parameters * size
    copied = whole + engine_weights(model, work) / work.engine.tensor_parallel
    seconds = copied / (speeds.memory * speeds.memory_share)
    how = f"{amount(copied, 'B')} read and written"
    if shards > 1:
        sent = whole * (shards - 1) / shards
        seconds += sent / _link(work, speeds, shards)
        how += f", {amount(sent, 'B')} gathered"
    if work.engine.engines is not None:
        seconds += whole / (speeds.network * speeds.link_share)
        how += f", {amount(whole, 'B')} sent"
    return Cost("sync", seconds, how)


def _peak(work: Workload, speeds: Speeds) -> float:
    peak = speeds.flops_16 if compute_size(work) == 2 else speeds.flops_32
    return peak * speeds.compute_share


def _link(work: Workload, speeds: Speeds, devices: int) -> float:
    """Bytes a second between so many neighbouring devices; the slowest link counts."""
    inside = devices <= work.spread.per_machine
    return (speeds.link if inside else speeds.network) * speeds.link_share


def _ring(devices: int) -> float:
    """Bytes that a device sends in an all-reduce, for each byte that is reduced."""
    return 2 * (devices - 1) / devices
