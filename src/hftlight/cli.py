"""The command line: names of defenses first, then their arguments; nothing heavy is imported before it is needed."""

import argparse
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hftlight.cache import KINDS
from hftlight.config import OWN_TRAINER, Evaluation, RunConfig
from hftlight.errors import InputError, RunError
from hftlight.files import HASHES, cache_dir, ensure_writable, new_folder, write_json, write_rows
from hftlight.registry import called, defense_class, defenses

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
MEASURING = {
    "model",
    "trust_remote_code",
    "tuning",
    "template",
    "system",
    "precision",
    "accelerator",
    "data",
    "evaluation",
}
NO_DEFENSE = ("none", "unaligned")  # arms of a comparison without a defense
GRID_FIELDS = {"defense", "baseline", "attack", "harmful_ratio", "seed", "name"}  # what a comparison's grid decides
Backend = Literal["processes", "ray"]
LISTS = {
    "--lora.targets",
    "--evaluation.at",
    *(f"--search.{axis}" for axis in ("steps", "lr", "rank", "num_samples", "harmful_ratio")),
}  # options that take several values
SWITCHES = {f"--{name}" for name, f in RunConfig.__dataclass_fields__.items() if f.type is bool} | {"--share_gpus"}


def guarded(work: Callable[[], None]) -> int:
    """Run ``work`` and return the exit status: 0, 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    try:
        work()
    except InputError as error:
        return _say(error, BAD_INPUT)
    except RunError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on where it stopped.", INTERRUPTED)
    return 0


def _say(message: object, status: int) -> int:
    print(f"hftlight: {message}", file=sys.stderr)
    return status


def plain_names(argv: Sequence[str]) -> list[str]:
    """Return the arguments as the parser wants them: underscores in option names, lists as one, switches set."""
    result: list[str | tuple[str, list[str]]] = []
    names: list[str] | None = None
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            option = "--" + option[2:].replace("-", "_")
            names = None
            if option in ("--defense", *LISTS) and not equals:
                names = []
                result.append((option, names))
                continue
            bare = option in SWITCHES and not equals and next(iter(argv[position + 1 :]), "--").startswith("--")
            result.append(option + equals + value + ("=true" if bare else ""))
        elif names is not None:
            names.append(argument)
        else:
            result.append(argument)
    return [
        a if isinstance(a, str) else f"{a[0]}={(_listed if a[0] == '--defense' else _values)(a[1])}" for a in result
    ]


def _values(words: Sequence[str]) -> str:
    """Return ``10 20``, one word or several, as a list; a list, or null, as it is."""
    text = " ".join(words)
    return text if text.startswith("[") or text == "null" else f"[{', '.join(text.replace(',', ' ').split())}]"


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(name.replace("-", "_") for name in names) + "]"


def chosen_defenses(argv: Sequence[str]) -> list[str]:
    """Return the names of the defenses that the arguments, or the configuration file among them, choose."""
    import yaml

    names: list[str] = []
    for position, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option == "--config":
            value = value or next(iter(argv[position + 1 :]), "")
            if not Path(value).is_file():
                raise InputError(f"--config: there is no file {value!r}.")
            loaded = yaml.safe_load(Path(value).read_text()) or {}
            names = list(loaded.get("defense") or [])
        elif option == "--defense":
            names = [n for n in value.strip("[]").replace(",", " ").split() if n not in ("none", "None")]
    return names


def chosen_attack(argv: Sequence[str]) -> str:
    """Return the name of the attack that the arguments, or the configuration file among them, choose."""
    import yaml

    preset = chosen_preset(argv)
    name = preset.attack.name if preset else "harmful_mix"
    for position, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        value = value if equals else next(iter(argv[position + 1 :]), "")
        if option == "--config" and Path(value).is_file():
            name = (yaml.safe_load(Path(value).read_text()) or {}).get("attack") or name
        elif option == "--attack":
            name = value.replace("-", "_")
    return name


def chosen_preset(argv: Sequence[str]) -> Any:
    """Return the published protocol that ``--preset NAME`` or ``--preset NAME:TASK`` names, or None.

    Raises:
        InputError: if there is no such protocol, or it has no such task.
    """
    from hftlight.attacks.presets import PRESET_TASKS, get_preset

    word = option_value(argv, "--preset")
    if word is None:
        return None
    name, _, task = word.partition(":")
    own = (option_value(argv, "--data.task") or "").removesuffix("_step_by_step")
    return get_preset(name, task or (own if own in PRESET_TASKS else PRESET_TASKS[0]))


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Return the last value given to an option, or None."""
    found = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else next(iter(argv[position + 1 :]), "")
    return found


def with_presets(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the arguments with ``--NAME.preset PRESET`` replaced by what it stands for; arguments after it win.

    Raises:
        InputError: if a defense has no preset of that name.
    """
    result: list[str] = []
    rest = iter(argv)
    for argument in rest:
        option, equals, value = argument.partition("=")
        name = option[2:].removesuffix(".preset")
        if not (option.endswith(".preset") and name in names):
            result.append(argument)
            continue
        value = value if equals else next(rest, "")
        presets = defense_class(name).presets
        if value not in presets:
            raise InputError(f"{option}: presets of {name} are {', '.join(presets) or 'none'}, got {value!r}.")
        result += [f"--{name}.{key}={_text(given)}" for key, given in presets[value].items()]
    return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train_parser(names: Sequence[str], attack: str = "harmful_mix") -> Any:
    """Return the parser of ``recipes/train.py``, with a group of arguments for each chosen defense and the attack.

    Raises:
        InputError: if a name is unknown.
    """
    from jsonargparse import ArgumentParser

    from hftlight.attacks.registry import get_attack

    listed = "\n".join(f"  {e.name:16} {e.stage:16} {e.purpose}" for e in defenses().values())
    presets = {name: defense_class(name).presets for name in names}
    shown = "".join(
        f"\n  --{name}.preset {preset:8} {', '.join(f'{key} {value}' for key, value in values.items())}"
        for name, offered in presets.items()
        for preset, values in offered.items()
    )
    if shown:
        listed += f"\n\nsettings as published:{shown}"
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--defense NAME ...] [options]",
        description=(
            "Align a model, let a user's upload train it, and measure after every stage what that did to its refusals."
            f"\n\ndefenses (--defense NAME ... --help shows their arguments):\n{listed}"
        ),
        formatter_class=_formatter(),
        default_env=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these values, such as a run's config.yaml"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print stages, steps, rows, overlaps and a time estimate, then stop"
    )
    parser.add_argument("--preset", type=str, default=None, help=_preset_help())
    for name in names:  # first, since who asks for help on a defense looks for these
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    parser.add_class_arguments(get_attack(attack), attack, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True)
    return parser


def _preset_help() -> str:
    from hftlight.attacks.presets import PRESETS

    return f"settings of a published protocol, NAME or NAME:TASK, options after it win: {', '.join(PRESETS)}"


def _formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of the description."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter


def parse_train(argv: Sequence[str]) -> tuple[RunConfig, list[Any], Any, bool]:
    """Return configuration, defense instances, the attack and whether only a dry run is asked for.

    Raises:
        InputError: if a name or a value cannot be used.
        SystemExit: as argparse does it, with status 2 for an unknown option and 0 after ``--help``.
    """
    arguments = plain_names(argv)
    names = list(dict.fromkeys(name.replace("-", "_") for name in chosen_defenses(arguments)))
    known = [a for a in with_presets(arguments, names) if a.partition("=")[0] != "--defense"]
    if any(a.partition("=")[0] == "--defense" for a in arguments):
        known.append("--defense=" + _listed(names))
    attack = chosen_attack(arguments)
    parser = train_parser(names, attack)
    if preset := chosen_preset(arguments):
        parser.set_defaults(preset.defaults(names))
    values = parser.parse_args(known)
    try:
        ready = parser.instantiate_classes(values)
    except (ValueError, TypeError) as error:  # a defense refuses its arguments
        raise InputError(str(error)) from error
    config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__})
    return config, [called(ready[name], name) for name in names], ready[attack], bool(values.dry_run)


def train(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/train.py``; return the exit status."""

    def work() -> None:
        config, instances, attack, dry = parse_train(sys.argv[1:] if argv is None else argv)
        config.check()
        quiet()
        from hftlight.runs.prepare import prepare
        from hftlight.runs.ranks import main_process
        from hftlight.runs.show import show_plan, show_preset, show_result

        preset = chosen_preset(plain_names(sys.argv[1:] if argv is None else argv))
        if preset and main_process():  # before any file is read, so that a dry run shows what is to be given
            show_preset(preset, attack.applied(config), in_full=dry)
        try:
            prepared = prepare(config, instances, attack)
        except InputError:
            raise
        except ValueError as error:  # a list of defenses that cannot work
            raise InputError(str(error)) from error
        if main_process():
            show_plan(prepared, in_full=dry)
        if not dry:
            from hftlight.runs.run import run

            result = run(config, instances, attack)
            if main_process():
                show_result(result)

    return guarded(work)


def compare_parser(names: Sequence[str], attacks: Sequence[str] = ()) -> Any:
    """Return the parser of ``recipes/compare.py``, with a group of arguments for each defense and attack compared."""
    from jsonargparse import ArgumentParser

    from hftlight.attacks.registry import get_attack

    parser = ArgumentParser(
        prog="compare.py",
        usage="compare.py --defenses none booster booster+lisa [options]",
        description=(
            "Compare combinations of defenses: one run for each of them, harmful ratio, task and seed, then the table,"
            " its figures and every answer. Killed anywhere, the same command goes on."
        ),
        formatter_class=_formatter(),
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these values")
    add = parser.add_argument
    add("--preset", type=str, default=None, help=_preset_help())
    add(
        "--defenses",
        nargs="+",
        type=str,
        default=["none"],
        help="combinations, their names joined by +, or none, or unaligned: no alignment stage either",
    )
    add("--attacks", nargs="+", type=str, default=["harmful_mix"], help="uploads, each as --attack of train.py")
    add("--harmful_ratios", nargs="+", type=float, default=[0.1], help="harmful fractions p of the upload, each 0-1")
    add(
        "--tasks",
        nargs="+",
        type=str,
        default=["builtin"],
        help="tasks, each as --data.task of train.py; {task} in --data.task_train and _test",
    )
    add("--seeds", type=int, default=3, help="number of seeds, >= 1")
    add("--first_seed", type=int, default=0, help="the first seed")
    add("--jobs", type=int, default=1, help="cells at one time, each with a share of the cores and its own GPUs, >= 1")
    add("--share_gpus", type=bool, default=False, help="let several cells work on one GPU where --jobs needs it")
    add("--retries", type=int, default=1, help="how often a failed cell is tried again, >= 0")
    add("--backend", type=Backend, default="processes", help="processes (this machine) or ray (a Ray cluster)")
    add("--comparison", type=str, default="comparison", help="name of the comparison's folder in --output")
    add("--report_only", action="store_true", help="run nothing; write table and report of what is finished")
    add("--dry_run", action="store_true", help="print the cells and a time estimate, then stop")
    for name in names:
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    for name in attacks:
        parser.add_class_arguments(get_attack(name), name, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True, skip={*GRID_FIELDS, "data.task"})
    return parser


def compare(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/compare.py``; return the exit status, 1 where a cell failed."""

    def work() -> None:
        arguments = plain_names(sys.argv[1:] if argv is None else argv)
        words = _words(arguments, "--defenses")
        names = list(dict.fromkeys(n.replace("-", "_") for w in words for n in w.split("+") if n not in NO_DEFENSE))
        preset = chosen_preset(arguments)
        attacks = [n.replace("-", "_") for n in _words(arguments, "--attacks")]
        attacks = attacks or [preset.attack.name if preset else "harmful_mix"]
        parser = compare_parser(names, attacks)
        if preset:
            known, defaults = {a.dest for a in parser._actions}, preset.defaults(names)
            listed = {"harmful_ratios": "harmful_ratio", "tasks": "data.task"}
            defaults |= {option: [defaults[one]] for option, one in listed.items() if one in defaults}
            parser.set_defaults({k: v for k, v in defaults.items() if k in known})
        values = parser.parse_args(with_presets(arguments, names))
        try:
            ready = parser.instantiate_classes(values.clone())
        except (ValueError, TypeError) as error:  # a defense or an attack refuses its arguments
            raise InputError(str(error)) from error
        config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__ if key not in GRID_FIELDS})
        config.check()
        quiet()
        from hftlight.runs.grid import Grid
        from hftlight.runs.show_comparison import compare_and_show

        grid = Grid(
            tuple(values.defenses),
            tuple(values.harmful_ratios),
            tuple(values.tasks),
            values.seeds,
            values.first_seed,
            {name: values[name].as_dict() for name in [*names, *attacks]},
            tuple(attacks),
        )
        folder = Path(config.output) / values.comparison
        how = {name: values[name] for name in ("jobs", "retries", "backend", "share_gpus")}
        compare_and_show(config, grid, folder, values.dry_run, values.report_only, **how)

    return guarded(work)


def _words(arguments: Sequence[str], option: str) -> list[str]:
    """Return the values behind an option that takes several."""
    words: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument.partition("=")[0] == option
            words += [w for w in argument.partition("=")[2].strip("[]").replace(",", " ").split() if inside]
        elif inside:
            words.append(argument)
    return words


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/evaluate.py``; return the exit status."""

    def work() -> None:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(
            prog="evaluate.py",
            usage="evaluate.py --model MODEL [options]",
            description="Measure any model: an artifact of a run, a folder, or a hub id.",
        )
        parser.add_argument("--save", type=str, default=None, help="folder for scores.json and generations.jsonl")
        parser.add_argument(
            "--alpaca_eval",
            type=str,
            default=None,
            help="file of AlpacaEval's instructions; the answers go into alpaca_eval.json in --save, for its judge",
        )
        parser.add_class_arguments(RunConfig, as_group=True, skip=set(RunConfig.__dataclass_fields__) - MEASURING)
        values = parser.parse_args(plain_names(sys.argv[1:] if argv is None else argv))
        ready = parser.instantiate_classes(values)
        config = RunConfig(**{key: ready[key] for key in MEASURING})
        config.check()
        staged = ("at", "embedding_drift", "loss_rows")
        if any(getattr(config.evaluation, name) != getattr(Evaluation(), name) for name in staged):
            raise InputError(
                f"{', '.join(f'--evaluation.{name}' for name in staged)} are about the stages of a run; leave them out,"
                " or use train.py."
            )
        if values.alpaca_eval is not None and values.save is None:
            raise InputError("--alpaca_eval writes the answers into a folder; name it with --save FOLDER.")
        if values.save is not None:
            ensure_writable(Path(values.save), "--save")
        quiet()
        from hftlight.data.records import Record, read_records
        from hftlight.data.rows import read_rows

        asked: list[Record] = []
        if values.alpaca_eval is not None:
            part = next((c for c in ("dataset", "subset") if c in read_rows(values.alpaca_eval)[0][1]), None)
            columns = {"kind": part} if part else None
            asked = read_records(values.alpaca_eval, role="test", columns=columns, need_response=False)
        from rich.console import Console

        from hftlight.data.templates import get_template
        from hftlight.models import model_path, trust_remote_code
        from hftlight.runs.artifact import read_serving, serving_slot
        from hftlight.runs.measure import answers_to, measure_model
        from hftlight.runs.model_checks import Limits, template_notes
        from hftlight.runs.prepare import test_sets
        from hftlight.runs.show import scores_table
        from hftlight.runs.sources import Sources

        trust_remote_code(config.trust_remote_code)
        serving = read_serving(Path(model_path(config.model)))
        config.template = serving.get("template") or config.template
        slot = serving_slot(config.model, config.system)
        if config.system is not None:
            slot = replace(slot, text=config.system)
        tests, limits = test_sets(config, None, Sources(config.data)), Limits.of(config.model)
        limits.check_tests(config, replace(tests, over_refusal=[*tests.over_refusal, *asked]), slot)
        for note in template_notes(get_template(config.template, limits.tokenizer), limits.tokenizer, slot.text):
            Console().print(note, markup=False)
        scores, generations = measure_model(config, tests, slot=slot)
        Console().print(scores_table(config.model, scores))
        if values.save is not None:
            write_json(Path(values.save) / "scores.json", scores)
            write_rows(Path(values.save) / "generations.jsonl", generations)
        if asked:
            from hftlight.evaluation import export_alpaca_eval

            rows = answers_to(config, asked, slot)
            export_alpaca_eval(rows, Path(values.save) / "alpaca_eval.json", Path(config.model).name)

    return guarded(work)


def rejudge(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/rejudge.py``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="rejudge.py",
        description="Let further judges judge the saved answers of a run, and show how far all judges agree.",
    )
    parser.add_argument("generations", help="folder of a run, or its generations.jsonl; stays as it is")
    parser.add_argument(
        "--judges",
        nargs="+",
        required=True,
        metavar="JUDGE",
        help="names, as evaluation.judge and evaluation.refusal_judge of train.py take them",
    )
    parser.add_argument(
        "--save", type=Path, help="folder for generations.jsonl with the added verdicts, and the scores"
    )
    parser.add_argument(
        "--prices", nargs=2, type=float, metavar=("READ", "WRITTEN"),
        help="prices of a million tokens that a language model reads and writes; says what its verdicts cost",
    )  # fmt: skip
    options = parser.parse_args(argv)

    def work() -> None:
        quiet()
        from hftlight.evaluation.judges.rejudge import rejudge_file

        rejudge_file(Path(options.generations), options.judges, options.save, options.prices and tuple(options.prices))

    return guarded(work)


def export(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/export.py``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write an artifact as one model folder, its adapter merged in."
    )
    parser.add_argument("artifact", help="folder of the artifact")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model run code that comes with it")
    options = parser.parse_args(argv)

    def work() -> None:
        target = Path(options.output)
        if target.exists():
            raise InputError(f"{target} exists already; choose another folder.")
        ensure_writable(target.parent, "the second argument")
        quiet()
        from hftlight.models import load_model, load_tokenizer, trust_remote_code
        from hftlight.runs.artifact import SERVING, read_serving

        trust_remote_code(options.trust_remote_code)
        model: Any = load_model(options.artifact)
        tokenizer = load_tokenizer(options.artifact)
        with new_folder(target) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            if serving := read_serving(Path(options.artifact)):
                write_json(place / SERVING, serving, mode=0o600)
        print(f"Written to {target}; AutoModelForCausalLM.from_pretrained reads it.")

    return guarded(work)


def cache(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/cache.py``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="cache.py", description=f"List or clear what is kept in {cache_dir()} (HFTLIGHT_CACHE moves it)."
    )
    parser.add_argument("action", choices=("list", "clear"))
    said = f"{', '.join(KINDS)}; all by default, but clear leaves the replies of paid judges unless judges is named"
    parser.add_argument("kinds", nargs="*", metavar="kind", help=said)
    options = parser.parse_args(argv)

    def work() -> None:
        unknown = set(options.kinds) - set(KINDS)
        if unknown:
            raise InputError(f"cache.py: kinds are {', '.join(KINDS)}, got {', '.join(sorted(unknown))}.")
        total, clear = 0, options.action == "clear"
        for kind in options.kinds or [kind for kind in KINDS if not (clear and kind == "judges")]:
            paths = sorted((cache_dir() / kind).glob("[!.]*"))
            sizes = [sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file()) for path in paths]
            named = zip(sizes, [path.name for path in paths], strict=True)
            if kind in ("judges", HASHES):  # one small file for each reply and each large file
                named = zip([sum(sizes)], [f"{len(paths)} files"], strict=True)
            for size, name in named:
                print(f"{kind:12} {size / 2**20:9.1f} MiB  {name}")
            total += sum(sizes)
            for path in paths if clear else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{'cleared' if clear else 'in all':12} {total / 2**20:9.1f} MiB")

    return guarded(work)


def dashboard(argv: Sequence[str] | None = None) -> int:
    """Be ``recipes/dashboard.py``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="dashboard.py", description="Write what a W&B report of a comparison shows: sections, panels, filters."
    )
    parser.add_argument("folder", help="folder of the comparison, such as runs/comparison")
    parser.add_argument("--save", default=None, help="file for it, JSON; by default dashboard.json in the folder")
    parser.add_argument("--upload", action="store_true", help='make the report in W&B; needs "hftlight[dashboard]"')
    options = parser.parse_args(argv)

    def work() -> None:
        from hftlight.report.comparison import read_comparison
        from hftlight.runs.dashboard import specification, upload

        spec = specification(read_comparison(options.folder))
        path = Path(options.save or Path(options.folder) / "dashboard.json")
        ensure_writable(path.parent, "--save")
        write_json(path, spec)
        print(f"Written: {path}")
        if options.upload:
            print(f"Report: {upload(spec, path)}")

    return guarded(work)


def quiet() -> None:
    """Keep the libraries' own chatter from drowning the run's."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lightning = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    for name in (*lightning, "bitsandbytes.backends.cpu.ops"):  # the last one wants a faster kernel nobody needs here
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
