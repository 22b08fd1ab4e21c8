"""Parsing in two steps: configurations in every shape, lists, switches, presets, and messages for typos."""

import re
from dataclasses import asdict

import pytest
import yaml

from hftlight.cli.compare import compare
from hftlight.cli.evaluate import evaluate
from hftlight.cli.train import parse_train, train
from hftlight.config import RunConfig
from hftlight.errors import InputError


def file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text",
    ["defense: booster", "defense: [booster]", "defense:\n- booster\n", "defense: 'booster'", "defense: [Booster]"],
)
def test_a_configuration_names_its_defenses_as_a_text_or_a_list(tmp_path, text):
    if "Booster" in text:
        text = text.lower()
    config, (defense,), *_ = parse_train(["--config", file(tmp_path, text)])
    assert (config.defense, type(defense).__name__) == (["booster"], "Booster")


@pytest.mark.parametrize(
    "text", ["defense: null", "defense: []", "defense: none", "defense: [none]", "", "{}", "# nothing"]
)
def test_a_configuration_may_name_no_defense(tmp_path, text):
    assert parse_train(["--config", file(tmp_path, text)]).config == parse_train([]).config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x00\x01\xff", "is not a UTF-8 text file"),
        ("a: [1\nb", "is not valid YAML: .*line 1"),
        ("- a\n- b\n", "must hold options with their values, such as 'seed: 1', got list"),
        ("5", "got int"),
        ("1: 2", "must hold options"),
        ("sed: 1", r"there is no option 'sed'\. Did you mean seed\?"),
        ("finetuning: {lrr: 1}", r"no option 'finetuning\.lrr'\. Did you mean finetuning\.lr\?"),
        ("finetuning: 5", "no option 'finetuning'"),
        ("seed: x", r"--seed must be a whole number, got x\."),
        ("lora: {targets: null}", r"lora\.targets must be a list, got null"),
        ("defense: lisa\nlisa: {proximl: 1}", r"no option 'lisa\.proximl'\. Did you mean lisa\.proximal\?"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse_train(["--config", file(tmp_path, text)])


SWEEP = ("--defenses", "none", "antidote")


@pytest.fixture
def grids(monkeypatch):
    """Record the grid of each comparison, which is not run."""
    made = []
    monkeypatch.setattr("hftlight.comparison.show.compare_and_show", lambda config, grid, *_, **__: made.append(grid))
    return made


def test_several_values_of_a_defenses_argument_are_a_sweep(tmp_path, grids):
    text = "antidote: {prune_ratio: [0.1, 0.2], group: [row, matrix], rounding: up}"
    for argv in (
        ("--antidote.prune_ratio", "0.1", "2e-1", "--antidote.group", "row", "matrix", "--antidote.rounding", "up"),
        ("--antidote.prune-ratio=0.1", "0.2", "--antidote.rounding=up", "--antidote.group", "row", "matrix"),
        ("--config", file(tmp_path, text)),
        ("--config", file(tmp_path, text), "--antidote.prune_ratio", "0.7", "--antidote.prune_ratio", "0.1", "0.2"),
    ):
        assert compare([*SWEEP, *argv]) == 0
        grid = grids[-1]
        assert grid.sweeps == {"antidote.prune_ratio": (0.1, 0.2), "antidote.group": ("row", "matrix")}
        assert grid.arguments["antidote"]["rounding"] == "up"
    assert compare([*SWEEP, "--config", file(tmp_path, text), "--antidote.prune_ratio", "0.3"]) == 0
    assert set(grids[-1].sweeps) == {"antidote.group"}
    assert grids[-1].arguments["antidote"]["prune_ratio"] == 0.3


def test_a_printed_configuration_holds_the_sweep(tmp_path, grids, capsys):
    with pytest.raises(SystemExit):
        compare([*SWEEP, "--antidote.prune_ratio", "0.1", "0.2", "--print_config"])
    printed = capsys.readouterr().out
    assert compare(["--config", file(tmp_path, printed)]) == 0
    assert grids[-1].sweeps == {"antidote.prune_ratio": (0.1, 0.2)}


def test_a_list_and_no_or_one_value_stay_what_they_were(grids):
    lists = ("--antidote.layers", "[q_proj, v_proj]", "--freeze_plus.qk")
    assert compare(["--defenses", "antidote", "freeze_plus", *lists]) == 0
    assert grids[-1].sweeps == {}
    assert grids[-1].arguments["antidote"]["layers"] == ["q_proj", "v_proj"]
    assert grids[-1].arguments["freeze_plus"]["qk"] is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("--antidote.prune_ratio", "0.1", "5"),
            r"--antidote\.prune_ratio: Antidote: prune_ratio must lie in \[0, 1\]",
        ),
        (
            ("--antidote.prune_ratio", "5", "0.1"),
            r"--antidote\.prune_ratio: Antidote: prune_ratio must lie in \[0, 1\]",
        ),
        (("--antidote.prune_ratio", "0.1", "x"), r"--antidote\.prune_ratio must be a number, got x\."),
        (("--antidote.prune_ratio", "0.1", "1e-1"), r"--antidote\.prune_ratio: 0\.1 is listed twice"),
        (("--antidote.layers", "q_proj", "v_proj"), r"--antidote\.layers takes one list, such as '\[q_proj, v_proj\]'"),
        (("--harmful_mix.n", "3", "4"), r"--harmful_mix\.n takes one value here, got 2\. Only arguments of defenses"),
        (
            ("--antidote.prun_ratio", "3", "4"),
            r"no option --antidote\.prun_ratio\. Did you mean --antidote\.prune_ratio",
        ),
    ],
)
def test_values_that_cannot_be_swept_are_named(argv, said, capsys):
    assert compare([*SWEEP, *argv, "--dry_run"]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_options_win_over_the_configuration_in_any_position(tmp_path):
    place = file(
        tmp_path, "seed: 1\nfinetuning: {steps: 5}\nevaluation: {at: [1, 2]}\ndefense: lisa\nlisa: {proximal: 2}"
    )
    for argv in (["--seed", "7", "--config", place], ["--config", place, "--seed=7"]):
        config, (lisa,), *_ = parse_train(argv)
        assert (config.seed, config.finetuning.steps, config.evaluation.at, lisa.proximal) == (7, 5, [1, 2], 2.0)


def test_a_later_configuration_adds_to_an_earlier_one(tmp_path):
    (tmp_path / "more.yaml").write_text("finetuning: {lr: 0.5}")
    first = file(tmp_path, "finetuning: {steps: 5}")
    config = parse_train(["--config", first, "--config", str(tmp_path / "more.yaml")]).config
    assert (config.finetuning.steps, config.finetuning.lr) == (5, 0.5)


def test_the_configuration_of_a_run_serves_another_defense_and_another_attack(tmp_path):
    """Arguments of methods that the user did not choose have no effect."""
    own = {**asdict(RunConfig(defense=["booster"], seed=4)), "booster": {"lam": 3.0}, "harmful_mix": {"epochs": 2.0}}
    place = file(tmp_path, yaml.safe_dump(own))
    config, (lisa,), attack, *_ = parse_train(["--config", place, "--defense", "lisa", "--attack", "benign"])
    assert (config.defense, type(lisa).__name__, type(attack).__name__, config.seed) == (["lisa"], "Lisa", "Benign", 4)


def test_the_configuration_of_a_run_serves_a_comparison(tmp_path, capsys):
    own = {
        **asdict(RunConfig(model="tiny", defense=["lisa"], seed=4, output=str(tmp_path / "runs"))),
        "lisa": {"proximal": 2.0},
    }
    place = file(tmp_path, yaml.safe_dump(own))
    assert compare(["--config", place, "--seeds", "1", "--dry_run"]) == 0
    assert "lisa-builtin-p0.1-s4" in " ".join(capsys.readouterr().out.split())
    assert compare(["--config", place, "--defenses", "none", "--seeds", "1", "--dry_run", "--lisa.proximal", "3"]) == 2
    assert "There is no option --lisa.proximal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"], ["[q_proj, v_proj]"], ["[q_proj,", "v_proj]"]],
)
def test_a_list_is_words_commas_or_brackets(words):
    assert parse_train(["--lora.targets", *words]).config.lora.targets == ["q_proj", "v_proj"]
    assert parse_train([f"--lora.targets={' '.join(words)}"]).config.lora.targets == ["q_proj", "v_proj"]


def test_a_switch_needs_no_value_and_takes_one():
    commands = [["--baseline"], ["--baseline", "--seed", "1"], ["--baseline", "true"], ["--baseline=true"]]
    assert all(parse_train(argv).config.baseline for argv in commands)
    assert not parse_train(["--baseline", "false"]).config.baseline


def test_arguments_win_over_a_defenses_preset_in_any_position():
    for argv in (["--lisa.proximal", "7", "--lisa.preset", "paper"], ["--lisa.preset=paper", "--lisa.proximal=7"]):
        assert parse_train(["--defense", "lisa", *argv]).defenses[0].proximal == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sede", "1"], r"There is no option --sede\. Did you mean --seed\?"),
        (["--harmful-ratoi=1"], r"Did you mean --harmful_ratio\?"),
        (["--freeze.mode", "rewind"], "--defense rewind"),
        (["--booster.lam", "1"], r"There is no option --booster\.lam"),
        (["--defense", "lisa", "--booster.preset", "x"], r"booster is not among the chosen defenses \(lisa\)"),
        (["--seed"], "--seed: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--baseline", "maybe"], r"--baseline must be true or false, got maybe\."),
        (["--evaluation.at", "10", "x"], "element 2 must be a whole number, got x"),
        (["--config", "nowhere.yaml"], r"there is no file 'nowhere\.yaml'"),
    ],
)
def test_a_typo_is_answered_in_one_sentence(argv, message):
    with pytest.raises(InputError, match=message):
        parse_train(argv)


def test_a_typo_ends_with_status_2_and_no_usage(capsys):
    assert train(["--sede", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_pipeline_stops_on_a_condition(tmp_path, monkeypatch, capsys):
    """Without a true condition, the status is 0. A true condition ends with status 3, after the scores are saved."""
    scores = [
        {
            "metric": "harmful_score",
            "judge": "keyword",
            "value": 4.0,
            "low": 2.0,
            "high": 6.0,
            "count": 9,
            "unit": "percent",
        }
    ]
    monkeypatch.setattr("hftlight.runs.measuring.measure.measure_model", lambda *_, **__: (scores, []))
    command = [
        "--model",
        "tiny",
        "--evaluation.prompts",
        "2",
        "--evaluation.task_rows",
        "2",
        "--save",
        str(tmp_path / "s"),
    ]
    assert evaluate([*command, "--fail_if", "harmful_score_high>9"]) == 0
    assert evaluate([*command, "--fail_if", "harmful_score>9", "harmful_score_high>5"]) == 3
    assert "--fail_if: harmful_score_high>5 holds for tiny." in capsys.readouterr().err
    assert (tmp_path / "s" / "scores.json").is_file()
    assert evaluate([*command, "--fail_if", "nonsense"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "../outside"], "--name names a folder in --output runs, got '../outside'"),
        (["--name", "/outside"], "--name names a folder"),
        (["--name", "."], "--name names a folder"),
        (["--seed", "-1"], r"--seed must lie in \[0, 2\^32\), got -1"),
        (["--search.lr", "0"], r"--search\.lr takes one or more values > 0, got \[0\.0\]"),
        (["--search.harmful_ratio", "5"], r"--search\.harmful_ratio takes one or more values in \[0, 1\]"),
        (["--search.steps", "0", "4"], r"--search\.steps takes one or more values >= 1"),
        (["--search.rank"], r"--search\.rank takes one or more values >= 1, got \[\]"),
        (["--search.eps", "-1"], r"--search\.eps must be >= 0"),
    ],
)
def test_what_would_fail_later_is_refused_at_the_start(argv, message):
    with pytest.raises(InputError, match=message):
        parse_train(argv).config.check()


def test_names_may_hold_brackets_dots_and_folders(tmp_path, capsys):
    for name in ("runs[1]", "a..b", "group/run", "[bold]x[/bold]"):
        RunConfig(name=name).check()
    command = ["--model", "tiny", "--num_samples", "20", "--dry_run", "--data.task_train", str(tmp_path / "[/red] no")]
    assert train(command) == 2
    assert "[/red] no" in capsys.readouterr().err


def test_a_comparison_stays_in_its_output_and_tells_equal_names_apart(tmp_path, capsys):
    small = ["--model", "tiny", "--output", str(tmp_path), "--seeds", "1", "--dry_run"]
    assert compare([*small, "--comparison", "../x"]) == 2
    assert "--comparison names a folder in --output" in capsys.readouterr().err
    assert compare([*small, "--harmful_ratios", "0.1", "0.1000000001"]) == 2
    assert "both print as 0.1" in capsys.readouterr().err


def test_an_accelerator_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert train(["--model", "tiny", "--accelerator", "gpu", "--dry_run"]) == 2
    assert "--accelerator gpu: torch finds no GPU" in capsys.readouterr().err
