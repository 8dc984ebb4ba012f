"""README and guides: their examples run, their commands print what they show, their tables name what there is and count what is so.

In a `console` block a line `$ ringspan …` is a command, and what follows it is what it prints, with `…` for lines that are left out. The
Python blocks of one page run one after the other, as a reader would type them; a `text` block right behind one is what it prints.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

import ringspan
from ringspan import strategies, transport
from ringspan.cli.main import app
from ringspan.geometry import MASK_FORMS
from ringspan.kernels import KERNELS, Kernel, lse_gradient
from ringspan.strategies import STRATEGIES
from tests.support.pages import PAGES, README, ROOT, Block, blocks, in_order, named, rows, section

COLUMNS = 118


# ---- what a reader types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page: Path, monkeypatch: pytest.MonkeyPatch):
    # A page may register what it builds; nobody else shall find it.
    monkeypatch.setattr(strategies, "STRATEGIES", dict(STRATEGIES))
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            output = io.StringIO()
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, namespace)
            printed = output.getvalue()
        elif block.language == "text" and block.follows and printed:
            assert [line.rstrip() for line in printed.rstrip().splitlines()] == block.text.splitlines(), f"{page.name}, line {block.line}"


def commands() -> list[tuple[Block, str, list[str]]]:
    """(block, command, what is shown of its output) for each `$` line of the pages' console blocks."""
    found = []
    for block in itertools.chain.from_iterable(blocks(page) for page in PAGES):
        if block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, *shown = part.rstrip("\n").split("\n")
                found.append((block, command.split("  #")[0].strip(), shown))
    return found


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, f"{command}: {result.exception or result.output}"
    return result.output


@pytest.mark.parametrize(
    ("block", "command", "shown"),
    [pytest.param(*case, id=f"{case[0].page.stem}: {case[1]}") for case in commands() if case[1].startswith("ringspan show")],
)
def test_a_schedule_on_a_page_is_the_one_that_show_prints(
    block: Block, command: str, shown: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if "--png" in command:
        picture = shlex.split(command)[shlex.split(command).index("--png") + 1]
        assert (ROOT / picture).exists(), f"{picture} is to be drawn by: {command}"
        command = command.replace(picture, str(tmp_path / "picture.png"))
    printed = [line.rstrip() for line in run(command, monkeypatch).splitlines()]
    lost = in_order(shown, printed) if shown else None
    assert lost is None, f"{block.page.name}, line {block.line}: {command} prints no such line there: {lost!r}\n" + "\n".join(printed)


def test_verification_on_a_page_is_what_verify_prints_but_for_the_numbers(monkeypatch: pytest.MonkeyPatch):
    def shape(line: str) -> str:
        line = re.sub(r"torch \S+", "torch #", line)
        return re.sub(r"\s+", " ", re.sub(r"\d[\d.e-]*", "#", line)).strip()

    found = [case for case in commands() if case[1].startswith("ringspan verify") and case[2]]
    assert found, "no page shows what ringspan verify prints"
    for block, command, shown in found:
        printed = [shape(line) for line in run(f"{command} --device cpu", monkeypatch).splitlines()]
        lost = in_order([shape(line) for line in shown], printed)
        assert lost is None, f"{block.page.name}, line {block.line}: {command} prints no such line there: {lost!r}\n" + "\n".join(printed)


def test_a_trace_on_a_page_says_what_trace_says_but_for_the_numbers(monkeypatch: pytest.MonkeyPatch):
    def words(text: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*( (m|µ)?s\b)?", "#", text)).strip()

    found = [case for case in commands() if case[1].startswith("ringspan trace") and case[2]]
    assert found, "no page shows what ringspan trace prints"
    for block, command, shown in found:
        printed = words(run(f"{command} --device cpu", monkeypatch))
        for line in shown:
            assert line == "…" or words(line) in printed, f"{block.page.name}, line {block.line}: {command} says no such thing: {line!r}"


def test_every_command_on_a_page_has_options_that_exist():
    group = typer.main.get_command(app)
    for block, command, _ in commands():
        program, *arguments = shlex.split(command)
        if program == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), f"{block.page.name}, line {block.line}: {command}"
        for start in ("ringspan", "ringspan.cli.main"):
            if start in (program, *arguments):
                words = [program, *arguments]
                name, *rest = words[words.index(start) + 1 :]
                group.commands[name].make_context(name, rest)  # type: ignore[attr-defined]


# ---- the models that the README names ---------------------------------------------------------------------------------------------

_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}
_EXPERTS = {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
MODELS = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Qwen 2": ("Qwen2Config", _GROUPED),
    "Qwen 3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 7}),
    "Mixtral": ("MixtralConfig", _EXPERTS),
    "Gemma 2": ("Gemma2Config", _GEMMA),
    "Gemma 3": ("Gemma3TextConfig", _GEMMA),
    "gpt-oss": ("GptOssConfig", {**_EXPERTS, "head_dim": 8, "sliding_window": 7}),
    "Phi 3": ("Phi3Config", _GROUPED),
    "OLMo 2": ("Olmo2Config", _GROUPED),
    "SmolLM 3": ("SmolLM3Config", _GROUPED),
    "Granite": ("GraniteConfig", _GROUPED),
    "GPT-NeoX": ("GPTNeoXConfig", {**_SMALL, "bos_token_id": 1, "eos_token_id": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_the_readme_names_gives_the_same_logits_and_loss_on_three_ranks(name: str):
    assert ", ".join(MODELS) in section(README, "Hugging Face").replace("\n", " ")
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes), attn_implementation="eager").eval()
    tokens = torch.randint(3, 64, (2, 41))
    with torch.no_grad():
        whole = model(input_ids=tokens, labels=tokens, use_cache=False)
    ringspan.transformers.register()
    model.set_attn_implementation("ringspan")

    @torch.no_grad()
    def run_rank(group):
        seq = ringspan.ContextParallel(group).sequence(41)
        mine, part = copy.deepcopy(model), seq.shard_batch({"input_ids": tokens, "labels": tokens})
        result = mine(**part, use_cache=False)
        # It tells its attention which positions it computed with: those that it makes by itself are seen there.
        with pytest.raises(ringspan.RingspanError, match="counts each rank's tokens from 0"):
            mine(**{name: value for name, value in part.items() if name != "position_ids"}, use_cache=False)
        return seq.unshard(result.logits), result.loss

    split = ringspan.run_in_process(3, run_rank)
    # float32: a few roundings of 1e-7 in two layers.
    torch.testing.assert_close(split[0][0], whole.logits, rtol=0, atol=5e-6)
    torch.testing.assert_close(sum(loss for _, loss in split), whole.loss, rtol=0, atol=5e-6)


# ---- what the README lists -------------------------------------------------------------------------------------------------------


def test_the_tables_name_every_strategy_layout_mask_kernel_and_transport():
    assert named(section(README, "Strategies")) == [*STRATEGIES, "auto"]
    assert named(section(README, "Layouts")) == list(ringspan.layouts)
    assert named(section(README, "Masks")) == [*(form for form, _ in MASK_FORMS.values()), "mask_mod"]
    assert named(section(README, "Kernels")) == list(KERNELS)
    made = {name for name, value in vars(transport).items() if isinstance(value, type) and name in transport.__all__}
    assert set(named(section(README, "Transports"))) == made - {"Parcel", "Pending", "Transport", "WhenWaited"}


def test_the_kernels_of_the_table_compute_what_it_says():
    said = {row[0].strip("`"): row[2:] for row in rows(section(README, "Kernels"))}
    features = ("window", "mask_mod", "softcap")

    def through_lse(kernel: Kernel) -> str:
        if kernel.can.lse_gradient or kernel.can.head_dims is None:
            return "yes"
        return f"heads up to {kernel.can.head_dims[1] - lse_gradient.COLUMNS}"

    computed = {
        name: [
            *("yes" if wanted in kernel.can.features else "" for wanted in features),
            through_lse(kernel),
            kernel.can.determinism,
        ]
        for name, kernel in KERNELS.items()
    }
    assert said == computed


def test_every_strategy_has_its_paragraph_in_the_gallery():
    headings = re.findall(r"^## `(\w+)`$", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [*STRATEGIES, "auto"]


def test_every_room_and_file_has_its_line():
    listed, room = [], ""
    (tree,) = [block.text for block in blocks(README) if block.language == "text" and "errors.py" in block.text]
    for line in tree.splitlines():
        match = re.fullmatch(r"( *)(\S+)  +\S.*", line)
        assert match is not None, f"a line without a name or without words for it: {line!r}"
        indent, name = match[1], match[2]
        room = name if name.endswith("/") else room if indent else ""
        listed += [] if name.endswith("/") else [room + name]
    source = ROOT / "src" / "ringspan"
    there = [path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py" or path.parent == source]
    assert sorted(listed) == sorted(there), f"not in the README: {set(there) - set(listed)}; no longer there: {set(listed) - set(there)}"


def test_every_paper_that_the_code_names_is_cited():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    papers = section(README, "Papers")
    missing = sorted(set(re.findall(r"\b\d{4}\.\d{5}\b", source)) - set(re.findall(r"\b\d{4}\.\d{5}\b", papers)))
    assert not missing, f"named in a docstring and not under Papers: {missing}"


def test_the_versions_are_those_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    torch_low, torch_high = next(re.findall(r"2\.(\d+)", need) for need in project["dependencies"] if need.startswith("torch"))
    installing = section(README, "Installing")
    assert f"Python 3.{low} to 3.{int(high) - 1}" in installing
    assert f"PyTorch 2.{torch_low} to 2.{int(torch_high) - 1}" in installing
    extras = project["optional-dependencies"]
    assert set(named(installing)) == set(extras)


def test_measured_numbers_are_copied_from_reports():
    text = section(README, "Measured")
    reports = re.findall(r"\((benchmarks/reports/[^)]+\.md)\)", text)
    lines = [line for report in reports for line in (ROOT / report).read_text(encoding="utf-8").splitlines()]
    measured = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert measured and not [line for line in measured if line not in lines]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_command_whose_output_is_another_is_noticed():
    assert in_order(["a", "…", "d"], ["a", "b", "c", "d", "e"]) is None
    assert in_order(["a", "c"], ["a", "b", "c"]) == "c"
    assert in_order(["…", "x"], ["a", "b"]) == "x"
