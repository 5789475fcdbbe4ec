"""What counts as a secret, and that it is nowhere where text goes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from powerflow_lit import run_folder
from powerflow_lit.config.checks import as_dict, train_config
from powerflow_lit.config.secrets import HidingStream, hidden, secrets_of
from powerflow_lit.continuing import expand_resume
from tests.unit.test_config import composed

VALUE = "marker-0123456789"


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_TOKEN_PATH", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "NPM_TOKENS", "hf_token"),
        *("WANDB_API_KEY", "OPENAI_API_KEY", "MYAPIKEY", "KEY"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "GIT_CREDENTIALS"),
    ],
)
def test_a_variable_that_is_named_like_a_secret_holds_one(name: str) -> None:
    assert secrets_of({name: VALUE}) == {VALUE: f"${{oc.env:{name}}}"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEYBOARD", "us-international"),
        ("SSH_AUTH_SOCK", "/tmp/agent.1234"),
        ("OPENAI_API_KEY_PATH", "/home/me/openai.key"),
        ("WANDB_API_KEY_FILE", "/home/me/wandb.key"),
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("MONKEY", "capuchin-monkey"),
        ("HF_TOKEN", "short"),
        ("HF_TOKEN", ""),
        ("PATH", "/usr/bin:/bin"),
    ],
)
def test_what_only_sounds_like_a_secret_is_left_alone(name: str, value: str) -> None:
    assert secrets_of({name: value}) == {}


def test_a_value_within_another_does_not_spoil_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_TOKEN", VALUE + "-and-more")
    text = f"{VALUE}-and-more, {VALUE}"
    assert hidden(text) == "${oc.env:B_TOKEN}, ${oc.env:A_TOKEN}"
    assert hidden({"a": [text, 1, None], VALUE: (2.0,)}) == {
        "a": [hidden(text), 1, None],
        "${oc.env:A_TOKEN}": [2.0],
    }


def test_stored_logins_are_hidden_too(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password netrc-password\n")
    token = tmp_path / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_stored_token\n")
    assert hidden("netrc-password hf_stored_token") == "*** ***"


def test_a_resumed_run_reads_the_secret_from_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed by its name or in full: the run has the value, its files have the name."""
    monkeypatch.setenv("HF_TOKEN", VALUE)
    typed = ["logger.tags=['${oc.env:HF_TOKEN}']", f"model.revision=x-{VALUE}", "alpha=2"]
    config = train_config(composed(*typed))
    assert config.logger.tags == [VALUE]
    run_folder.write_configs(tmp_path, as_dict(config), typed)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["logger"]["tags"] == ["${oc.env:HF_TOKEN}"]
    assert saved["model"]["revision"] == "x-${oc.env:HF_TOKEN}"
    assert VALUE not in (tmp_path / "overrides.yaml").read_text()
    monkeypatch.setenv("HF_TOKEN", "another-0123456789")
    again = train_config(composed(*expand_resume([f"resume={tmp_path}"])))
    assert again.logger.tags == ["another-0123456789"]
    assert again.model.revision == "x-another-0123456789"


def test_a_summary_quotes_an_error_without_the_secret_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", VALUE)
    run_folder.write_summary(tmp_path, {"status": "failed", "error": f"alpha={VALUE} is no number"})
    error = json.loads((tmp_path / "summary.json").read_text())["error"]
    assert error == "alpha=${oc.env:OPENAI_API_KEY} is no number"


def test_who_listens_to_a_stream_hears_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B does it: `write` is replaced by a function that calls the old one and keeps a copy."""
    monkeypatch.setenv("HF_TOKEN", VALUE)
    shown, heard = io.StringIO(), []
    stream = HidingStream(shown)
    before = stream.write

    def listening(text: str) -> int:
        heard.append(text)
        return before(text)

    stream.write = listening
    print(f"token {VALUE}", file=stream)
    stream.writelines([VALUE])
    stream.write = before
    print(VALUE, file=stream)
    assert shown.getvalue() == "token ${oc.env:HF_TOKEN}\n" + "${oc.env:HF_TOKEN}" * 2 + "\n"
    assert heard == ["token ${oc.env:HF_TOKEN}", "\n", "${oc.env:HF_TOKEN}"]
