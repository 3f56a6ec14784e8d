"""The command line: every command, its output, and one line and exit status 2 for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from gyrokv import FORMATS, __version__, cli
from gyrokv.cli.app import app
from gyrokv.cli.generate import detokenize

TEXT = "for line in lines:\n    print(line, 'naïve café – żółć 漢字 🎉')\n" * 60
PAIRS = "q8_0/q8_0,turbo3/turbo3,q8_0/turbo4"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A random Qwen2 with head_dim 64 and a byte-level BPE without multi-byte characters, so text has split ones."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEXT.encode("ascii", "ignore").decode()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, "utf-8")
    return str(path)


def run(*arguments, status=0):
    """The result of ``gyrokv`` with these arguments."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def fails(*arguments):
    """The one line on stderr with which ``gyrokv`` refuses these arguments."""
    result = run(*arguments, status=2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gyrokv: error: "), result.stderr
    return lines[0]


def test_version():
    assert run("--version").stdout == f"gyrokv {__version__}\n"


def test_help_lists_every_command():
    assert {"compare", "ppl", "generate", "formats", "explain", "env"} <= set(re.findall(r"\w+", run("--help").stdout))


# -- env, formats, explain


def test_env_shows_versions_backends_and_the_self_test():
    out = run("env").stdout
    assert __version__ in out and torch.__version__ in out and "torch on cpu: passed" in out
    record = json.loads(run("env", "--json").stdout)
    assert record["self_test"]["passed"] and record["backends"]["torch"] == [] and record["cpu"]


def test_env_fails_with_its_self_test(monkeypatch):
    from gyrokv import env

    monkeypatch.setattr(env, "ERROR_LIMIT", 0.0)
    assert "FAILED" in run("env", status=1).stdout
    assert not json.loads(run("env", "--json", status=1).stdout)["self_test"]["passed"]


@pytest.mark.parametrize("head_dim", [128, 96])
def test_formats_shows_every_row(head_dim):
    record = json.loads(run("formats", "--head-dim", head_dim, "--json").stdout)
    assert [row["name"] for row in record["formats"]] == list(FORMATS)
    for row in record["formats"]:
        if not row["unsupported"]:
            assert row["bytes_per_head"] == FORMATS[row["name"]].bytes_per_head(head_dim)
            assert row["sqnr_db"] is None or row["sqnr_db"] > 8


def test_formats_prints_a_table():
    out = run("formats").stdout
    assert all(name in out for name in FORMATS) and "N(0, 1)" in out and "8.500" in out
    assert "tq8.v1: head_dim=576" in run("formats", "--head-dim", 576).stdout


def test_formats_refuses_a_head_without_values():
    assert "--head-dim 0 must be at least 1" in fails("formats", "--head-dim", 0)


def test_explain_names_the_backend():
    out = run("explain", "q8_0/turbo4", "--head-dim", 128, "--window", 64, "--sinks", "--softcap", 30).stdout
    for text in ("can run (chosen)", "torch: can run", "window=64", "sinks", "softcap=30"):
        assert text in out


def test_explain_covers_every_part_of_a_config():
    out = run("explain", "k=turbo3,v=turbo4;first2:q8_0;last1:v=f16", "--head-dim", 128).stdout
    assert [line.split("-")[0] for line in out.splitlines() if line.startswith("problem")] == [
        "problem: turbo3.turbo4", "problem: q8_0.q8_0", "problem: turbo3.f16",
    ]  # fmt: skip


def test_explain_exits_1_when_nothing_can_run():
    out = run("explain", "q8_0", "--head-dim", 128, "--dtype", "float64", status=1).stdout
    assert "torch: cannot run because" in out and "never chosen" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q9", "--head-dim", 128], "unknown format 'q9'; formats are f32, f16"),
        (["q8_0", "--head-dim", 100], "head_dim=100 is not supported"),
        (["q8_0", "--head-dim", 128, "--heads", "32"], "--heads '32' must be"),
        (["q8_0", "--head-dim", 128, "--heads", "6/4"], "q_heads=6 is not a multiple"),
        (["q8_0", "--head-dim", 128, "--dtype", "int8"], "--dtype 'int8' is not one of bfloat16"),
        (["q8_0", "--head-dim", 128, "--window", 0], "window=0"),
        (["q8_0;third:q4_0", "--head-dim", 128], "'third' selects no layers"),
        (["q8_0"], "--head-dim"),
    ],
)
def test_explain_refuses(arguments, message):
    assert message in fails("explain", *arguments)


# -- generate


FORMS = (
    ["-ctk", "q8_0", "-ctv", "turbo4"], ["-ctk=q8_0", "-ctv=turbo4"], ["--cache-type-k", "q8_0", "--cache-type-v=turbo4"],
    ["--cache", "k=q8_0,v=turbo4"],
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_the_cache_types(model, form):
    result = run("generate", "-m", model, "-p", "for line", "-n", 4, *form)
    assert "cache: q8_0/turbo4," in result.stderr and "0 fallbacks" in result.stderr


def test_generate_gives_the_same_text_as_transformers(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer("for line", return_tensors="pt").input_ids
    wanted = tokenizer.decode(plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :])
    result = run("generate", "-m", model, "-p", "for line", "-n", 24, "-ctk", "f32", "-ctv", "f32")
    assert result.stdout == wanted.replace("<|end|>", "") + "\n"
    assert re.search(r"generated: \d+ tokens, [\d.]+ tokens/s", result.stderr)


def test_generate_reads_a_prompt_file_and_samples_by_seed(model, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("for line", "utf-8")
    first, again, other = (run("generate", "-m", model, "-f", prompt, "-n", 16, "--temp", 1, "-s", s) for s in (1, 1, 2))
    assert first.stdout == again.stdout != other.stdout
    assert "cache: f16/f16," in first.stderr and "1.00x" in first.stderr


def test_detokenize_holds_back_partial_characters(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "print('naïve – 漢字 🎉')"
    pieces = list(detokenize(tokenizer, iter(tokenizer(text).input_ids)))
    assert "".join(pieces) == text and len(pieces) > 10 and not any("\ufffd" in piece for piece in pieces)
    cut = tokenizer("🎉").input_ids[:-1]
    assert "".join(detokenize(tokenizer, iter(cut))) == "\ufffd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "for", "-ctk", "q9"], "-ctk: unknown format 'q9'; formats are f32, f16"),
        (["-p", "for", "-ctv", "q9"], "-ctv: unknown format 'q9'"),
        (["-p", "for", "--cache", "k=q9"], "--cache: unknown format 'q9'"),
        (["-p", "for", "--cache", "q8_0", "-ctk", "q8_0"], "--cache and -ctk/-ctv exclude each other"),
        (["-p", "for line in lines", "-n", 20, "-c", 10], "-c 10 is less than the"),
        (["-p", "for", "-n", 200], "exceeds the model's 128 positions"),
        (["-p", "for", "-n", 0], "-n 0 must be at least 1"),
        (["-p", "for", "--temp", -1], "--temp -1.0 must be at least 0"),
        (["-p", ""], "the prompt is empty"),
        ([], "either -p or -f"),
        (["-f", "nowhere.txt"], "-f nowhere.txt"),
        (["-p", "for", "--dtype", "int8"], "--dtype 'int8' is not one of auto"),
        (["-p", "for", "--device", "abacus"], "--device 'abacus' is not available here"),
        (["-p", "for", "-n", "many"], "-n"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_generate_refuses(model, arguments, message):
    assert message in fails("generate", "-m", model, *arguments)


@pytest.mark.parametrize(("name", "message"), [("nowhere/model", "is no directory"), (".", "has no config.json")])
def test_a_model_that_is_not_there_is_not_looked_for_elsewhere(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails("generate", "-m", name, "-p", "for")


def test_a_hub_name_respects_offline_mode(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "gyrokv", "generate", "-m", "hf:no-such-owner/no-such-model", "-p", "for"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("gyrokv: error: -m hf:no-such-owner/no-such-model")
    assert len(done.stderr.splitlines()) == 1


# -- ppl, compare


def test_ppl_prints_running_values_and_the_final_estimate(model, text):
    result = run("ppl", "-m", model, "-f", text, "-c", 32, "--chunks", 3, "-ctk", "q8_0", "-ctv", "turbo4")
    running, final = result.stdout.splitlines()
    values = re.fullmatch(r"\[1\][\d.]+,\[2\][\d.]+,\[3\]([\d.]+),", running)
    assert re.fullmatch(rf"Final estimate: PPL = {values[1]} \+/- [\d.]+", final)
    assert "cache q8_0/turbo4" in result.stderr and "45 tokens scored in 3 windows of 32" in result.stderr


@pytest.fixture(scope="session")
def compared(model, text, tmp_path_factory):
    """The files that one comparison on two models wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("report")
    outputs = [folder / name for name in ("out.json", "out.png", "out.html")]
    options = [x for pair in zip(("--json", "--plot", "--html"), outputs) for x in pair]
    result = run(
        "compare", "-m", model, "-m", model, "-f", text, "-c", 32, "--chunks", 2, "--pairs", PAIRS,
        "--cache", "turbo4;first1:q8_0", "--decode", 2, *options,
    )  # fmt: skip
    return result, *outputs


def test_compare_prints_a_row_for_every_pair(compared):
    out = compared[0].stdout
    for name in ("f16/f16", *PAIRS.split(","), "turbo4/turbo4; first1: q8_0/q8_0"):
        assert out.count(name) >= 2, out
    assert "bytes/token" in out and "2 disjoint windows of 32 tokens" in out and "fallbacks" not in out


def test_compare_writes_json(compared):
    record = json.loads(compared[1].read_text("utf-8"))
    assert record["command"].startswith("gyrokv") and record["environment"]["packages"]["torch"]
    assert len(record["models"]) == 2
    for entry in record["models"]:
        assert [row["label"] for row in entry["rows"]][1:4] == PAIRS.split(",")
        assert entry["text"]["sha256"] and entry["settings"]["window"] == 32 and entry["seconds"] > 0
        assert all(row["kl_mean"] > 0 and row["estimate"]["ppl"] > 1 for row in entry["rows"][1:])


def test_compare_writes_a_picture(compared, model, text, tmp_path):
    assert compared[2].read_bytes().startswith(b"\x89PNG") and compared[2].stat().st_size > 10_000
    svg = tmp_path / "out.svg"
    run("compare", "-m", model, "-f", text, "-c", 16, "--chunks", 1, "--pairs", "q8_0", "--decode", 0, "--plot", svg)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_page_holds_everything_itself(compared):
    page = compared[3].read_text("utf-8")
    assert "://" not in page and "<script" not in page and "@import" not in page and "url(" not in page.replace("url(#", "")
    assert page.count("<svg") == page.count("</svg>") == 2
    for name in (*PAIRS.split(","), "f16/f16", "turbo4/turbo4; first1: q8_0/q8_0"):
        assert page.count(name) >= 2
    for fact in (__version__, torch.__version__, "prefers-color-scheme: dark", "width=device-width", "SHA-256"):
        assert fact in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_the_page_escapes_what_users_name(compared):
    from gyrokv.page import page

    record = json.loads(compared[1].read_text("utf-8"))
    record["command"] = "gyrokv compare -f '<script>alert(1)</script>'"
    record["models"][0]["text"]["path"] = record["models"][0]["model"]["path"] = "<b>&"
    assert "<script" not in page(record) and "<b>" not in page(record)


def test_compare_takes_the_usual_pairs_and_any_baseline(model, text):
    out = run("compare", "-m", model, "-f", text, "-c", 16, "--chunks", 1, "--decode", 0, "--baseline", "f32").stdout
    assert "f32/f32" in out and "turbo2/turbo2" in out and "tq6/tq5" in out and "decode t/s" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "q8_0/q9"], "--pairs: unknown format 'q9'; formats are f32"),
        (["--pairs", "q8_0,q8_0/q8_0"], "q8_0/q8_0 is given twice"),
        (["--baseline", "x"], "--baseline: unknown format 'x'"),
        (["-c", 4], "-c 4 must be at least 8"),
        (["-c", 500], "-c 500 exceeds the model's 128 positions"),
        (["--chunks", 0], "--chunks 0 must be at least 1"),
        (["--chunks", 5000], "5000 are needed"),
        (["-b", 0], "-b 0 must be at least 1"),
        (["--decode", 64], "--decode 64 must be between 0 and 63"),
        (["--plot", "x.gif"], "--plot x.gif must end in .png or .svg"),
        (["--html", "nowhere/x.html"], "--html nowhere/x.html: there is no directory nowhere"),
        (["--json", "."], "--json . is a directory"),
    ],
)
def test_compare_refuses(model, text, arguments, message):
    assert message in fails("compare", "-m", model, "-f", text, "-c", 64, *arguments)


def test_compare_stops_when_nothing_was_quantised(model, text):
    options = ("-c", 32, "--chunks", 1, "--pairs", "q8_0", "--cache", "q8_0,recent=32", "--baseline", "f32")
    result = run("compare", "-m", model, "-f", text, *options, status=2)
    assert re.fullmatch(r"gyrokv: error: .*nothing was quantised", result.stderr.splitlines()[-1])


def test_a_model_with_other_head_sizes_is_refused(model, text, tmp_path):
    shutil.copytree(model, tmp_path / "odd")
    config = Qwen2Config.from_pretrained(model, hidden_size=100)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "odd")
    message = f"-m {tmp_path / 'odd'}: head_dim=50 is not supported; head sizes are (32, 40"
    assert message in fails("ppl", "-m", tmp_path / "odd", "-f", text, "-c", 32)
    assert message in fails("compare", "-m", tmp_path / "odd", "-f", text, "-c", 32)
    assert message in fails("generate", "-m", tmp_path / "odd", "-p", "for", "-n", 4)


def test_texts_that_cannot_be_read(model, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1") * 100)
    assert f"-f {latin} is not UTF-8" in fails("ppl", "-m", model, "-f", latin)
    assert "-f nowhere.txt" in fails("ppl", "-m", model, "-f", "nowhere.txt")
    short = tmp_path / "short.txt"
    short.write_text("for", "utf-8")
    assert "0 windows of 32; 1 are needed" in fails("ppl", "-m", model, "-f", short, "-c", 32)


# -- the command itself


def test_a_command_that_does_not_exist():
    assert "No such command 'pp'" in fails("pp")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_command_says_what_to_install(package, monkeypatch, capsys):
    original = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else original(name))
    assert cli.main(["formats"]) == 2
    assert capsys.readouterr().err == f'gyrokv: the command line needs {package}: pip install "gyrokv[cli]"\n'


def test_without_matplotlib_compare_stops_before_it_starts(model, text, monkeypatch):
    from gyrokv.cli import loading

    original = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else original(n))
    assert 'needs matplotlib: pip install "gyrokv[eval]"' in fails("compare", "-m", model, "-f", text, "--plot", "x.png")


@pytest.mark.parametrize("arguments", [["--version"], ["explain", "q8_0", "--head-dim", "100"]])
def test_python_m_gyrokv_is_the_command(arguments):
    done = subprocess.run([sys.executable, "-m", "gyrokv", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if arguments == ["--version"] else 2)
    assert "Traceback" not in done.stderr


def test_the_library_does_not_import_the_command_line_s_packages():
    names = {"typer", "rich", "matplotlib", "transformers"}
    code = f"import sys, gyrokv.evaluate, gyrokv.page; sys.exit(bool({names} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
