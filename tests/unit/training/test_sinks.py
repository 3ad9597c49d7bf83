import io
import json
import math
import re
import sys
from types import ModuleType

import pytest

from truetune.errors import UserError
from truetune.training.console import Console, folded
from truetune.training.record import (
    Alarm,
    Checks,
    Evaluation,
    Sample,
    Samples,
    Saved,
    Step,
    Verdict,
    as_json,
    from_json,
)
from truetune.training.sinks import (
    JsonLines,
    JsonStream,
    TensorBoard,
    WeightsAndBiases,
    clean,
    duration,
    first_looks,
    size,
)

ESCAPES = "\x1b[2J\x1b]0;owned\x07 \r\x9b31m [bold red]x[/] :smile: \u202etxt"


def step(n: int, **changes) -> Step:
    values = {
        "step": n,
        "loss": 2.5,
        "rate": 3e-4,
        "planned": 3e-4,
        "gradient_norm": 1.25,
        "tokens": 700,
        "targets": 250,
        "documents": 9,
        "micro_batches": 1,
        "seconds": 0.5,
        "memory": 3 * 2**30,
        "tokens_per_second": 1400.0,
    }
    return Step(**values | changes)


def evaluation(n: int, loss: float, best: bool = False) -> Evaluation:
    return Evaluation(n, loss, math.exp(loss), 0.5, 1000, 400, 1.0, best)


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Ascii(io.StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        return super().write(text.encode("ascii").decode())


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


def shown(*records, total=100, quiet=False, file=None, earlier=()) -> str:
    file = file or io.StringIO()
    console = Console(total, quiet=quiet, file=file, earlier=earlier)
    for record in records:
        console.write(record)
    console.close()
    return file.getvalue()


def test_json_lines_are_the_records_in_order_and_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    given = [
        step(1),
        evaluation(1, 2.0),
        Samples(1, (Sample("p", "r", "é\n\ud800", True),)),
        Saved(1, "a", "end"),
    ]
    for record in given:
        sink.write(record)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(as_json(record))) for record in given]
    sink.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_lines_spell_what_is_not_finite_as_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(step(1, loss=value, gradient_norm=value))
    sink.close()
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["loss"] is None and read["gradient_norm"] is None and read["rate"] == 3e-4


def test_json_lines_continue_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for n in range(1, 8):
        sink.write(step(n))
    sink.write(evaluation(4, 2.0))
    sink.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    sink = JsonLines(path, resume_at=4)
    sink.write(step(5, loss=9.0))
    sink.close()
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in read] == [
        *[("step", n) for n in (1, 2, 3, 4)],
        ("evaluation", 4),
        ("step", 5),
    ]
    assert read[-1]["loss"] == 9.0


def test_json_lines_start_anew_without_a_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("something else\n")
    JsonLines(path).close()
    assert path.read_text() == ""


def test_json_lines_refuse_to_continue_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(as_json(step(1))) + "\nnot json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 .*move the file away"):
        JsonLines(path, resume_at=1)
    assert "not json" in path.read_text(), "the file is left as it was"


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for n in (1, 2):
        sink.write(step(n, loss=float(n), tokens_per_second=None if n == 2 else 1400.0))
    sink.write(evaluation(2, 1.5))
    sink.write(Saved(2, "x", "end"))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 1.0), (2, 2.0)]
    assert [e.step for e in events.Scalars("step/tokens_per_second")] == [1], "a voided step has no throughput"
    assert [(e.step, e.value) for e in events.Scalars("evaluation/loss")] == [(2, 1.5)]


def test_tensorboard_forgets_the_steps_that_are_run_again_and_no_other(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_at, steps in ((None, (1, 2, 3, 4)), (2, (3, 4))):
        sink = TensorBoard(tmp_path, resume_at=resume_at)
        for n in steps:
            sink.write(step(n, loss=float(n) + (resume_at or 0)))
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_tensorboard_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'truetune\[tensorboard\]'"):
        TensorBoard(tmp_path)


class FakeWandb(ModuleType):
    """What the sink calls of wandb, and with what."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str = "") -> None:
        super().__init__("wandb")
        self.refusal, self.began, self.logged, self.axes, self.over = refusal, {}, [], [], False

    def Settings(self, **given):
        return given

    def init(self, **given):
        if self.refusal:
            raise self.Error(self.refusal)
        self.began = given
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.over = True


def test_weights_and_biases_gets_scalars_and_recipe_and_nothing_else(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    sink = WeightsAndBiases(tmp_path, "run", "run 2026", {"train": {"steps": 2}})
    secret = Samples(2, (Sample("a private prompt", "r", "a", True),))
    for record in (
        step(1, loss=2.0),
        step(2, tokens_per_second=None),
        evaluation(2, 1.5),
        secret,
        Saved(2, "x", "end"),
    ):
        sink.write(record)
    sink.close()
    assert fake.over and fake.began["project"] == "truetune" and fake.began["config"] == {"train": {"steps": 2}}
    assert fake.began["dir"] == str(tmp_path) and fake.began["resume"] == "allow"
    assert [values["trained_steps"] for values in fake.logged] == [1, 2, 2]
    assert fake.logged[0]["step/loss"] == 2.0 and "step/tokens_per_second" not in fake.logged[1]
    assert fake.logged[2]["evaluation/loss"] == 1.5 and "private" not in str(fake.logged)
    assert ("step/*", "trained_steps") in fake.axes
    keys = [fake.began["id"]]
    for key in ("run 2026", "run 2027"):
        WeightsAndBiases(tmp_path, "run", key, {})
        keys.append(fake.began["id"])
    assert keys[0] == keys[1] != keys[2], "a run that goes on is the same one"
    settings = fake.began["settings"]
    assert settings["disable_code"] and settings["disable_git"] and settings["x_disable_meta"]


def test_weights_and_biases_that_is_missing_or_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'truetune\[wandb\]' or set output\.wandb=false"):
        WeightsAndBiases(tmp_path, "run", "key", {})
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key\nconfigured."))
    with pytest.raises(UserError, match=r"would not begin \(no API key configured\); run wandb login, or set WANDB_"):
        WeightsAndBiases(tmp_path, "run", "key", {})


def test_a_log_file_gets_about_twenty_plain_lines():
    text = shown(*(step(n) for n in range(1, 1001)), total=1000)
    lines = text.splitlines()
    assert 20 <= len(lines) <= 22
    assert "\x1b" not in text and "\r" not in text
    assert lines[0].startswith("step 1/1,000 · loss 2.500 · lr 3.00e-04 · grad 1.25 · 1,400 tokens/s · ")
    assert lines[0].endswith("3 GiB") and "left, done" in lines[0]
    assert lines[-1].startswith("step 1,000/1,000") and "· done ·" in lines[-1]


def test_the_loss_of_a_router_stands_beside_that_of_the_text():
    assert "loss 2.500 · router 0.0123 · lr" in shown(step(1, router_loss=0.01234), total=9)


def test_a_terminal_gets_one_live_line():
    file = Tty()
    text = shown(step(1), step(99), step(100), total=100, file=file)
    assert "\x1b[" in text and "step 100/100" in text and "1,400 tokens/s" in text
    assert "\n" not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).strip().replace("\r", ""), "one line only"


def test_time_left_counts_only_steps_of_this_session(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("truetune.training.console.time.monotonic", lambda: next(clock))
    text = shown(step(51, seconds=2.0), step(55, seconds=2.0), total=100)
    # The session began at 98 s before step 51: five steps in 4 s leave 45 steps at 0.8 s.
    assert "36 s left" in text.splitlines()[-1]


def test_throughput_is_not_quoted_after_void():
    text = shown(step(100, tokens_per_second=None))
    assert "tokens/s not quoted" in text and "1,400" not in text


def test_evaluations_tell_the_change_since_the_first():
    text = shown(evaluation(0, 4.0), evaluation(50, 3.0, best=True))
    assert "step 0: loss 4.0000, perplexity 54.6, accuracy 50.0 %\n" in text
    assert "step 50: loss 3.0000 (-25.0 % since step 0), perplexity 20.09, accuracy 50.0 %, best so far" in text


def test_a_first_loss_of_zero_has_no_relative_change():
    assert "since" not in shown(evaluation(0, 0.0), evaluation(1, 1.0))


def test_prompts_are_printed_once_and_answers_each_time():
    before = Samples(0, (Sample("the prompt", "the reference", "rambling " * 100, False),))
    after = Samples(100, (Sample("the prompt", "the reference", "short", True),))
    text = shown(before, after)
    assert text.count("the prompt") == text.count("the reference") == 1
    assert "(500 more characters) [did not stop]" in " ".join(text.split())
    assert re.search(r"samples    step 100\n1  step 100 +short\s*$", text), "the later answer ended by itself"


def test_a_run_that_goes_on_is_compared_with_its_first_step():
    samples = Samples(0, (Sample("the prompt", "the reference", "first answer", True),))
    earlier = [evaluation(0, 4.0), samples]
    later = Samples(60, (Sample("the prompt", "the reference", "later answer", True),))
    text = shown(evaluation(60, 3.0), later, earlier=earlier)
    assert "loss 3.0000 (-25.0 % since step 0)" in text
    assert [line.split(maxsplit=1)[0] for line in text.splitlines()[2:] if line] == ["1", "reference", "step", "step"]
    assert "first answer" in text and "later answer" in text


def test_a_loss_of_few_documents_says_how_rough_it_is():
    rough = Evaluation(0, 2.0, 7.4, 0.5, 100, 40, 1.0, documents=6, error=0.31)
    text = shown(rough, rough)
    assert "loss 2.0000 ± 0.31, perplexity" in text
    assert text.count("only 6 documents (40 targets) are held out") == 1
    assert "held out, so" not in shown(Evaluation(0, 2.0, 7.4, 0.5, 100, 40, 1.0, documents=30, error=0.31))


def test_a_long_step_is_told_at_least_every_minute(monkeypatch):
    clock = iter([1000.0 + 25 * n for n in range(10)])
    monkeypatch.setattr("truetune.training.console.time.monotonic", lambda: next(clock))
    lines = shown(*(step(n) for n in range(1, 10)), total=100_000).splitlines()
    assert [line.split()[1] for line in lines] == ["1/100,000", "4/100,000", "7/100,000"]


def test_a_line_is_as_wide_as_the_terminal_and_folds_between_its_parts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert re.search(r"step 1/100 · loss[^\n]{60,} · 3 GiB", shown(step(1), file=Tty())), "one line, not cut at 80"
    monkeypatch.setenv("COLUMNS", "40")
    assert "lr 3.00e-04 ·\ngrad 1.25 ·" in shown(step(1), file=Tty()).replace("\r", "")
    parts = ("step 1/100", "loss 2.500", "8.1 s left, done 13:20", "3 GiB")
    for width in range(24, 80):
        lines = folded(parts, width).split("\n")
        assert max(map(len, lines)) <= width and " ".join(lines).split(" · ") == list(parts)


def test_forced_colours_draw_no_live_line_into_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(*(step(n) for n in range(1, 101)))
    assert "\r" not in text and not re.search(r"\x1b\[[0-9]*[A-HJKST]", text)
    assert 20 <= len(text.splitlines()) <= 22


def test_a_stream_of_json_is_the_records_as_they_come():
    file = io.StringIO()
    sink = JsonStream(file)
    sink.write(step(1, loss=math.nan))
    assert json.loads(file.getvalue()) == json.loads(json.dumps(as_json(step(1, loss=math.nan))))
    sink.write(evaluation(1, 2.0))
    assert [json.loads(line)["kind"] for line in file.getvalue().splitlines()] == ["step", "evaluation"]


@pytest.mark.parametrize(
    "record",
    [
        step(3),
        evaluation(3, 2.0, True),
        Samples(1, (Sample("p", "r", "a", True),)),
        Checks(0, (Verdict("x", True, "1"),)),
    ],
)
def test_a_record_comes_back_from_its_json(record):
    assert from_json(json.loads(json.dumps(as_json(record)))) == record


def test_records_that_are_made_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for record in (evaluation(0, 4.0), step(1), step(2), evaluation(2, 3.0), Samples(2, ())):
        sink.write(record)
    sink.close()
    JsonLines(path, resume_at=2, owed=["samples"]).close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()][-2:] == ["step", "evaluation"]
    assert first_looks(path) == [evaluation(0, 4.0)]


def test_checks_and_what_is_learned():
    verdicts = (
        Verdict("labels", True, "0 of 9", "unused"),
        Verdict("leak", False, "0.3, bound 0", "report it"),
    )
    text = shown(Checks(0, verdicts, "question ⟦the answer<eos>⟧"))
    assert "ok         labels: 0 of 9\n" in text
    assert "FAILED     leak: 0.3, bound 0; report it\n" in text
    assert "question ⟦the answer<eos>⟧" in text


def test_quiet_leaves_alarms_and_failed_checks():
    verdicts = (Verdict("labels", True, "0 of 9"), Verdict("leak", False, "0.3, bound 0", "report it"))
    alarm = Alarm(7, "zero gradient", "nothing is learned", voids=True)
    quiet = [Checks(0, verdicts, "x"), step(100), evaluation(1, 2.0), Saved(1, "p", "end"), alarm]
    lines = shown(*quiet, Samples(1, (Sample("p", "r", "a", True),)), quiet=True).splitlines()
    assert lines == [
        "FAILED     leak: 0.3, bound 0; report it",
        "ALARM      step 7, zero gradient: nothing is learned; throughput is not quoted from here on",
    ]


@pytest.mark.parametrize("file", [io.StringIO(), Tty()], ids=["log", "terminal"])
def test_no_row_can_drive_the_terminal(file):
    verdict = Verdict(ESCAPES, False, ESCAPES, ESCAPES)
    text = shown(
        Checks(0, (verdict,), ESCAPES),
        Samples(0, (Sample(ESCAPES, ESCAPES, ESCAPES, False),)),
        Saved(1, ESCAPES, ESCAPES),
        Alarm(1, ESCAPES, ESCAPES, voids=False),
        file=file,
    )
    for harm in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e"):
        assert harm not in text
    assert text.count("[bold red]x[/] :smile:") == 3 + 1 + 4 + 2 + 2 - 1, "markup is shown as it is"


def test_a_terminal_that_cannot_spell_a_character_does_not_stop_the_run():
    answer = Sample("Wie heißt du?", "漢字", "🙂", True)
    assert "Wie hei?t du?" in shown(step(1), Samples(0, (answer,)), file=Ascii())


def test_clean_keeps_text_and_counts_what_it_cuts():
    assert clean("a\tb\n漢🙂é") == "a\tb\n漢🙂é"
    assert clean("\ud800x\x00\x7f\u2066y") == "?xy"
    assert clean("x" * 1500, 500) == "x" * 500 + "… (1,000 more characters)"
    assert clean("x" * 500, 500) == "x" * 500


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.14, "8.1 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (723, "12 min 3 s"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (812 * 2**20, "812 MiB"), (1.43 * 2**30, "1.43 GiB"), (2**37, "128 GiB")],
)
def test_size(count, text):
    assert size(count) == text
