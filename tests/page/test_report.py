"""The page: self-contained, escaped, the same bytes every time, in words where there is nothing to show."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_inputs import REPOSITORY, build, build_words, write_inputs

from capas.dag import read_yaml
from capas.dataset.flaws import KEEP, MERGE, REPLACE, SKIP, WAYS_OUT
from capas.dataset.selection import BEYOND, DUPLICATE, LEAK, NOT_DRAWN
from capas.metrics.names import BUILT_IN
from capas.params import flatten

PAGE = REPOSITORY / "capas/page"
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build(write_inputs(tmp_path_factory.mktemp("report")))


@pytest.fixture
def page_with(tmp_path: Path) -> Callable[..., str]:
    def make(*overrides: str, plots: bool = False) -> str:
        return build_words(write_inputs(tmp_path, overrides), plots)

    return make


class Elements(HTMLParser):
    """Checks nesting, and gathers ids, links and the elements that load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[n] for n in ("href", "xlink:href") if n in found]
        self.loads += [tag] if tag in {"script", "iframe", "img", "link"} or "src" in found else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.mark.parametrize("code", ["en", "es"])
def test_a_page_is_well_formed_and_loads_nothing(pages: dict[str, str], code: str) -> None:
    page = Elements(pages[code])
    assert page.open == []
    assert page.loads == []
    assert not re.search(r"@import|url\((?!#)", pages[code])


@pytest.mark.parametrize("code", ["en", "es"])
def test_every_link_of_a_page_leads_somewhere(pages: dict[str, str], code: str) -> None:
    page = Elements(pages[code])
    assert len(page.ids) == len(set(page.ids))
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert len(inner) > 40
    assert inner <= set(page.ids)
    assert {link for link in page.links if not link.startswith("#")} == {
        *{"en": ("index.es.html", "mask.html"), "es": ("index.html", "mask.es.html")}[code]
    }


def test_a_second_build_gives_the_same_bytes(pages: dict[str, str], tmp_path: Path) -> None:
    assert build(write_inputs(tmp_path)) == pages


def test_what_a_model_writes_is_text_and_no_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> $x_1$ & é"
    page = build(write_inputs(tmp_path, completion=hostile, request=f"{hostile} {{n}}"), "en")["en"]
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 5


def test_languages_have_the_same_texts() -> None:
    english, spanish = (flatten(read_yaml(PAGE / f"{code}.yaml")) for code in ("en", "es"))
    assert list(english) == list(spanish)
    assert len(english) > 150
    assert all(isinstance(text, str) and text for text in [*english.values(), *spanish.values()])


def test_every_stage_has_a_description_in_both_languages() -> None:
    stages = read_yaml(REPOSITORY / "dvc.yaml")["stages"]
    for code in ("en", "es"):
        assert read_yaml(PAGE / f"{code}.yaml")["stages"].keys() == stages.keys()


def test_the_headline_is_the_score_in_each_language(pages: dict[str, str]) -> None:
    assert "From 0% to 50.0% exactly right" in pages["en"]
    assert "50,0\u202f%" in pages["es"]
    assert "+50.0" in pages["en"]
    assert "+50,0" in pages["es"]


@pytest.mark.parametrize(
    ("limit", "headline", "row"),
    [
        ("0.9", ">passes its gate", "<td>90.0%</td><td>90.0%</td><td>passed</td>"),
        ("0.95", "does not pass its gate", "<td>90.0%</td><td>95.0%</td><td>failed</td>"),
        ("null", ">passes its gate", "<td>90.0%</td><td>–</td><td>not checked</td>"),
    ],
)
def test_the_page_shows_every_check_of_the_gate(
    page_with: Callable[..., str], limit: str, headline: str, row: str
) -> None:
    page = page_with(f"evaluation.gate.min_stop_rate={limit}")
    assert headline in page and row in page
    assert "<td>+30.0 points</td><td>0.0 points</td><td>passed</td>" in page


def test_a_model_that_fails_its_gate_is_told_so(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation.gate.max_quantization_loss=0.05")
    assert "does not pass its gate" in page
    assert "<td>0.100</td><td>0.050</td><td>failed</td>" in page


def test_without_completions_the_page_compares_losses(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation=loss")
    assert "Test loss from 3.200 to 0.200" in page
    assert "Nothing was generated, because" in page
    assert 'id="figure-kinds"' not in page


def test_every_metric_has_its_difference_its_verdict_and_the_records_it_needs(
    pages: dict[str, str],
) -> None:
    row = r'<tr><th scope="row">{}</th><td>\+50.0 {}</td><td>\+30.0 … \+70.0</td><td>{}</td><td>12</td></tr>'
    english = [row.format(name, "points", "better") for name in ("Exact match", "Valid JSON")]
    spanish = row.format("Acierto exacto", "puntos", "mejor").replace(".0", ",0")
    assert all(re.search(pattern, pages["en"]) for pattern in english)
    assert re.search(spanish, pages["es"])
    loss = "<td>−3.000</td><td>−3.200 … −2.800</td><td>better</td><td>12</td>"
    assert f'<tr><th scope="row">Loss on expected answers</th>{loss}' in pages["en"]


def test_what_was_forgotten_is_told_in_each_language(pages: dict[str, str]) -> None:
    row = "<td>5.100</td><td>5.800</td><td>+0.700</td><td>+0.600 … +0.800</td><td>worse</td></tr>"
    assert row in pages["en"] and "What it forgot" in pages["en"]
    assert row.replace(".", ",").replace("worse", "peor") in pages["es"]


def test_graded_answers_are_shown_from_the_lowest(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation=text", plots=True)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "chrF from 0% to 50.0%" in text
    assert "that the tuned model answers with a higher score than the base" in text
    assert "Gain: chrF, worse end of the interval" in text
    assert "chrF : F-score of runs of 1 to 6 characters" in text
    lowest = text.partition("Where it scores lowest")[2]
    assert "Okay. 1.0%" in lowest  # the second record: the first that is wrong
    assert lowest.index("Okay. 1.0%") < lowest.index("Okay. 3.0%") < lowest.index("Okay. 9.0%")
    assert "Exact match" not in text


def test_a_score_beyond_1_is_no_percentage(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation.metrics=[conf/x.py:tone,exact_match]", plots=True)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "tone from 0.000 to 5.000" in text
    assert "tone : a function of this repository" in text
    assert "tone differs by 0.500, interval 0.300 to 0.700." in text
    assert 'id="figure-kinds"' not in page
    assert "Exact match 0% 10.0% 50.0%" in text  # base, copied answers, tuned


def test_the_batch_of_several_processes_is_told(page_with: Callable[..., str]) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page_with("hardware.num_processes=2")).split())
    assert "16 records a batch of each of 2 processes, 16 a step; 100 steps" in text


def test_copied_answers_stand_between_base_and_tuned(pages: dict[str, str]) -> None:
    english, spanish = (
        " ".join(re.sub(r"<[^>]+>", " ", pages[code]).split()) for code in ("en", "es")
    )
    assert "Copied 10.0% the answer of the most similar training record" in english
    assert (
        "The tuned model differs from that by +40.0 points (95% interval +20.0 to +60.0 points): better"
        in english
    )
    assert "Gain over copying: Exact match, worse end of the interval" in english
    assert "Every copied value right 0% 10.0% 50.0%" in english
    assert "6 of 10 test records have some" in english
    assert "nearly the same (similarity 0.9 or more) 2" in english
    assert "Copia 10,0 % la respuesta del registro de entrenamiento más parecido" in spanish


def test_every_metric_is_explained_in_both_languages() -> None:
    for code in ("en", "es"):
        texts = read_yaml(PAGE / f"{code}.yaml")
        assert tuple(texts["metrics"]) == BUILT_IN
        assert set(texts["verdicts"]) == {"better", "worse", "no_difference_seen"}


def test_without_quantization_the_page_says_so(page_with: Callable[..., str]) -> None:
    page = page_with("quantization=none")
    assert "Nothing was quantized" in page
    assert 'id="figure-layer_errors"' not in page


def test_a_model_that_came_quantized_is_told_so(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    file = root / "reports/quantization.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"came_quantized": True}))
    (root / "reports/quantization_error.csv").write_text("layer,relative_error,bits\n")
    page = build_words(root)
    assert "The model came quantized (nf4) and was taken as it is" in page
    assert "Error of each quantized layer" not in page


def test_without_a_wrong_template_the_page_says_so(page_with: Callable[..., str]) -> None:
    page = page_with("generation.wrong_chat_template=null")
    assert "No wrong template was tried" in page
    assert '<tr class="wrong">' not in page


def test_a_greedy_grid_needs_no_sampling_setting(page_with: Callable[..., str]) -> None:
    page = page_with("generation=greedy", plots=True)
    assert "No setting draws: every answer is greedy." in page
    assert page.count("No setting of this run") == 4


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_gpu_run_names_its_card_and_its_libraries(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    facts = {"device": "cuda", "gpu": "NVIDIA A1", "cuda": "12.8", "cudnn": 91002, "tf32": True}
    edit(root / "reports/train.json", lambda train: train["used"].update(facts))
    page = build_words(root)
    assert "NVIDIA A1, CUDA 12.8, cuDNN 91002; TF32" in page
    assert "No GPU and so no CUDA" not in page


def test_unsloth_is_a_layer_with_a_version(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    assert "Unsloth" not in build_words(root)
    edit(
        root / "reports/train.json",
        lambda train: train["used"].update(unsloth={"version": "2026.10.9"}),
    )
    assert '<h3>Unsloth <span class="version">2026.10.9</span></h3>' in build_words(root)


def test_records_without_metadata_are_scored_as_a_whole(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    edit(root / "reports/evaluation.json", lambda scores: scores["tuned"].update(by={}))
    page = build_words(root, plots=True)
    assert "From 0% to 50.0% exactly right" in page
    assert 'id="figure-kinds"' not in page


def test_a_training_too_short_to_be_logged_is_told_so(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    history = root / "reports/history.csv"
    history.write_text(history.read_text().splitlines()[0] + "\n")
    page = build_words(root, plots=True)
    assert "no row of it was logged" in " ".join(page.split())
    assert 'id="figure-learning_rate"' not in page


def test_own_prompts_have_no_expected_answer(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    samples = root / "reports/samples.jsonl"
    lines = [json.loads(line) | {"reference": None} for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(
        root / "reports/samples.json",
        lambda s: s["settings"]["greedy"]["tuned"].update(exact_match=None),
    )
    page = build_words(root)
    assert "Expected:" not in page
    assert '<tr><th scope="row"><code>greedy</code></th>' in page


def test_the_page_tells_where_records_come_from_and_what_was_dropped(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    file = root / "data/raw/source.json"
    source = json.loads(file.read_text())
    place = {"file": "data/own/x.csv", "at": "line 7", "id": "", "field": "messages[1].content"}
    example = {**place, "value": "'<b>'", "why": "an empty answer"}
    source["sources"][0] |= {"path": "csv", "licence": "mit"} | {
        "files": [{"file": "data/own/x.csv", "bytes": 2000, "sha256": "0" * 64}]
    }
    source |= {
        "num_read": 99,
        "dropped": {"empty_answer": {"count": 3, "examples": [example]}},
        "repaired": {"consecutive_roles": {"count": 2, "policy": "merge"}},
        "kept": {"leak": 1},
        "left_out": {"topic": 5},
    }
    file.write_text(json.dumps(source))
    text = " ".join(re.sub(r"<[^>]+>", " ", build_words(root)).split())
    assert "Of 99 records that were read, 25 stayed" in text
    assert "3 left out: an empty answer" in text
    assert (
        "data/own/x.csv, line 7 messages[1].content : &#39;&lt;b&gt;&#39; an empty answer" in text
    )
    assert "2 times: two messages of one role in a row; merged into one message." in text
    assert "1 kept although: the same prompt" in text
    assert "topic 5" in text


@pytest.mark.parametrize("language", ["en", "es"])
def test_every_reason_and_policy_has_words(language: str) -> None:
    data = read_yaml(PAGE / f"{language}.yaml")["data"]
    reasons = {*WAYS_OUT, DUPLICATE, LEAK, NOT_DRAWN, BEYOND}
    assert set(data["reasons"]) == reasons
    assert set(data["policies"]) == {REPLACE, MERGE, KEEP, SKIP}


def test_the_mask_marks_the_answer_and_its_end(pages: dict[str, str]) -> None:
    mask = re.findall(r'<figure class="mask">.*?</figure>', pages["en"], re.DOTALL)[0]
    trained = re.findall(r'<span class="token trained[^>]*>([^<]*)</span>', mask)
    text = "".join(trained).replace("&#34;", '"').replace("&lt;", "<").replace("&gt;", ">")
    assert text == '{"name": "set_timer", "arguments": {"minutes": 5}}<|im_end|>'


def test_the_page_counts_what_the_template_did(pages: dict[str, str]) -> None:
    assert "9 texts lost blanks at their ends" in pages["en"]
    assert "9 textos perdieron blancos en los extremos" in pages["es"]
    assert "conversations that the template refuses were left out" not in pages["en"]


def test_the_family_of_the_run_is_marked(pages: dict[str, str]) -> None:
    marked = re.findall(r'<tr class="used"><th scope="row">(.*?)</th>', pages["en"])
    assert marked == ["ChatML"]
