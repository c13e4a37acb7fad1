"""report.html in a real browser: headless Chromium, spoken to over its DevTools pipe (https://chromedevtools.github.io/devtools-protocol/).

Needs a Chromium. Without one these tests fail in CI (CI=true) and are skipped elsewhere.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kubepeft.manifest import load
from kubepeft.types import BatchInference
from kubepeft_jobs.report.chart import LARGEST, Point, Series, histogram, line_chart, short
from kubepeft_jobs.report.data import Attempt, ReportData, Sample
from kubepeft_jobs.report.page import MAX_ROWS, SHOWN_SAMPLES, compact, duration, number, render, size
from tests.tiny import tiny_causal, tiny_seq2seq

HOSTILE = (
    "</style></pre></title><script>document.title = 'owned'</script>"
    "<img src='https://example.com/x.png' onerror=\"document.title = 'owned'\">"
    "{{ 7 * 7 }} {% raw %} <!-- ]]> &amp; & \" ' \x00\x1b[31m \udc80 \ufffe \u202e txt.exe"
)
HOSTILE_SHOWN = HOSTILE.translate({0x00: "\u2400", 0x1B: "\u241b", 0xDC80: "\ufffd", 0xFFFE: "\ufffd"})
SVG = "{http://www.w3.org/2000/svg}"


def report(**changes: Any) -> ReportData:
    """A whole report of a run of 60 steps with 6 evaluations, one resume and eight samples."""
    history: list[dict[str, float]] = []
    for step in range(2, 61, 2):
        rate = 2e-4 * min(step / 10, (70 - step) / 60)
        logged = {
            "loss": 2.5 / (1 + step / 10),
            "learning_rate": rate,
            "grad_norm": 1.5,
            "tokens_per_second": 900.0 + step,
        }
        history.append({"step": step, "epoch": step / 20, **logged})
        if step % 10 == 0:
            history.append({"step": step, "epoch": step / 20, "eval_loss": 2.6 / (1 + step / 10), "eval_runtime": 0.3})
    history.append({"step": 60, "epoch": 3.0, "train_runtime": 20.0, "train_loss": 0.9})
    data = ReportData(
        name="support-bot", created_at="2025-11-04T14:03:22Z", task="CAUSAL_LM", method="LORA",
        method_config={"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "rank_pattern": {}},
        base="Qwen/Qwen2.5-0.5B-Instruct", base_commit="7ae557604adf67be50417f59c2c2f167def9a775", base_bytes=988_097_824,
        adapter_uri="s3://adapters/support-bot/adapter", adapter_bytes=4_338_000, trainable_parameters=1_081_344, total_parameters=495_114_112,
        history=history, base_eval_loss=2.713, eval_loss=0.4621, seconds=4217.3,
        prepared={
            "format": "messages", "format_why": "every row has a column messages", "columns": {"messages": "conversation"}, "loss": "completion",
            "max_length": 100, "rows_read": 1013, "rows_kept": 1000, "rows_bad": 1, "rows_dropped_too_long": 12, "rows_dropped_no_loss": 0,
            "rows_truncated": 37, "train": {"rows": 900, "tokens": 40_000, "loss_tokens": 9000, "files": ["s3://datasets/a.jsonl"]},
            "eval": {"rows": 100, "tokens": 4400, "loss_tokens": 1000, "files": ["s3://datasets/eval.jsonl"]},
            "lengths": {"edges": [0, 8, 16, 32, 64, 128], "counts": [0, 12, 500, 400, 101], "mean": 33.0, "p50": 30, "p90": 70, "p99": 120, "longest": 127},
            "bad_rows": [{"where": "s3://datasets/a.jsonl:17", "reason": "not JSON"}], "samples": [], "notes": ["3 rows have several answers"],
        },
        samples=[Sample(f"prompt {index}", f"answer {index}", "no idea", f"answer {index}\n" if index else "wrong") for index in range(8)],
        attempts=[Attempt("2025-11-04T12:40:01Z", 0, 40, "out of memory with micro-batch 8"), Attempt("2025-11-04T13:11:40Z", 30, 60)],
        lineage={"specDigest": "v1:3f0b", "packages": {"torch": "2.15.0"}, "image": None},
        packing="packed end to end without padding", vllm_command="vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora",
    )  # fmt: skip
    return dataclasses.replace(data, **changes)


class Browser:
    """A headless Chromium with a profile of its own, and what it said: `problems` and `requests`."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
    )  # fmt: skip

    def __init__(self, program: str, profile: Path) -> None:
        command_read, self._to = os.pipe()
        self._from, answer_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{command_read} 4>&{answer_write}', "bash", program, *self.FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(command_read, answer_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command_read)
        os.close(answer_write)
        self._buffer = b""
        self._id = 0
        self._loaded = False
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", session=False, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=False, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path) -> None:
        """Load a page and give it a moment to do what it should not."""
        self.problems, self.requests, self._loaded = [], [], False
        self.call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._handle(self._read())
        time.sleep(0.2)
        self.evaluate("document.title")  # takes in what was said meanwhile

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def show(self, *, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "screen") -> None:
        """Set the window's size in CSS pixels, the colour scheme and the medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        picture: str = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return base64.b64decode(picture)

    def close(self) -> None:
        os.close(self._to)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def call(self, method: str, *, session: bool = True, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params} | (
            {"sessionId": self._session} if session else {}
        )
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._handle(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._from, 1 << 16)
            assert piece, "Chromium has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _handle(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded":
                self.problems.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.problems.append(json.dumps(params))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no Chromium on this machine: CI must have one (Debian's package chromium)")
        pytest.skip("no Chromium on this machine (Debian's package chromium)")
    started = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Writes a page, opens it in a desktop window, and checks that it is quiet."""

    def open_page(page: str) -> Browser:
        file = tmp_path / "report.html"
        file.write_text(page, encoding="utf-8")
        browser.show()
        browser.open(file)
        assert browser.problems == []
        assert browser.requests == [file.as_uri()]
        return browser

    return open_page


def parsed(page: str) -> ET.Element:
    """The page's tree, read strictly: as XML, which refuses a tag or attribute that an HTML parser would mend."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def tree(element: ET.Element) -> list[Any]:
    return [element.tag.rpartition("}")[2].lower(), [tree(child) for child in element]]


IN_BROWSER_TREE = (
    "(function tree(e) { return [e.localName.toLowerCase(), Array.from(e.children, tree)] })(document.documentElement)"
)
TEXT = "document.body.innerText"


def test_a_whole_report_is_quiet_in_the_browser_and_its_tree_is_the_one_written(opened: Any) -> None:
    page = render(report())
    browser = opened(page)
    assert browser.evaluate(IN_BROWSER_TREE) == tree(parsed(page))
    assert browser.evaluate("document.compatMode") == "CSS1Compat"


def test_the_browser_of_these_tests_notices_a_page_that_fetches_or_fails(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><title>t</title><img src='missing.png'><script>console.error('oh'); absent()</script>"
    )
    browser.open(bad)
    assert browser.requests == [bad.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert len(browser.problems) >= 2


def test_the_loaded_page_says_the_result_the_figures_and_every_part(opened: Any) -> None:
    browser = opened(render(report()))
    text = browser.evaluate(TEXT).replace("\u202f", " ")
    for said in (
        "support-bot", "2025-11-04 14:03 UTC", "Evaluation loss fell from 2.713 (base) to 0.4621 (adapter) nats per token, 83 % less.",
        "Of 8 sample answers, 7 from the adapter and 0 from the base equal the expected one.",
        "1.08 M", "0.22 % of 495 M", "4.34 MB", "0.44 % of the base's 988 MB", "3 epochs", "120 k", "40 k in the data", "1 h 10 min", "931",
        "perplexity 1.59", "resumed", "truncated\n37", "dropped, too long\n12", "maxLength 100", "messages from conversation",
        "out of memory with micro-batch 8", "went on from a checkpoint", "3 rows have several answers", "packed end to end without padding",
        "q_proj, v_proj", "packages.torch", "v1:3f0b", "AutoPeftModelForCausalLM.from_pretrained(folder)",
        "aws s3 cp --recursive s3://adapters/support-bot/adapter adapter", "vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora",
    ):  # fmt: skip
        assert said in text, said
    assert "modules_to_save" not in text
    assert browser.evaluate("Array.from(document.querySelectorAll('h2'), e => e.innerText)") == [
        "Training", "Base against adapter", "Samples before and after", "Use it", "Data", "Attempts", "Method", "Lineage",
    ]  # fmt: skip
    assert browser.evaluate("Array.from(document.querySelectorAll('#training h3'), e => e.innerText)") == [
        "Loss", "Learning rate", "Gradient norm", "Throughput",
    ]  # fmt: skip


def test_the_curves_lie_inside_their_plots_and_points_tell_step_and_value(opened: Any) -> None:
    browser = opened(render(report()))
    outside = """Array.from(document.querySelectorAll('svg.chart')).flatMap(chart => {
      const box = chart.getBoundingClientRect();
      return Array.from(chart.querySelectorAll('.curve, .dot, .bar, .level')).map(e => e.getBoundingClientRect())
        .filter(r => r.left < box.left - 8 || r.right > box.right + 8 || r.top < box.top - 8 || r.bottom > box.bottom + 8)
    }).length"""
    assert browser.evaluate(outside) == 0
    assert browser.evaluate("document.querySelector('.large .blue path.curve').getBoundingClientRect().height") > 100
    titles = browser.evaluate("Array.from(document.querySelectorAll('#training .large title'), e => e.textContent)")
    assert "step 2 (epoch 0.10): training loss 2.083" in titles
    assert "step 60 (epoch 3.00): evaluation loss 0.3714" in titles
    assert "base 2.713" in titles
    lengths = browser.evaluate("Array.from(document.querySelectorAll('#lengths title'), e => e.textContent)")
    assert lengths[1] == "16 to 31: 500 rows, 49 %"


def test_answers_are_marked_where_they_equal_the_expected_one(opened: Any) -> None:
    browser = opened(render(report()))
    marks = browser.evaluate(
        "Array.from(document.querySelectorAll('.sample'), s => Array.from(s.querySelectorAll('.verdict'), e => e.innerText))"
    )
    assert marks[0] == ["✗ differs", "✗ differs"]
    assert marks[1] == ["✗ differs", "✓ as expected"]
    assert browser.evaluate("document.querySelectorAll('#samples details .sample').length") == 8 - SHOWN_SAMPLES
    unjudged = opened(render(report(samples=[Sample("p", " ", "b", "a")])))
    assert unjudged.evaluate("document.querySelectorAll('.verdict').length") == 0


def test_hostile_text_stays_text_wherever_it_stands(opened: Any) -> None:
    plain = report(samples=[Sample("p", "e", "b", "a")])
    prepared = plain.prepared | {
        "format": HOSTILE, "format_why": HOSTILE, "columns": {HOSTILE: HOSTILE}, "loss": HOSTILE, "notes": [HOSTILE],
        "bad_rows": [{"where": HOSTILE, "reason": HOSTILE}], "train": {"rows": 1, "files": [HOSTILE]},
    }  # fmt: skip
    hostile = report(
        name=HOSTILE, created_at=HOSTILE, task=HOSTILE, method=HOSTILE, method_config={HOSTILE: HOSTILE, "list": [HOSTILE]}, base=HOSTILE,
        base_commit=HOSTILE, adapter_uri=HOSTILE, prepared=prepared, samples=[Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        attempts=[Attempt(HOSTILE, 0, 1, HOSTILE)], lineage={HOSTILE: {HOSTILE: HOSTILE}}, packing=HOSTILE, vllm=HOSTILE, vllm_command=HOSTILE,
    )  # fmt: skip
    page = render(hostile)
    browser = opened(page)
    assert browser.evaluate(IN_BROWSER_TREE) == tree(parsed(page))
    assert browser.evaluate("document.title") == " ".join(f"{HOSTILE_SHOWN} · training report".split())
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.evaluate("Array.from(document.querySelectorAll('.said'), e => e.textContent)") == [HOSTILE_SHOWN] * 4
    assert browser.evaluate("document.querySelectorAll('.sample .hit').length") == 2
    assert page.encode().count(b"<script") == 0


def test_a_script_that_got_into_the_page_would_not_run(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        render(report()).replace("</body>", "<script>document.title = 'owned'</script></body>"), encoding="utf-8"
    )
    browser.open(page)
    assert browser.evaluate("document.title") == "support-bot · training report"
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_parts_without_data_are_left_out(opened: Any) -> None:
    bare = report(
        history=[], samples=[], attempts=[], lineage={}, prepared={}, method_config={}, base_eval_loss=None, eval_loss=None, packing="",
        vllm_command=None,
    )  # fmt: skip
    page = render(bare)
    browser = opened(page)
    assert browser.evaluate(IN_BROWSER_TREE) == tree(parsed(page))
    assert browser.evaluate("Array.from(document.querySelectorAll('h2'), e => e.innerText)") == ["Use it"]
    assert (
        browser.evaluate("document.getElementById('result').innerText")
        == "There was no evaluation data to judge the adapter by."
    )
    assert browser.evaluate("Array.from(document.querySelectorAll('h3'), e => e.innerText)") == [
        "Fetch the files",
        "With PEFT",
        "In batch",
    ]


def test_a_report_without_evaluation_tells_the_course_of_the_training_loss(opened: Any) -> None:
    history = [entry for entry in report().history if "eval_loss" not in entry]
    browser = opened(render(report(history=history, base_eval_loss=None, eval_loss=None)))
    assert "Training loss went from 2.083 to 0.3571 nats per token." in browser.evaluate(
        "document.getElementById('result').innerText"
    )
    assert browser.evaluate("document.querySelectorAll('.large .orange').length") == 0
    assert browser.evaluate("document.querySelectorAll('#numbers tbody tr').length") == 30


def test_values_that_are_not_numbers_are_told_and_break_nothing(opened: Any) -> None:
    nan, inf = math.nan, math.inf
    history: list[Any] = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-320, "grad_norm": nan}, {"step": 2, "loss": nan, "grad_norm": inf},
        {"step": 3, "loss": inf, "learning_rate": None}, {"step": 4, "loss": 2.0, "epoch": nan}, {"step": nan, "loss": 1.0}, {"loss": 1.0}, {},
        {"step": 5, "loss": 1e300, "eval_loss": nan, "tokens_per_second": "fast"},
    ]  # fmt: skip
    prepared = {
        "lengths": {"edges": [0, 8], "counts": [nan], "p50": None}, "train": None, "max_length": "x", "rows_read": nan, "notes": None, "eval": {},
    }  # fmt: skip
    page = render(report(
        history=history, base_eval_loss=2.0, eval_loss=nan, prepared=prepared, seconds=nan, base_bytes=0, adapter_bytes=0, total_parameters=0,
        method_config={"dropout": nan}, lineage={"loss": inf},
    ))  # fmt: skip
    browser = opened(page)
    text = browser.evaluate(TEXT)
    assert "The training loss was NaN or infinite 3 times, first at step 2." in text
    assert "The evaluation loss with the adapter is NaN" in text
    assert (
        browser.evaluate("document.querySelector('.large .blue .curve[d]').getAttribute('d').match(/M/g).length") == 2
    )
    assert "NaN" not in "".join(
        browser.evaluate("Array.from(document.querySelectorAll('path'), e => e.getAttribute('d'))")
    )


@pytest.mark.parametrize(
    "loss", [[1.0], [0.0], [1.0, 1.0], [-1.0, 1.0], [1e-300, 1e29], [5.0, 5.0 + 1e-14], [5e-324, 0.0]]
)
def test_any_values_find_an_axis(loss: list[float], opened: Any) -> None:
    browser = opened(
        render(report(history=[{"step": step, "loss": value} for step, value in enumerate(loss)], base_eval_loss=None))
    )
    ticks = browser.evaluate(
        "Array.from(document.querySelectorAll('.large .tick[text-anchor=end]'), e => e.textContent)"
    )
    assert 2 <= len(ticks) <= 8
    assert len(ticks) == len(set(ticks))


def test_an_adapter_worse_than_its_base_is_said_to_be(opened: Any) -> None:
    browser = opened(render(report(base_eval_loss=0.4, eval_loss=0.5)))
    assert "rose from 0.4 (base) to 0.5 (adapter) nats per token, 25 % more: the adapter is worse" in browser.evaluate(
        TEXT
    )
    assert browser.evaluate("document.querySelectorAll('.verdict-card.bad').length") == 1


def test_ten_thousand_logged_steps_stay_a_light_page_and_no_spike_is_lost(opened: Any) -> None:
    history = [
        {
            "step": step,
            "epoch": step / 5000,
            "loss": 2.0,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_second": 10.0,
        }
        for step in range(1, 10_001)
    ]
    history[6000]["loss"] = 9.0
    page = render(report(history=history))
    assert len(page.encode()) < 300_000
    browser = opened(page)
    text = browser.evaluate("document.querySelector('.large').innerText")
    assert "The line shows means of 25 logged values each, the shade their range." in text
    spike = browser.evaluate(
        "(r => r.top - document.querySelector('.large .chart').getBoundingClientRect().top)(document.querySelector('.large .range').getBoundingClientRect())"
    )
    height = browser.evaluate("document.querySelector('.large .chart').getBoundingClientRect().height")
    assert spike < 0.2 * height  # the shade reaches 9 on an axis to 10
    assert browser.evaluate("document.querySelectorAll('#numbers tbody tr').length") <= MAX_ROWS
    assert browser.evaluate("document.querySelector('#numbers tbody tr:last-child td').textContent") == "10,000"


def test_long_texts_and_many_samples_are_cut_and_say_so(opened: Any) -> None:
    page = render(report(samples=[Sample("x" * 1_000_000, "e", "b", "a")] * 200))
    assert len(page) < 500_000
    text = opened(page).evaluate("document.getElementById('samples').textContent")
    assert "… 996,000 more characters" in text
    assert "140 further samples are not shown." in text


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(width: int, opened: Any) -> None:
    long = "x" * 500
    data = report(
        name=long,
        base=f"s3://{long}",
        samples=[Sample(long, long, long, long)],
        lineage={long: long, "image": long},
        vllm_command=long,
    )
    browser = opened(render(data))
    browser.show(width=width)
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    texts = "Array.from(document.querySelectorAll('.said, .facts, h1, td'))"
    assert browser.evaluate(f"{texts}.filter(e => e.scrollWidth > e.clientWidth + 1).length") == 0
    sizes = browser.evaluate(
        "Array.from(document.querySelectorAll('svg text'), e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_the_page_follows_the_colour_scheme_and_prints_dark_on_white(opened: Any) -> None:
    browser = opened(render(report()))
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert min(browser.evaluate(background)) > 230
    browser.show(scheme="dark")
    assert max(browser.evaluate(background)) < 40
    browser.show(scheme="dark", media="print")
    assert browser.evaluate(background) == [255, 255, 255]
    assert browser.evaluate("getComputedStyle(document.querySelector('.said')).maxHeight") == "none"


@pytest.mark.parametrize(
    ("changes", "expected", "unexpected"),
    [
        (
            {"task": "SEQ_2_SEQ_LM", "prepared": {}},
            ["AutoPeftModelForSeq2SeqLM.from_pretrained(folder)", "decode(output,"],
            ["chat_template"],
        ),
        (
            {"adapter_uri": "file:///tmp/a b/adapter"},
            ['folder = "/tmp/a b/adapter"', 'uri: "file:///tmp/a b/adapter"'],
            ["aws s3"],
        ),
        (
            {"base": "s3://models/qwen"},
            ["PeftModel.from_pretrained(base, folder)", "aws s3 cp --recursive s3://models/qwen base"],
            ["AutoPeftModelForCausalLM"],
        ),
        (
            {"vllm_command": None, "vllm": "its method is IA3"},
            ["vLLM cannot serve this adapter: its method is IA3"],
            ["vllm serve"],
        ),
    ],
)
def test_the_code_to_use_it_fits_task_place_and_base(
    changes: dict[str, Any], expected: list[str], unexpected: list[str], opened: Any
) -> None:
    browser = opened(render(report(**changes)))
    text = browser.evaluate("document.getElementById('use').innerText")
    assert [said for said in expected if said not in text] == []
    assert [said for said in unexpected if said in text] == []
    code = browser.evaluate(
        "Array.from(document.querySelectorAll('#use pre'), e => e.innerText).find(text => text.startsWith('from peft'))"
    )
    compile(code, "snippet", "exec")


def test_a_positive_series_over_a_wide_range_gets_a_logarithmic_axis() -> None:
    wide = line_chart(
        [Series("loss", "blue", [Point(1, 8.0, ""), Point(2, 0.01, "")])], unit="", may_be_logarithmic=True
    )
    narrow = line_chart(
        [Series("loss", "blue", [Point(1, 8.0, ""), Point(2, 1.0, "")])], unit="", may_be_logarithmic=True
    )
    assert wide is not None
    assert wide.logarithmic
    assert [tick.label for tick in wide.y_ticks] == ["0.01", "0.1", "1"]
    assert narrow is not None
    assert not narrow.logarithmic
    assert [tick.label for tick in narrow.y_ticks] == ["0", "2", "4", "6", "8"]
    assert line_chart([Series("loss", "blue", [Point(1, LARGEST, "")])], unit="") is None


def test_a_histogram_drops_empty_ends_and_marks_the_limit_in_its_bucket() -> None:
    chart = histogram([0, 8, 16, 32, 2**31], [0, 3, 1, 4], thing="rows", limit=24, limit_label="max")
    assert chart is not None
    assert [bar.text for bar in chart.bars] == [
        "8 to 15: 3 rows, 38 %",
        "16 to 31: 1 rows, 12 %",
        "32 or more: 4 rows, 50 %",
    ]
    assert chart.marks[0].at == 50.0
    assert histogram([0, 8], [0], thing="rows") is None
    assert histogram([], [], thing="rows") is None


def test_numbers_are_worded_for_people() -> None:
    values = [0, 0.25, 1200, 15_000, 2_500_000, 2e-4, -3.0]
    assert [short(value) for value in values] == ["0", "0.25", "1,200", "15k", "2.5M", "2e-4", "-3"]
    assert [compact(value).replace("\u202f", " ") for value in (942, 9999, 12_345, 1_081_344, 7.6e9)] == [
        "942",
        "9,999",
        "12.3 k",
        "1.08 M",
        "7.6 G",
    ]
    assert [size(value).replace("\u202f", " ") for value in (0, 999, 4_338_000, 1.5e10)] == [
        "0 B",
        "999 B",
        "4.34 MB",
        "15 GB",
    ]
    assert [duration(value).replace("\u202f", " ") for value in (0.5, 59, 61, 3599.7, 90_000, 400_000)] == [
        "0.5 s", "59 s", "1 min 1 s", "1 h 0 min", "25 h 0 min", "4 d 15 h",
    ]  # fmt: skip
    assert [number(value) for value in (None, math.nan, -math.inf, 0.46213, 123456.7)] == [
        "–",
        "NaN",
        "−∞",
        "0.4621",
        "123,457",
    ]


@pytest.mark.parametrize("adapter_uri", ["s3://adapters/support-bot/adapter", "file:///srv/run: 1/adapter"])
def test_the_manifest_for_batch_inference_is_one_that_kubepeft_takes(adapter_uri: str, opened: Any) -> None:
    browser = opened(render(report(adapter_uri=adapter_uri, name="a" * 52)))
    blocks = browser.evaluate("Array.from(document.querySelectorAll('#use pre'), e => e.innerText)")
    [manifest] = [block for block in blocks if "BatchInference" in block]
    [loaded] = load(manifest, "report.html", local=True)
    assert isinstance(loaded, BatchInference)
    assert loaded.spec.adapter.uri == adapter_uri


@pytest.mark.parametrize(("task", "base_by_uri"), [("CAUSAL_LM", False), ("SEQ_2_SEQ_LM", True)])
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's, at transformers 5
def test_the_code_for_peft_runs_as_it_stands(
    task: str, base_by_uri: bool, tmp_path: Path, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = task == "CAUSAL_LM"
    base = tiny_causal(tmp_path / "base") if causal else tiny_seq2seq(tmp_path / "base")
    model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(base)
    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(task_type=task, target_modules="all-linear")).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    prepared = {"format": "messages"} if causal else {"format": "prompt-completion"}
    uri = f"file://{base}" if base_by_uri else str(base)
    browser = opened(render(report(task=task, prepared=prepared, base=uri, adapter_uri=f"file://{adapter}")))
    blocks = browser.evaluate("Array.from(document.querySelectorAll('#use pre'), e => e.innerText)")
    [code] = [block for block in blocks if block.startswith("from peft")]
    found: dict[str, Any] = {}
    exec(code, found)
    assert isinstance(found["model"], PeftModel)
    assert found["output"].dim() == 1
    assert capsys.readouterr().out.endswith("\n")
