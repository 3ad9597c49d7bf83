import copy
import json
from html.parser import HTMLParser

import pytest

from truetune.errors import UserError
from truetune.report import card, write

PLOTS = ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory, GiB"]


class Page(HTMLParser):
    """Elements and attributes as a parser sees them, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.hidden = tag == "style"

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def plots(self) -> list[str]:
        return [value for name, value in self.attributes if name == "aria-label"]


def page(folder) -> Page:
    return Page(write(folder).read_text(encoding="utf-8"))


def without(*names, **changes):
    return lambda facts: {key: value for key, value in (facts | changes).items() if key not in names}


def test_a_complete_run(make_run):
    shown = page(make_run())
    assert shown.plots == PLOTS
    for text in (
        "Finished at step 70 of 70.",
        "Held-out loss 3.587 → 2.882 \u221219.7 %",
        "Perplexity 36.13 → 17.85",
        "Tokens trained 54,120",
        "Target tokens 20,024 (37.0 %)",
        "771 tokens/s, 285 targets/s",
        "7 of 7 held",
        "AMD EPYC 9R14, 2 cores, 16 GiB",
        "As planned in each of 70 steps.",
        "55 of 70 steps were clipped",
        "Dropped: no targets 3 3",
        "Target tokens cut away 87 (0.1 %)",
        "✓ within bound merged runs/x/merged 0.00031 0.001",
        "weight_decay: 0.01",
        "9f86d081884c7d659a2feaa0",
        "truetune ask runs/python-docs-lora",
        "Before training did not stop The `textwrap.dedent(text)` function",
        "After step 70 Remove leading whitespace from each line. Reference Remove any common leading",
    ):
        assert text in shown.text
    assert "/home/someone" not in shown.text, "a path on the machine is nobody's business"


def test_the_page_needs_nothing_from_elsewhere(make_run):
    html = write(make_run(hostile=True)).read_text()
    shown = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(shown.tags)
    assert not {"src", "href", "action", "data"} & {name for name, _ in shown.attributes}
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_hostile_rows_stay_text(make_run):
    good, hostile = page(make_run()), page(make_run(hostile=True, name="hostile"))
    assert set(hostile.tags) <= set(good.tags) | {"div", "ul", "li", "strong", "title", "line"}
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count("</script><script>document.title='owned'</script>") > 15
    assert "{{ 7*7 }}" in hostile.text
    assert not set("\x1b\x07\u202e") & set(hostile.text)


def test_the_targets_of_a_document_are_marked(make_run):
    html = write(make_run()).read_text()
    assert "&lt;|user|&gt;What?\n<mark>Remove &amp; trim.&lt;|end|&gt;</mark></div>" in html


def test_a_long_sample_is_cut(make_run):
    assert "more characters)" in page(make_run(hostile=True)).text


def test_a_failed_check_is_told_first_and_no_throughput_is_quoted(make_run):
    shown = page(make_run(failing=("packing",)))
    head, tail = shown.text.split("Curves", 1)
    assert "1 of 7 checks failed. packing: perturbed neighbour changes the loss by 0, bound 0" in head
    assert "Not quoted: the check “packing” failed" in head
    assert "6 of 7 held" in head
    assert "tokens/s" not in shown.text
    assert "Tokens per second" not in shown.plots and len(shown.plots) == 4
    checks = tail.split("Checks", 1)[1]
    assert checks.index("✗ failed packing") < checks.index("✓ held"), "failures first"
    assert "lower data.max_length, then run truetune check" in checks


def test_an_alarm_that_voids_hides_a_throughput_that_was_written_all_the_same(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        alarm = {"kind": "alarm", "step": 9, "name": "zero gradient", "message": "nothing", "voids": True}
        file.write(json.dumps(alarm) + "\n")
    shown = page(folder)
    assert "Not quoted: zero gradient at step 9: nothing" in shown.text
    assert "1 alarm during the run" in shown.text
    assert "771" not in shown.text


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("interrupted", "Interrupted at step 31 of 70; every figure here is of the part that ran."),
        ("failed", "Failed at step 31 of 70;"),
        ("running", "Still running, or killed, at step 31 of 70;"),
    ],
)
def test_a_run_that_stopped_midway(make_run, status, sentence):
    shown = page(make_run(steps=31, facts=without("result", "exports", "next", status=status, finished=None)))
    assert sentence in shown.text
    assert "3.587 → 3.015" in shown.text, "the last evaluation stands in for the result"
    assert "Tokens trained 23,338" in shown.text and "Not quoted: the run recorded none" in shown.text
    assert "Nothing is exported." in shown.text
    assert shown.plots == PLOTS


def test_a_run_without_steps(make_run):
    shown = page(make_run(steps=0, facts=without("result", status="failed")))
    assert "No training step is recorded." in shown.text
    assert "No evaluation after training is recorded." in shown.text
    assert shown.plots == ["Loss", "Learning rate"], "the first evaluation and the plan"


def test_a_folder_without_run_json(make_run):
    shown = page(make_run(facts=None))
    assert "This folder has no run.json" in shown.text
    assert shown.plots == PLOTS


def test_a_folder_without_metrics(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    shown = page(folder)
    assert "No training step is recorded." in shown.text and "3.587 → 2.882" in shown.text


def test_a_record_cut_by_a_crash_is_left_out_and_said(make_run):
    folder = make_run()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-40])
    assert "The last record was cut" in page(folder).text


def paths(value, above=()):
    for key in value:
        yield (*above, key)
        # Evaluations and counts are whole or absent.
        whole = key in ("before", "after", "dropped", "tokens_by_role", "targets_by_role")
        if isinstance(value[key], dict) and not whole:
            yield from paths(value[key], (*above, key))


def test_any_fact_may_be_missing_or_null(make_run):
    folder = make_run(steps=3)
    facts = json.loads((folder / "run.json").read_text())
    for path in paths(facts):
        for change in (lambda part, key: part.pop(key), lambda part, key: part.update({key: None})):
            changed = copy.deepcopy(facts)
            part = changed
            for name in path[:-1]:
                part = part[name]
            change(part, path[-1])
            (folder / "run.json").write_text(json.dumps(changed))
            try:
                write(folder)
                card(folder, folder)
            except Exception as error:
                raise AssertionError(f"the report fails without {'.'.join(path)}") from error


def test_numbers_that_are_not_finite(make_run):
    folder = make_run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "step" and record["step"] > 60:
            record |= {"loss": None, "gradient_norm": None}
        if record["kind"] == "evaluation" and record["step"] == 70:
            record |= {"loss": None, "perplexity": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    facts = json.loads((folder / "run.json").read_text())
    del facts["result"]
    (folder / "run.json").write_text(json.dumps(facts))
    shown = page(folder)
    assert "3.587 → not finite" in shown.text
    assert "The loss of 10 steps was not finite." in shown.text
    assert "In 10 steps it was zero or not finite." in shown.text


def test_many_alarms_do_not_drown_the_page(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(50):
            alarm = {"kind": "alarm", "step": step, "name": "slow", "message": "x", "voids": False}
            file.write(json.dumps(alarm) + "\n")
    text = page(folder).text
    assert "50 alarms during the run." in text and "and 30 more in metrics.jsonl" in text


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("run.json", "{", "is not valid JSON"),
        ("run.json", "[]", "is not a JSON object"),
        ("metrics.jsonl", '{"kind": "step"\n', "metrics.jsonl:1 is not valid JSON"),
        ("metrics.jsonl", '{"kind": "melody"}\n', "no record that this version knows"),
    ],
)
def test_damaged_files_are_named(make_run, file, content, sentence):
    folder = make_run()
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        write(folder)
    assert not (folder / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="give the folder of a run"):
        write(tmp_path)


def test_one_evaluation_is_the_best(make_run):
    text = write(make_run()).read_text()
    assert text.count("<td>best</td>") == 1 and "best so far" not in text
