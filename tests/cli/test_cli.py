"""The command line: help without torch, one clear error per mistake, no half-written files."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hftlight
from hftlight.attacks.attack import option_of
from hftlight.attacks.protocols.protocol import PRESETS, get_preset
from hftlight.cli.cache import cache
from hftlight.cli.compare import compare
from hftlight.cli.main import COMMANDS, main
from hftlight.cli.train import parse_train, train
from hftlight.registry import defenses
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare
from hftlight.take import Take
from tests.helpers import warm
from tests.helpers.slow import some_slow

ROOT = Path(__file__).parents[2]
TRAIN = [str(ROOT / "recipes" / "train.py")]


ALL = ("booster", "--harmful_ratio", "0-1", "default: 0.1", "--alignment.lr", "--dry_run")
SHORT = ("booster", "--harmful_ratio", "0-1", "[0.1]", "--dry_run", "--help all")


@pytest.mark.parametrize(("words", "shown"), [(["all"], ALL), ([], SHORT)])
def test_help_answers_without_torch(words, shown):
    code = (
        f"import sys; sys.argv = ['train.py', '--help', *{words}]\n"
        "from hftlight.cli.train import train\n"
        "try:\n    train()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in shown:
        assert word in done.stdout


@pytest.mark.parametrize("command", ["train", "compare", "evaluate"])
def test_help_fits_on_one_screen(command):
    done = warm.run(["-m", "hftlight", command, "--help"])
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert len(warm.run(["-m", "hftlight", command, "--help", "all"]).stdout.splitlines()) > 150


def test_the_command_names_its_commands(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)
    assert main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert hftlight.__version__ in capsys.readouterr().out
    assert main(["cache", "list"]) == 0


def test_help_of_a_defense_shows_unit_range_and_default():
    done = warm.run([*TRAIN, "--defense", "booster", "--help"])
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "--booster.lam" in text
    assert "dimensionless, >= 0; 0 is plain alignment" in text
    assert "L2 distance in weight space, > 0" in text
    assert "--booster.streams" not in text


def test_names_come_first_then_their_arguments():
    config, defenses, _, dry, _ = parse_train(
        ["--defense", "booster", "--booster.lam", "20", "--harmful-ratio", "0.3", "--dry-run", "--baseline"]
    )
    assert (config.defense, config.harmful_ratio, config.baseline, dry) == (["booster"], 0.3, True, True)
    assert (defenses[0].lam, defenses[0].alpha) == (20.0, 0.1)


def test_what_is_taken_of_a_source_is_said_at_once_or_by_its_name():
    """An option with a source's name adds to the values of a preset or a file."""
    arguments = ["--data.rows", "{test: ':9'}", "--data.rows.alignment", "5001:10000", "--data.first.attack", "7"]
    arguments += ["--data.where", "{attack: [is_safe=false, lang=en], over_refusal: label=safe}"]
    arguments += ["--data.columns", "{instruction: goal, alignment: {response: refusal}}"]
    data = parse_train(arguments)[0].data
    usual = {"instruction": "goal"}
    assert data.take("alignment") == Take(rows="5001:10000", columns={"response": "refusal"}, usual=usual)
    assert data.take("attack") == Take(where=["is_safe=false", "lang=en"], first=7, usual=usual)
    assert (data.take("test").rows, data.take("over_refusal").where) == (":9", ("label=safe",))


def test_hyphens_stay_in_values():
    config, *_, dry, _ = parse_train(["--data.alignment", "my-file.jsonl", "--model=a-b/c-d", "--dry-run"])
    assert (config.data.alignment, config.model, dry) == ("my-file.jsonl", "a-b/c-d", True)


def test_a_printed_configuration_is_read_back(tmp_path):
    command = [*TRAIN, "--defense", "booster", "--booster.lam", "7", "--finetuning.lr", "0.001", "--print_config"]
    path = tmp_path / "config.yaml"
    path.write_text(warm.run(command, check=True).stdout)
    config, defenses, *_ = parse_train(["--config", str(path), "--seed", "3"])
    assert (config.finetuning.lr, config.seed, defenses[0].lam) == (0.001, 3, 7.0)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads_and_is_ready_to_start(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    config, defenses, *_ = parse_train(["--config", str(path)])
    prepared = prepare(config, defenses)
    assert [arm.name for arm in prepared.arms][-1] == "+".join(config.defense or ["none"])
    assert all(unit.seconds > 0 for unit in plan(prepared))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defense", "boster"], "Unknown defense 'boster'; did you mean 'booster'?"),
        (["--harmful_ratio", "5"], "--harmful_ratio must lie in [0, 1], got 5. If that is a percentage, write 0.05."),
        (["--harmful_ratio", "-0.1"], "--harmful_ratio must lie in [0, 1], got -0.1."),
        (["--defense", "booster", "--booster.alpha", "0"], "Booster: alpha is a step length and must be > 0, got 0.0."),
        (["--alignment.lr", "0"], "--alignment.lr must be > 0"),
        (["--data.attack", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--data.alignment", "empty.jsonl"], "empty.jsonl"),
        (["--data.alignment", "columns.jsonl"], "--data.columns"),
        (["--max_tokens", "5"], "rows may have at most 5 tokens"),
        (["--num_samples", "100000"], "The upload needs 10000 attack rows, but the source has 400"),
        (["--template", "chatt"], "Did you mean 'chat'?"),
        (["--model", "tinyy"], "did you mean 'tiny'?"),
        (["--model", "folder"], "is not a model folder"),
        (["--output", "/proc/nowhere"], "cannot be written"),
        (["--lora.targets", "[nothing]"], "linear layers are"),
        (["--tuning", "qlora"], "--adapter_protocol continue"),
        (["--strategy", "deepspeed"], "--strategy must be auto, ddp or fsdp2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_with_status_2_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    Path("empty.jsonl").touch()
    Path("columns.jsonl").write_text('{"a": "b"}\n')
    Path("folder").mkdir()
    small = [
        "--model",
        "tiny",
        "--evaluation.prompts",
        "1",
        "--evaluation.over_refusal_prompts",
        "1",
    ]
    small += [
        "--evaluation.task_rows",
        "1",
        "--evaluation.max_new_tokens",
        "1",
        "--evaluation.task_max_new_tokens",
        "1",
    ]
    assert train([*small, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.glob("runs/*/report.html"))
    assert not list((tmp_path / "cache").glob("stages/*/stage.json"))


def test_the_demo_model_names_the_command_that_fetches_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr("hftlight.model_files.demo_file", lambda: None)
    assert train(["--output", str(tmp_path / "runs")]) == 2
    assert "make model" in capsys.readouterr().err


def test_a_model_without_chat_template_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys):
    import shutil

    from hftlight.model_files import model_path

    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model_path("tiny"), tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert train(["--model", str(tmp_path / "plain"), "--output", str(tmp_path / "runs"), "--dry_run"]) == 2
    assert "--template alpaca" in capsys.readouterr().err


def test_an_unknown_option_ends_with_status_2():
    done = warm.run([*TRAIN, "--no_such_option", "1"])
    assert done.returncode == 2
    assert "no_such_option" in done.stderr


def test_dry_run_loads_no_weights_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    for user in ("base", "serving"):
        monkeypatch.setattr(f"hftlight.models.{user}.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    assert train(["--model", "tiny", "--defense", "booster", "--baseline", "--dry_run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "undefended and booster",
        "(the upload, 38 harmful)",
        "Prompts that occur in two sets",
        "This takes about",
    ):
        assert word in text
    assert not Path("runs").exists()


@pytest.mark.slow
def test_help_is_quick():
    """Help costs under a third of an import of Lightning, and a defense's help under twice that import."""

    def cost(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    unit = cost("-c", "import lightning.pytorch")  # in the machine's own seconds
    assert cost(*TRAIN, "--help") < unit / 3
    assert cost(*TRAIN, "--defense", "booster", "--help") < 2 * unit


def test_a_preset_stands_for_its_arguments_and_later_arguments_win():
    _, (lisa,), *_ = parse_train(["--defense", "lisa", "--lisa.preset", "paper"])
    assert lisa.arguments().items() >= dict(type(lisa).presets["paper"]).items()
    _, (lisa,), *_ = parse_train(["--defense", "lisa", "--lisa.preset=paper", "--lisa.proximal", "7"])
    assert (lisa.proximal, lisa.quiet) == (7.0, 0.0)


def test_an_unknown_preset_is_named(capsys):
    assert train(["--defense", "lisa", "--lisa.preset", "papers"]) == 2
    assert "--lisa.preset: presets of lisa are paper, repo, booster, got 'papers'." in capsys.readouterr().err


def test_help_of_a_combination_shows_the_defenses_first_and_their_published_settings():
    command = [*TRAIN, "--defense", "lisa", "booster", "antidote", "--booster.lam", "20", "--help"]
    done = warm.run(command)
    assert done.returncode == 0
    text = done.stdout
    assert text.index("--lisa.proximal") < text.index("--booster.lam") < text.index("--antidote.prune_ratio")
    assert text.index("--antidote.prune_ratio") < text.index("--harmful_ratio")
    assert "--lisa.preset paper" in text
    assert "--antidote.output" not in text


PLANNED = ("booster", "ctrl", "lisa", "moderation_filter", "panacea", "resta", "sa_lora", "safety_lock", "t_vaccine")


@pytest.mark.parametrize("name", some_slow(sorted(defenses()), PLANNED))
def test_every_defense_can_be_planned(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    fitting = {
        "moderation_filter": ["--moderation_filter.guard=builtin", "--moderation_filter.allow_same=true"],
        "safety_lock": ["--safety_lock.heads=2"],
        "saft": ["--saft.rate=0.1"],
        "sppft": ["--sppft.last=0"],
        "t_vaccine": ["--t_vaccine.layers=1"],
    }
    assert (
        train(["--defense", name, *fitting.get(name, []), "--model", "tiny", "--num_samples", "40", "--dry-run"]) == 0
    )
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(defenses()))
def test_the_configuration_of_a_run_is_read_back(name, tmp_path, monkeypatch):
    """The file has the form that ``run()`` writes: all values, and each defense's arguments under its name."""
    from dataclasses import asdict

    import yaml

    from hftlight.config import OWN_TRAINER

    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    config, (defense,), *_ = parse_train(["--defense", name, "--seed", "3"])
    arguments = {key: value for key, value in defense.arguments().items() if key not in OWN_TRAINER}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**asdict(config), name: arguments}, sort_keys=False))
    again, (same,), *_ = parse_train(["--config", str(path)])
    assert again == config
    assert same.state_key == defense.state_key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_the_command_line_is_the_published_protocol(name):
    """The attack sets every option of the protocol to the published value."""
    preset = get_preset(name)
    config, _, attack, *_ = parse_train(["--preset", name])
    applied = attack.applied(config)
    assert type(attack) is type(preset.attack)
    assert attack.resolved(config).counts() == preset.attack.resolved(preset.config()).counts()
    assert {option: option_of(applied, option) for option in preset.published()} == preset.published()
    assert "data.attack" not in preset.published()  # no protocol was published on the built-in rows


def test_an_option_after_a_preset_wins():
    config, _, attack, *_ = parse_train(["--preset=booster25", "--harmful_ratio", "0.3", "--harmful_mix.epochs", "10"])
    assert attack.applied(config).harmful_ratio == 0.3
    assert attack.applied(config).finetuning.steps == 1000  # 1000 rows in batches of 10, 10 times
    assert config.data.task == "sst2"
    own, *_ = parse_train(["--preset", "booster25:gsm8k", "--data.task", "builtin"])
    assert (own.data.task, own.harmful_ratio, own.evaluation.task_max_new_tokens) == ("builtin", 0.05, 200)


def test_a_dry_run_prints_every_number_of_a_preset_even_without_its_files(capsys):
    assert (
        train(["--preset", "lisa24", "--data.task", "builtin", "--model", "tiny", "--dry_run"]) == 2
    )  # the preset needs more than the built-in rows
    output = capsys.readouterr()
    assert "rows 0 to 499 of the source 'attack'" in output.err
    preset = get_preset("lisa24")
    for option in {**preset.published(), **preset.own()}:
        assert option in output.out
    words = " ".join(output.out.split())
    assert all(" ".join(note.split()) in words for note in preset.notes)
    assert "20000" in output.out  # 5000 rows in batches of 5, 20 times


def test_an_unknown_preset_is_refused_with_the_nearest(capsys):
    assert train(["--preset", "boster25"]) == 2
    assert "Did you mean 'booster25'" in capsys.readouterr().err


def test_clearing_the_cache_keeps_the_replies_of_paid_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    for kind in ("stages", "judges", "hashes"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "one.json").write_text("{}")
    assert cache(["list"]) == 0
    assert "1 files" in capsys.readouterr().out
    assert cache(["clear"]) == 0
    assert {kind: any((tmp_path / kind).iterdir()) for kind in ("stages", "judges", "hashes")} == {
        "stages": False,
        "judges": True,
        "hashes": False,
    }
    assert cache(["clear", "judges"]) == 0
    assert not any((tmp_path / "judges").iterdir())


def test_a_comparison_takes_the_arms_without_a_defense_by_name(tmp_path, capsys):
    """``unaligned`` is an arm, not a defense. The arm's upload trains the unaligned model."""
    options = ["--model", "tiny", "--accelerator", "cpu", "--output", str(tmp_path), "--seeds", "1", "--dry_run"]
    assert compare(["--defenses", "unaligned", "none", *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "2 cells, 2 to run" in output
    assert "unaligned-builtin-p0.1-s0" in output
