"""``hftlight cache``: list or clear the cache."""

import argparse
from collections.abc import Sequence

from hftlight.cache import KINDS, PAID
from hftlight.console import guarded
from hftlight.errors import InputError
from hftlight.files import HASHES, cache_dir, remove, temporaries


def cache(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight cache`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="hftlight cache", description=f"List or clear the cache in {cache_dir()}. Set HFTLIGHT_CACHE to move it."
    )
    parser.add_argument("action", choices=("list", "clear"))
    kinds_help = f"{', '.join(KINDS)}; default: all. clear keeps paid replies unless you name {' or '.join(PAID)}"
    parser.add_argument("kinds", nargs="*", metavar="kind", help=kinds_help)
    options = parser.parse_args(argv)

    def work() -> None:
        unknown = set(options.kinds) - set(KINDS)
        if unknown:
            raise InputError(f"hftlight cache: kinds are {', '.join(KINDS)}, got {', '.join(sorted(unknown))}.")
        total, clear = 0, options.action == "clear"
        for kind in options.kinds or [kind for kind in KINDS if not (clear and kind in PAID)]:
            paths = sorted((cache_dir() / kind).glob("[!.]*"))
            sizes = [sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file()) for path in paths]
            named = zip(sizes, [path.name for path in paths], strict=True)
            if kind in (*PAID, HASHES):  # one small file per reply or per hashed file, so only their sum is listed
                named = zip([sum(sizes)], [f"{len(paths)} files"], strict=True)
            for size, name in named:
                print(f"{kind:12} {size / 2**20:9.1f} MiB  {name}")
            total += sum(sizes)
            if clear:
                remove(paths)
        if not options.kinds:
            paths = temporaries(cache_dir(), age=3600)  # younger ones may belong to a process at work
            size = sum(p.stat().st_size for path in paths for p in (path, *path.rglob("*")) if p.is_file())
            if paths:
                print(f"{'temporary':12} {size / 2**20:9.1f} MiB  {len(paths)} files and folders of killed runs")
            total += size
            if clear:
                remove(paths)
        print(f"{'cleared' if clear else 'in all':12} {total / 2**20:9.1f} MiB")

    return guarded(work)
