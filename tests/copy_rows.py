"""tests/copy_rows.py: begin a run with rows of another, so that both can be compared row by row from there on.

    uv run tests/copy_rows.py results.tsv random --stage baseline strategy=random
    uv run tests/copy_rows.py a/results.tsv b --generation 0 prescreen=1

Writes a results.tsv into a folder in which there is none: the header of the other run with these settings changed, and
its rows of a stage, or of its first generations. `evolve.py --out FOLDER` with those settings then goes on from there.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evolve


def copied(source: Path, out: Path, stage: str | None, generation: int | None, changes: dict) -> int:
    """How many rows were written. Raises Stop."""
    try:
        header, columns, rows = evolve.read_results(source.read_bytes())
    except (OSError, ValueError) as error:
        raise evolve.Stop(f"{source}: {error}") from None
    if columns != list(evolve.COLUMNS):
        raise evolve.Stop(f"{source} has columns of another version")
    if unknown := [name for name in changes if name not in header]:
        raise evolve.Stop(f"{source} has no setting called {', '.join(unknown)}")
    kept = [row for row in rows if row.stage == stage]
    if generation is not None:
        kept += [row for row in rows if row.stage == "search" and row.generation <= generation]
    with evolve.Record(out) as record:
        if record.header is not None:
            raise evolve.Stop(f"{record.path} is there already")
        record.begin(header | {name: type(header[name])(value) for name, value in changes.items()})
        for row in kept:
            record.append(row)
    return len(kept)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=list(evolve.STAGES))
    parser.add_argument("--generation", type=int, help="rows of the search up to this generation")
    parser.add_argument("changes", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_intermixed_args(argv)  # settings may stand behind the flags
    try:
        n = copied(args.source, args.out, args.stage, args.generation, dict(c.split("=", 1) for c in args.changes))
    except evolve.Stop as error:
        sys.exit(str(error))
    print(f"{n} rows in {args.out / 'results.tsv'}")


if __name__ == "__main__":
    main()
