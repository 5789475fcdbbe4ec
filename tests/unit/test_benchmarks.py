"""What the benchmark counts, imposes and prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import run, tables
from benchmarks.bound import CHUNK_ROWS, Dense, negative_log_prob, score_and_updates
from benchmarks.comparing import take_turns
from benchmarks.gpu import model_flops, utilisation
from benchmarks.growth import START, VALUES, plot, workloads
from benchmarks.imposed import EndsAt, ImposedLengths
from benchmarks.models import EOS, SHAPES, Shape, shape_of, text_of, write_model
from benchmarks.sampler import StaticSampler
from benchmarks.workloads import FIRST_WORD, Workload, suite
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Workload("tiny", "tiny", "ragged", prompts=3, rollouts=4, updates=1, prompt_mean=5,
                prompt_range=(2, 9), response_mean=6, response_range=(2, 12))  # fmt: skip
VOCABULARY = SHAPES["tiny"].vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(SHAPES["tiny"], tmp_path_factory.mktemp("model") / "tiny")


# --- workloads -----------------------------------------------------------------------------------


def test_a_workload_survives_json_and_gives_the_same_work() -> None:
    again = Workload(**json.loads(json.dumps(asdict(TINY))))
    assert again.lengths_by_prompt(VOCABULARY) == TINY.lengths_by_prompt(VOCABULARY)


@pytest.mark.parametrize("workload", suite(["0.8M"], ["equal", "ragged"]), ids=lambda w: w.lengths)
def test_a_workload_has_the_lengths_that_it_says(workload: Workload) -> None:
    groups = workload.response_lengths()
    lengths = [length for group in groups for length in group]
    assert [len(group) for group in groups] == [16] * 8
    assert len(set(workload.prompt_ids(512))) == 8
    if workload.lengths == "equal":
        assert set(lengths) == {64}
        return
    assert 4 <= min(lengths) < 24
    assert 180 < max(lengths) <= 256
    assert 56 < sum(lengths) / len(lengths) < 72


def test_the_text_of_a_prompt_is_read_back_as_its_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for ids in TINY.prompt_ids(VOCABULARY):
        assert tuple(tokenizer(text_of(ids))["input_ids"]) == ids
        assert tuple(tokenizer(text_of(ids) + "\n")["input_ids"]) == ids  # as our `plain` route


# --- lengths, imposed ----------------------------------------------------------------------------


def test_lengths_are_dealt_by_prompt_in_any_order_and_anew_each_refill() -> None:
    imposed = ImposedLengths({(1,): [5, 6], (2,): [7, 8]})
    assert [imposed.next((p,)) for p in (1, 2, 2, 1)] == [5, 7, 8, 6]
    assert imposed.next((9,)) is None
    imposed.restart(at_most=6)
    assert [imposed.next((p,)) for p in (2, 1)] == [6, 5]


def test_a_row_ends_at_its_length_and_not_before() -> None:
    ends = EndsAt(torch.tensor([1, 2]), EOS, prompt_width=3)
    first = ends(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 5)).argmax(-1)
    assert first[0] == EOS
    assert first[1] != EOS
    second = ends(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 5))
    assert second[1].isfinite().nonzero().flatten().tolist() == [EOS]


def test_generate_gives_every_response_its_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation import GenerationMixin

    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)  # restored after
    wanted = TINY.lengths_by_prompt(VOCABULARY)
    ImposedLengths(wanted).install_in_transformers(EOS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [prompt for prompt in wanted for _ in range(TINY.rollouts)]
    width = max(map(len, rows))
    ids = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
    keep = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = model.generate(
        ids, attention_mask=keep, do_sample=True, top_k=0, max_new_tokens=TINY.max_new_tokens
    )[:, width:]
    lengths = [(row == EOS).nonzero()[0, 0].item() + 1 for row in made]
    assert lengths == [length for group in wanted.values() for length in group]


# --- the bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["equal", "ragged"])
def test_the_bound_runs_over_exactly_the_useful_tokens(kind: Any) -> None:
    (workload,) = suite(["0.8M"], [kind])
    useful = sum(workload.prompt_lengths()) + sum(map(sum, workload.response_lengths()))
    whole, updates = score_and_updates(workload)
    assert whole.tokens == pytest.approx(useful, rel=2e-3)
    assert sum(u.tokens for u in updates) == pytest.approx(useful, rel=4e-3)
    assert whole.response_tokens == workload.response_tokens
    assert sum(u.response_tokens for u in updates) == pytest.approx(
        workload.response_tokens, abs=workload.updates
    )


@pytest.mark.parametrize("budget", [1, 100, 1000, 10**6])
def test_passes_of_the_bound_lose_no_token(budget: int) -> None:
    whole = Dense(rows=101, length=17, response_tokens=1200)
    parts = whole.parts(budget)
    assert sum(p.rows for p in parts) == 101
    assert sum(p.response_tokens for p in parts) == 1200
    assert all(p.tokens <= max(budget, 17) for p in parts)
    assert all(p.response_tokens <= p.tokens for p in parts)


def test_the_bounds_log_prob_is_the_models_own(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (3, 7))
    log_prob = model(ids).logits.log_softmax(-1).gather(2, ids[..., None]).flatten()[:10]
    found = negative_log_prob(model, Dense(3, 7, 10), ids)
    assert found.item() == pytest.approx(-log_prob.sum().item(), rel=1e-9)
    assert CHUNK_ROWS > 0


def test_the_bounds_sampler_samples_from_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy in place of random, its tokens are those of plain forward passes without a cache."""
    monkeypatch.setattr("benchmarks.sampler.draw", lambda logits: logits.argmax(-1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.lm_head.weight.data.normal_()  # the random weights alone would repeat one token
    prompts, lengths = TINY.prompt_ids(VOCABULARY), TINY.response_lengths()
    tokens, sampled = StaticSampler(model, prompts, lengths)()
    assert sampled == TINY.response_tokens
    rows = [(p, n) for p, group in enumerate(lengths) for n in group]
    rows.sort(key=lambda row: -row[1])
    for row, (prompt, length) in zip(tokens, rows, strict=True):
        ids = list(prompts[prompt])
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row[:length].tolist() == ids[len(prompts[prompt]) :]


# --- FLOPs ---------------------------------------------------------------------------------------


def test_parameters_are_counted_as_the_model_has_them(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == SHAPES["tiny"].parameters


def test_sizes_are_what_the_names_say() -> None:
    sizes = {name: shape.parameters / 1e6 for name, shape in SHAPES.items()}
    assert sizes["0.8M"] == pytest.approx(0.8, rel=0.1)
    assert sizes["25M"] == pytest.approx(25, rel=0.1)
    assert sizes["0.5B"] == pytest.approx(494, rel=0.01)
    assert sizes["1.5B"] == pytest.approx(1544, rel=0.01)
    assert shape_of("0.8M@32768").vocabulary == 32_768


def test_flops_of_a_forward_pass_are_those_of_a_count_by_hand() -> None:
    """One layer, hidden 4, 2 heads of 2, 1 key-value head, MLP 6, vocabulary 10; 3 tokens."""
    shape = Shape(hidden=4, layers=1, heads=2, kv_heads=1, mlp=6, vocabulary=10)
    q, k, v, o = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    per_token = 2 * (q + k + v + o + 3 * 4 * 6)
    pairs = 1 + 2 + 3  # the n-th token sees n
    attention = pairs * 2 * (2 + 2) * 2  # a score and a value of 2 numbers each, for 2 heads
    logits = 2 * 2 * 4 * 10  # at two tokens
    assert shape.forward_flops(3, 2, pairs) == 3 * per_token + attention + logits


def test_flops_agree_with_torchs_own_counter(folder: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(VOCABULARY, (2, 5)))
    # it counts all 5 x 5 pairs, those that the mask leaves out as well
    assert counter.get_total_flops() == pytest.approx(
        SHAPES["tiny"].forward_flops(10, 10, 2 * 25), rel=0.02
    )


def test_attended_pairs_are_those_of_sequences_that_share_their_prompt() -> None:
    pairs = 0
    for prompt, group in zip(TINY.prompt_lengths(), TINY.response_lengths(), strict=True):
        pairs += sum(range(1, prompt + 1))
        pairs += sum(sum(range(prompt + 1, prompt + length + 1)) for length in group)
    assert TINY.attended_pairs == pairs


def test_utilisation_is_a_share_of_the_peak() -> None:
    flops = model_flops(SHAPES["tiny"], TINY)
    assert flops["update"] == 3 * flops["score"]
    assert utilisation(5e12, 2.0, 10.0) == pytest.approx(0.25)
    assert utilisation(5e12, 2.0, None) is None


# --- tables and the runner -----------------------------------------------------------------------


def refills(wall: float, score: float, update: float) -> dict[str, Any]:
    phases = {"rollout": 1.0, "score": score, "update": update, "sync": 0.0}
    return {"refills": [{"wall_s": wall, "cpu_s": wall, "phases": phases}] * 3, "peak_mb": 1500.4}


def stored() -> dict[str, Any]:
    contenders = {
        "ours-vllm": refills(4.0, 1.0, 1.5),
        "trl-vllm": refills(10.0, 3.0, 5.0),
        "trl-own": {"error": "it ended too soon:\nno room"},
        "bound": refills(3.0, 0.5, 1.5),
    }
    tokens = {"response": 8000, "useful": 9000}
    entry = {"workload": {"name": "0.8M ragged"}, "tokens": tokens, "contenders": contenders}
    return {"workloads": [entry]}


def cells(markdown: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_the_table_of_a_stored_record_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(stored()))
    assert run.main(["--table", str(path)]) == 0
    head, _, *rows = cells(capsys.readouterr().out.strip())
    by_name = {row[1]: dict(zip(head, row, strict=True)) for row in rows}
    ours = by_name["ours, vLLM"]
    assert ours["Tokens/s"] == "2,000"
    assert ours["Times TRL"] == "2.50"
    assert ours["(Score + update) / bound"] == "1.25"
    assert ours["Between s"] == "0.50"
    assert ours["Peak MB"] == "1,500"
    assert by_name["TRL, `generate`"]["Tokens/s"] == "failed: no room"
    assert by_name["the bound"]["(Score + update) / bound"] == ""


def test_medians_are_not_moved_by_one_slow_refill() -> None:
    three = refills(4.0, 1.0, 1.5)["refills"]
    slow = {**three[0], "wall_s": 400.0, "phases": {**three[0]["phases"], "score": 300.0}}
    assert tables.medians_of([*three, slow])["wall"] == 4.0
    assert tables.medians_of([*three, slow])["score"] == 1.0


def test_the_gpu_suite_is_refused_in_a_line_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "gpu"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs a GPU" in said[0]


def test_contenders_whose_package_is_missing_are_left_out_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "trl" else object())
    assert run.available(["ours-vllm", "trl-vllm", "trl-own", "bound"]) == ["ours-vllm", "bound"]
    assert "trl is not installed" in capsys.readouterr().out


def test_growth_changes_one_thing_at_a_time(tmp_path: Path) -> None:
    found = list(workloads(START, quick=False))
    assert Counter(factor for factor, _, _ in found) == dict.fromkeys(VALUES, 4)
    by_value = {(factor, value): w for factor, value, w in found}
    assert by_value["vocabulary", 8192].shape == "0.8M@8192"
    assert by_value["prompts", 32].trajectories == 32 * START.rollouts
    assert by_value["response_mean", 128].response_tokens > 1.5 * START.response_tokens
    points = [
        {"factor": "prompts", "value": v, "tokens_per_s": 10.0, "peak_mb": 5.0} for v in (4, 8)
    ]
    plot({"points": points}, "prompts", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


# --- whole runs ----------------------------------------------------------------------------------


def turns(names: Sequence[tuple[str, str]], folder: Path, tmp_path: Path) -> dict[str, Any]:
    settings = {"workload": asdict(TINY), "model": str(folder), "threads": 1, "overrides": []}
    contenders = {"-".join(name): name for name in names}
    return take_turns(contenders, settings, tmp_path, refills=1, step=lambda _: None)


@pytest.mark.slow
def test_ours_and_the_bound_do_the_whole_workload(folder: Path, tmp_path: Path) -> None:
    """The real training, in processes of their own."""
    names = [("benchmarks.ours", "vllm"), ("benchmarks.ours", "hf"), ("benchmarks.bound", "none")]
    found = turns(names, folder, tmp_path)
    for name, contender in found.items():
        assert "error" not in contender, contender
        (refill,) = contender["refills"]
        assert refill["tokens_so_far"] >= TINY.response_tokens, name
        inside = sum(refill["phases"].values())
        assert 0.3 * refill["wall_s"] < inside <= refill["wall_s"], (name, refill)
        assert contender["peak_mb"] > 100


@pytest.mark.slow
def test_the_gpu_suite_works_up_to_the_device(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--suite", "gpu", "--device", "cpu", "--shapes", "tiny", "--refills", "1"]
    assert run.main([*arguments, "--threads", "1", "--peak-tflops", "0.1", "--out", str(out)]) == 0
    (entry,) = json.loads(out.read_text())["models"]
    assert 0 < entry["update_mfu"] < 1


def test_the_readme_quotes_the_stored_record() -> None:
    record = json.loads((run.RESULTS / "cpu_0.8M.json").read_text())
    times = {}
    for entry in record["workloads"]:
        medians = {n: tables.medians_of(c["refills"]) for n, c in entry["contenders"].items()}
        times[entry["workload"]["name"]] = float(tables.times_rival("ours-vllm", medians))
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    ragged, equal = times["0.8M ragged"], times["0.8M equal"]
    quoted = f"{ragged:.1f} times the tokens/s on ragged lengths, {equal:.1f} times on equal"
    assert quoted in readme


def test_a_run_without_any_contender_leaves_old_results_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    out = tmp_path / "cpu.json"
    out.write_text("old")
    assert run.main(["--contenders", "trl-own", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "error: no contender is left that can run here\n"
    assert out.read_text() == "old"
