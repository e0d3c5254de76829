"""Are the figures that README.md and runs/README.md quote those of the records and logs beside them?"""

import re
import statistics
from pathlib import Path

import pytest

import evolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = (ROOT / "runs" / "README.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def log(name: str) -> str:
    return (ROOT / "runs" / "bench" / name).read_text(encoding="utf-8")


def in_one_line(text: str) -> str:
    """However its lines are broken."""
    return " ".join(text.split())


def record(folder: str) -> tuple[dict, list[evolve.Result]]:
    """The header and the rows of a run, by its folder."""
    header, _, rows = evolve.read_results((ROOT / folder / "results.tsv").read_bytes())
    return header, rows


def final(folder: str) -> list[evolve.Standing]:
    header, rows = record(folder)
    settings = evolve.settings_of(header, rows)
    return evolve.outcome_of_record(rows, settings, evolve.vocab_size_of(header)).final


def test_the_result_is_that_of_the_records():
    ours, theirs = final("runs/seed0-5s"), final("runs/random-5s")
    baseline = next(s for s in ours if evolve.family_of(s.id))
    for standing, words in ((ours[0], "evolution: "), (baseline, "transformers"), (theirs[0], "random search")):
        (line,) = [line for line in section(README, "What was found").splitlines() if words in line and line[0] == "|"]
        assert line.endswith(f" | {standing.test} | {standing.val} |")
        assert standing is baseline or standing.genome.summary in line


def test_the_report_in_the_root_is_that_of_the_record():
    header, rows = record(".")
    settings, controls = evolve.settings_of(header, rows), evolve.find_controls(ROOT, header)
    pictured = (ROOT / "progress.png").exists()
    assert evolve.report(rows, header, settings, controls, pictured) == (ROOT / "report.md").read_text("utf-8")


def test_the_console_in_the_readme_is_that_of_the_record():
    rows = record("runs/seed0-30s-h100")[1]
    known = {" ".join(evolve.result_text(row).split()) for row in rows}
    shown = section(README, "What you see, and what you read in the morning")
    for line in re.findall(r"^    (g\d+\.\d+ .*)$", shown, re.MULTILINE):
        assert " ".join(line.split()) in known


def test_the_constants_in_the_readme_are_the_defaults():
    words = {2: "two", 3: "three", 4: "four"}
    for text in (
        f"trained for {evolve.TIME_BUDGET:.0f} seconds",
        f"The best {words[evolve.SURVIVORS]} breed",
        f"After {evolve.MAX_GENERATIONS} generations",
        f"`TIME_BUDGET = {evolve.TIME_BUDGET:.0f}` is `--time-budget {evolve.TIME_BUDGET:.0f}`",
    ):
        assert text in in_one_line(README)


def test_the_milliseconds_of_ops_are_those_of_the_log():
    measured = dict(re.findall(r"^  (\w+) {5,}([\d.]+) ms", log("ops-h100.log"), re.MULTILINE))
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| ([\d., ]+) \|$", README, re.MULTILINE)
    quoted = {n: ms for ns, times in table for n, ms in zip(re.findall(r"\w+", ns), times.split(", "), strict=True)}
    assert set(quoted) == set(evolve.OPS)
    for name, ms in quoted.items():
        assert float(ms) == pytest.approx(float(measured[name]), abs=0.0051 if float(ms) < 10 else 0.051), name


def test_the_scores_after_30_s_are_those_of_the_log():
    last = {}  # the four budgets of a design come one after the other
    for name, score in re.findall(r"^(\S.*?) +ok +(1\.\d{4})", log("fidelity-15s.log"), re.MULTILINE):
        last.setdefault(name, []).append(float(score))
    named = re.search(r"a transformer of seven layers has (1\.\d+), the winner (1\.\d+), the winner grown by one step\s"
                      r"(1\.\d+)", README)  # fmt: skip
    for name, quoted in zip(("transformer-7x256", "winner", "winner, grown"), named.groups(), strict=True):
        assert quoted == f"{min(last[name]):.3f}"


def worth() -> dict[str, set[str]]:
    """What bench.py worth measured, by budget: the differences with four digits."""
    logs = {"10 s": ("worth-10s-t4.log", "worth-10s-w.log", "worth-10s-more.log"), "30 s": ("worth-30s-t4.log",)}
    found = {budget: "".join(map(log, names)) for budget, names in logs.items()}
    pattern = re.compile(r"^  (?:t4|w).* ([+-]0\.\d{4}) ", re.MULTILINE)
    return {budget: set(pattern.findall(text)) for budget, text in found.items()}


def test_what_choices_are_worth_is_what_the_logs_say():
    text = section(RUNS, "What the choices of the space are worth")
    (first, _, second), measured = text.partition("| added to t4, 30 s |"), worth()
    for table, budget in ((first, "10 s"), (second, "30 s")):
        quoted = [n for line in table.splitlines() if line[:1] == "|" for n in re.findall(r"[+-]0\.\d{4}", line)]
        assert len(quoted) > 4 and set(quoted) <= measured[budget]
    for name, noise in zip(("t4", "w"), re.findall(r"is (0\.\d{4}) on t4 and (0\.\d{4}) on w", text)[0], strict=True):
        assert f"noise of one difference {noise};" in log(f"worth-10s-{name}.log")


def test_two_rows_of_the_table_of_ops_say_what_tables_are_worth():
    measured = dict(re.findall(r"^  t4: ngram in front, (.*?) +(-0\.\d{4}) ", log("worth-10s-t4.log"), re.MULTILINE))
    usual, more = (f"{-float(measured[name]):.3f}" for name in ("as usual", "slots 16384"))
    assert f"worth {usual} bits per byte, with 16,384 rows {more}" in README


def test_the_finals_are_those_of_the_records():
    folders = [str(path.parent) for path in ROOT.glob("runs/*/results.tsv")]
    reached = {(str(s.test), str(s.val)) for folder in folders for s in final(folder)}
    tables = section(RUNS, "The finals") + section(RUNS, "The transformers")
    quoted = re.findall(r"\| (1\.\d{4} ± 0\.\d{4}) \| (1\.\d{4} ± 0\.\d{4}) \|", tables)
    assert len(quoted) == 14 and set(quoted) <= reached


def test_the_table_of_the_frame_is_that_of_the_logs():
    rows = [
        line.split(" | ") for line in section(RUNS, "Speed").splitlines() if line.startswith(("| commit", "| three"))
    ]
    compared, framed = log("compare-h200.log").split("\nafter"), log("speed-frame-h200.log").split("\nafter")
    for row, logs in zip(rows, ((compared[0],), (framed[0],), (framed[1], compared[1])), strict=True):
        text = "\n".join(logs)
        frames = re.findall(r"^    frame ([\d.]+),", text, re.MULTILINE) or re.findall(
            r"^frame: ([\d.]+) ms", text, re.MULTILINE
        )
        assert all(any(abs(float(quoted) - float(ms)) < 0.0061 for ms in frames) for quoted in row[1][:-3].split(", "))
        assert row[2].split(", ") == re.findall(r"ratio ([\d.]+)", text)
        winner = re.findall(
            r"best_genome.json: [\d.]+, ([\d.]+) M|^winner: [\d.]+ ms, [\d.]+ ([\d.]+) ", text, re.MULTILINE
        )
        assert row[3].removesuffix(" M tokens/s").split(", ") == [f"{float(a or b):.2f}" for a, b in winner]
        for k, name in enumerate(("winner", "transformer-6x256")):
            if scores := re.findall(rf"^{name} 10 s: ([\d. ]+) \d+ MiB", text, re.MULTILINE):
                assert row[4].split(", ")[k] == f"{statistics.fmean(map(float, scores[0].split())):.4f}"
                (peak,) = re.findall(rf"^{name}: .* peak ([\d.]+) GiB", text, re.MULTILINE)
                assert row[5].removesuffix(" GiB |").split(", ")[k] == peak


def test_what_inheritance_is_worth_is_what_the_log_says():
    text = in_one_line(section(RUNS, "Do inherited weights tell more than a short trial?"))
    quoted, measured = (re.findall(r"0\.\d\d \(0\.\d\d to 0\.\d\d\)", t) for t in (text, log("inherit-h200.log")))
    assert quoted == measured and len(quoted) == 2


def parts_among_survivors(rows: list[evolve.Result]) -> str:
    """Which of three parts stand in one of the three survivors."""
    attentions = [dict(node.gene.traits) for c in evolve.searched(rows)[:3] for node in c.genome.network
                  if node.gene.op == "attention"]  # fmt: skip
    found = {
        "convolution": any(traits["conv"] for traits in attentions),
        "values": any(traits["values"] != "plain" for traits in attentions),
        "n-grams": any("ngram" in c.genome.ops for c in evolve.searched(rows)[:3]),
    }
    return ", ".join(name for name, stands in found.items() if stands)


def test_the_table_of_pairs_is_that_of_the_records():
    lines = re.findall(r"^\| (\d+), commit .* \|$", section(RUNS, "Which search finds most"), re.MULTILINE)
    assert {f"seed{seed}-prescreen{n}" for seed in lines for n in (1, 50)} == {
        path.name for path in (ROOT / "runs" / "pairs-5s").iterdir()
    }
    for seed in lines:
        best, noise, parts = [], [], []
        for n in (1, 50):
            header, rows = record(f"runs/pairs-5s/seed{seed}-prescreen{n}")
            assert (header["prescreen"], header["seed"], len(rows)) == (n, int(seed), 144)
            best.append(evolve.searched(rows)[0])
            noise.append(f"{evolve.noise_floor(rows):.4f}")
            parts.append(parts_among_survivors(rows))
        scores = [f"{c.mean:.4f} ({f'mean of {c.tried}' if c.tried > 1 else 'one'})" for c in best]
        difference = f"{best[1].mean - best[0].mean:+.4f}"
        told = " | ".join([*scores, difference, ", ".join(noise), *parts])
        assert re.search(rf"^\| {seed}, commit [^|]* \| {re.escape(told)} \|$", RUNS, re.MULTILINE), told


def test_what_the_regression_foretells_is_what_the_log_says():
    names = {"seed 0": ["seed0-5s"], "seed 1": ["seed1-5s"]}
    names |= {f"{name} control": [f"{name}-5s"] for name in ("random", "drift")}
    for n in (11, 12, 13, 14, 15):
        names[f"pair of seed {n}, PRESCREEN 1 / 50"] = [f"pairs-5s/seed{n}-prescreen{k}" for k in (1, 50)]
    measured = {
        name: (belief, parents if parents == "None" else f"{float(parents):.2f}", n)
        for name, belief, parents, n in re.findall(
            r"^(\S+): belief ([\d.]+), parents (\S+), (\d+) newcomers", log("records.log"), re.MULTILINE
        )
    }
    assert {name for own in names.values() for name in own} == set(measured)
    for name, own in names.items():
        beliefs, parents, newcomers = (" / ".join(texts) for texts in zip(*(measured[n] for n in own), strict=True))
        told = rf"^\| {name} \| {newcomers} \| {parents.replace('None', '')} ?\| .*\| {beliefs} \|$"
        assert re.search(told, RUNS, re.MULTILINE), told


def test_which_strategy_finds_most_is_what_the_log_says():
    text, (_, *lines) = section(RUNS, "Which search finds most"), log("strategies.log").splitlines()
    assert len(lines) == 30  # seven strategies in four ways, and two controls
    column = {"prescreen=1": 2, "prescreen=1 repeats=1": 4, "prescreen=50": 5, "prescreen=50 repeats=1": 7}
    for line in lines:
        name, searched, score, difference = re.match(r"(\w+) (\S+(?: repeats=1)?) +(\S+) +(\S+ ± \S+)", line).groups()
        (told,) = re.findall(rf"^\| (?:control )?{name} \| 1.*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in told.split("|")]
        assert cells[column[searched]] == score
        against = cells[column[searched] + 1].removeprefix("+") or "0.0000 ± 0.0000"
        assert "repeats" in searched or against == difference


def earned(names: list[str]) -> dict[str, tuple[int, int, float]]:
    """What the children of single operators came to in some records: how many there are, how many are better than their
    parent's mean by more than 0.004, and by how much these are, per child."""
    gains = {}
    for name in names:
        rows = record(f"runs/{name}")[1]
        known = {c.id: c for c in evolve.searched(rows)}
        for row in rows:
            if row.is_newcomer and row.parents in known:  # of one parent
                parent, genome = known[row.parents], evolve.Genome.from_json(row.genome)
                wider = genome.embed_dim - parent.genome.embed_dim
                what = row.operator + (f" {(wider > 0) - (wider < 0):+}" if row.operator == "change_width" else "")
                gains.setdefault(what, []).append(parent.mean - row.val_bpb if row.status == "ok" else -1.0)
    better = {what: [gain for gain in own if gain > 0.004] for what, own in gains.items()}
    return {what: (len(own), len(better[what]), sum(better[what]) / len(own)) for what, own in gains.items()}


def test_what_operators_earned_is_what_the_records_say():
    folders = [path.parent.relative_to(ROOT / "runs") for path in (ROOT / "runs").rglob("results.tsv")]
    measured = earned([str(folder) for folder in folders if folder.name.startswith("seed")])
    names = {"all widths, wider": "change_width +1", "all widths, narrower": "change_width -1",
             "the width of one gene": "change_width +0"}  # fmt: skip
    lines = re.findall(
        r"^\| ([\w, ]+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", section(RUNS, "Which search finds most"), re.M
    )
    assert len(lines) == 7
    for what, children, better, gain in lines:
        n, good, mean = measured[names.get(what, what.replace(" ", "_"))]
        assert (int(children), int(better), gain) == (n, good, f"{mean:.4f}"), what
    sizes = {c.id: c.mean for c in evolve.candidates(evolve.of_stage(record("runs/seed0-30s-h100")[1], "baseline"))}
    gain = sizes["transformer-7x192"] - sizes["transformer-7x256"]
    assert f"a transformer of seven layers gains {gain:.3f} from width 192 to 256" in in_one_line(RUNS)


def test_what_wider_networks_are_worth_on_landscapes_is_what_the_log_says():
    quoted = re.findall(r"-?0\.\d{4} ± 0\.\d{4}", log("sizes.log"))
    assert len(quoted) == 2 and all(words in in_one_line(RUNS) for words in quoted)
