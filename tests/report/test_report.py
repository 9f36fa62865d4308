"""The page: self-contained, escaped, the same bytes every time, in words where there is nothing to show."""

import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_inputs import REPOSITORY, build, build_words, write_inputs

from capas.core.dag import read_yaml
from capas.core.params import flatten
from capas.dataset.flaws import KEEP, MERGE, REPLACE, SKIP, WAYS_OUT
from capas.dataset.selection import BEYOND, DUPLICATE, LEAK, NOT_DRAWN
from capas.evaluation.names import BUILT_IN, LABEL_SCORES
from capas.report import labels

PAGE = REPOSITORY / "capas/report"
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build(write_inputs(tmp_path_factory.mktemp("report")))


@pytest.fixture
def page_with(tmp_path: Path) -> Callable[..., str]:
    def make(*overrides: str, plots: bool = False) -> str:
        return build_words(write_inputs(tmp_path, overrides), plots)

    return make


def words_of(page: str) -> str:
    """The text of a page, without markup."""
    return " ".join(
        unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split()
    )


def rows_of(page: str) -> list[list[str]]:
    """The cells of every table row, as text."""
    return [
        [words_of(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    ]


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
        ("0.9", ">passes its gate", ["90.0%", "at least 90.0%", "passed"]),
        ("0.95", "does not pass its gate", ["90.0%", "at least 95.0%", "failed"]),
        ("0.900004", "does not pass its gate", ["90.0000%", "at least 90.0004%", "failed"]),
        ("null", ">passes its gate", ["90.0%", "–", "not checked"]),
    ],
)
def test_the_page_shows_every_check_of_the_gate(
    page_with: Callable[..., str], limit: str, headline: str, row: list[str]
) -> None:
    page = page_with(f"evaluation.gate.min_stop_rate={limit}")
    assert headline in page
    rows = rows_of(page)
    assert ["Answers that ended with an end token", *row] in rows
    is_open = '<details class="more" open>\n<summary>All checks, each with' in page
    assert is_open == ("does not pass" in headline)
    gain = "Gain: Exact match, lower end of the interval"
    assert [gain, "+30.0 points", "more than 0", "passed"] in rows


def test_the_page_shows_noise_length_and_forgetting(pages: dict[str, str]) -> None:
    english, spanish = rows_of(pages["en"]), rows_of(pages["es"])
    noise = "Gain, beside what batching alone changes"
    assert [noise, "+50.0 points", "more than +10.0 points", "passed"] in english
    ratio = "Length of the answers / length of the references, upper end of the interval"
    assert [ratio, "1.200", "at most 2.000", "passed"] in english
    forgotten = "Pérdida añadida en preguntas generales, extremo superior del intervalo"
    assert [forgotten, "0,800", "como mucho 1,000", "cumple"] in spanish
    assert "2 answers of the base and 1 of the tuned model changed" in words_of(pages["en"])


def test_an_evaluation_of_an_earlier_version_still_makes_a_page(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)

    def forget(found: dict[str, Any]) -> None:
        old = ("noise_floor", "forgetting", "length_ratio_low", "length_ratio_high")
        checks = [check for check in found["gate"]["checks"] if check["name"] not in old]
        found["gate"]["checks"] = checks
        del found["noise"], found["length_ratio"]

    edit(root / "reports/evaluation.json", forget)
    assert "6 checks that a model must pass" in words_of(build_words(root))


def test_a_gain_of_nothing_fails_for_a_reason_that_can_be_seen(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    failed = {"value": 0.0, "high": 0.1, "limit": 0.0, "passed": False}
    edit(
        root / "reports/evaluation.json",
        lambda found: found["gate"].update(
            passed=False, checks=[{"name": "exact_match_gain"} | failed]
        ),
    )
    page = build_words(root)
    gain = "Gain: Exact match, lower end of the interval"
    assert [gain, "0.0 points", "more than 0", "failed"] in rows_of(page)
    assert "does not pass its gate . Registering it needs --force ." in words_of(page)


def test_a_model_that_fails_its_gate_is_told_so(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation.gate.max_quantization_loss=0.05")
    assert "does not pass its gate" in page
    assert [
        "Loss added to the base by quantization",
        "0.100",
        "at most 0.050",
        "failed",
    ] in rows_of(page)


def test_without_completions_the_page_compares_losses(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation=loss")
    assert "Test loss from 3.200 to 0.200" in page
    assert "No answers were generated, because evaluation.metrics is empty" in words_of(page)
    assert 'id="figure-kinds"' not in page


def test_a_classification_has_tables_a_curve_and_the_majority(
    page_with: Callable[..., str],
) -> None:
    page = page_with("evaluation=labels", plots=True)
    text, rows = words_of(page), rows_of(page)
    assert "Label accuracy from 0% to 50.0%" in text
    assert "Both models choose one of 3 labels for the same 10 test records" in text
    assert (
        "Always choosing “ham”, the label of 75.0% of the training records, has an accuracy of 80.0%"
        in text
    )
    assert ["Balanced accuracy", "20.0%", "40.0%", "50.0%", "50.0%"] in rows
    assert ["Log loss of the labels", "0.700", "–", "–", "0.700"] in rows
    assert ["Expected \\ Chosen", "ham", "spam", "phishing"] in rows
    assert ["ham", "6", "2", "0"] in rows and ["ham", "2", "6", "0"] in rows  # tuned and base
    assert ["ham", "9", "8", "100%", "75.0%", "85.7%"] in rows
    assert ["phishing", "1", "0", "–", "–", "–"] in rows
    assert 'id="figure-calibration"' in page
    gate = {row[0]: row[-1] for row in rows if len(row) == 4}
    assert gate["Answers that ended with an end token"] == "not measured: no text is generated"
    over = "Gain over always choosing the most frequent label: Balanced accuracy, lower end of the interval"
    assert gate[over] == "failed"
    assert "log loss and calibration error, lower is better" in text


def test_many_labels_are_shown_by_what_is_confused() -> None:
    names = [f"intent {i}" for i in range(labels.MAX_TABLE + 1)]
    table = [[int(i == j) for j in range(len(names))] for i in range(len(names))]
    table[3][4], table[5][2] = 2, 7
    of = {"names": names, "num_train": [1] * len(names), "confusion": table, "calibration": []}
    base = {"labels": of, "majority": {}}
    tuned = {"tuned": {"labels": of}, "difference_to_majority": {"label_balanced_accuracy": {}}}
    found = labels.arrange(base, tuned)
    assert found is not None and found["tables"] is None
    assert [(p["right"], p["chosen"], p["count"]) for p in found["confused"]] == [
        ("intent 5", "intent 2", 7),
        ("intent 3", "intent 4", 2),
    ]
    assert labels.arrange({}, {"tuned": {}}) is None


def test_every_metric_has_its_difference_its_verdict_and_the_records_it_needs(
    pages: dict[str, str],
) -> None:
    english, spanish = rows_of(pages["en"]), rows_of(pages["es"])
    for name in ("Exact match", "Valid JSON"):
        assert [name, "+50.0 points", "+30.0 … +70.0", "better", "12"] in english
    assert ["Coincidencia exacta", "+50,0 puntos", "+30,0 … +70,0", "mejor", "12"] in spanish
    loss = ["−3.000", "−3.200 … −2.800", "better", "12"]
    assert ["Loss on expected answers", *loss] in english


def test_what_was_forgotten_is_told_in_each_language(pages: dict[str, str]) -> None:
    row = ["5.100", "5.800", "+0.700", "+0.600 … +0.800", "worse"]
    assert ["Loss on expected answers", *row] in rows_of(pages["en"])
    spanish = [cell.replace(".", ",").replace("worse", "peor") for cell in row]
    assert ["Pérdida en las respuestas esperadas", *spanish] in rows_of(pages["es"])


def test_graded_answers_are_shown_from_the_lowest(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation=text", plots=True)
    text = words_of(page)
    assert "chrF from 0% to 50.0%" in text
    assert "A test record on which the tuned model scores higher than the base." in text
    assert "Gain: chrF, lower end of the interval" in text
    assert "chrF : F-score of shared character n-grams" in text
    assert "95% bootstrap interval" in text and "Wilson" not in text
    lowest = text.partition("Lowest scores")[2]
    assert "Okay. 1.0%" in lowest  # the second record: the first that is wrong
    assert lowest.index("Okay. 1.0%") < lowest.index("Okay. 3.0%") < lowest.index("Okay. 9.0%")
    assert "Exact match" not in text


def test_a_score_beyond_1_is_no_percentage(page_with: Callable[..., str]) -> None:
    page = page_with("evaluation.metrics=[conf/x.py:tone,exact_match]", plots=True)
    text = words_of(page)
    assert "tone from 0.000 to 5.000" in text
    assert "tone : a function of this repository" in text
    assert "tone differs by 0.500, interval 0.300 to 0.700." in text
    assert 'id="figure-kinds"' not in page
    assert "Exact match 0% 10.0% 50.0%" in text  # base, copied answers, tuned


def test_the_batch_of_several_processes_is_told(page_with: Callable[..., str]) -> None:
    text = words_of(page_with("hardware.num_processes=2"))
    assert "16 records per batch on each of 2 processes, 16 per step . 100 steps" in text.replace(
        "step.", "step ."
    )


def test_copied_answers_stand_between_base_and_tuned(pages: dict[str, str]) -> None:
    english, spanish = (words_of(pages[code]) for code in ("en", "es"))
    assert "Copied 10.0% the answer of the most similar training record" in english
    interval = "(95% interval +20.0 to +60.0 points): better"
    assert f"The tuned model differs from this baseline by +40.0 points {interval}" in english
    assert "Gain over copying: Exact match, lower end of the interval" in english
    assert "All copied values correct 0% 10.0% 50.0%" in english
    assert "6 of 10 test records have some" in english
    assert "nearly the same (similarity 0.9 or more) 2" in english
    assert "Copia 10,0 % la respuesta del registro de entrenamiento más parecido" in spanish


def test_every_metric_is_explained_in_both_languages() -> None:
    for code in ("en", "es"):
        texts = read_yaml(PAGE / f"{code}.yaml")
        assert tuple(texts["metrics"]) == (*BUILT_IN, *LABEL_SCORES)
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
    assert "The model came quantized (nf4) and was used unchanged" in page
    assert "Relative error of each quantized layer" not in page


def test_without_a_wrong_template_the_page_says_so(page_with: Callable[..., str]) -> None:
    page = page_with("generation.wrong_chat_template=null")
    assert "No wrong template was tried" in page
    assert '<tr class="wrong">' not in page


def test_a_greedy_grid_needs_no_sampling_setting(page_with: Callable[..., str]) -> None:
    page = page_with("generation=greedy", plots=True)
    assert "0 settings draw: every answer is greedy." in page
    assert page.count("no setting of this run") == 4


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_gpu_run_names_its_card_and_its_libraries(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    facts = {"device": "cuda", "gpu": "NVIDIA A1", "cuda": "12.8", "cudnn": 91002, "tf32": True}
    edit(root / "reports/train.json", lambda train: train["used"].update(facts))
    page = build_words(root)
    text = words_of(page)
    assert "NVIDIA A1, CUDA 12.8; TF32 yes" in text and "Here: cuDNN 91002." in text
    assert "without a GPU" not in text and 'id="layer-cpu"' not in page


def test_unsloth_is_a_layer_with_a_version(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    assert "Not used: trainer.backend=transformers ." in words_of(build_words(root))
    edit(
        root / "reports/train.json",
        lambda train: train["used"].update(unsloth={"version": "2026.10.9"}),
    )
    page = build_words(root)
    assert '<h3>Unsloth <span class="version">2026.10.9</span></h3>' in page
    assert "It replaced parts of this model." in words_of(page)


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
    assert "so nothing was logged" in words_of(page)
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
    text = words_of(build_words(root))
    assert "Of 99 records, 25 were kept" in text
    assert "3 dropped: an empty answer" in text
    assert "data/own/x.csv, line 7 messages[1].content : '<b>' an empty answer" in text
    assert "2 repaired: two consecutive messages of the same role; merged into one message." in text
    assert "1 kept with a warning: the same prompt" in text
    assert "topic 5" in text


@pytest.mark.parametrize("language", ["en", "es"])
def test_every_reason_and_policy_has_words(language: str) -> None:
    data = read_yaml(PAGE / f"{language}.yaml")["data"]
    reasons = {*WAYS_OUT, DUPLICATE, LEAK, NOT_DRAWN, BEYOND}
    assert set(data["reasons"]) == reasons
    assert set(data["policies"]) == {REPLACE, MERGE, KEEP, SKIP}


def test_the_mask_marks_the_answer_and_its_end(pages: dict[str, str]) -> None:
    masks = re.findall(r'<figure class="mask">.*?</figure>', pages["en"], re.DOTALL)
    mask = next(mask for mask in masks if "<code>r000</code>" in mask)
    trained = re.findall(r'<span class="token trained[^>]*>([^<]*)</span>', mask)
    text = "".join(trained).replace("&#34;", '"').replace("&lt;", "<").replace("&gt;", ">")
    assert text == '{"name": "set_timer", "arguments": {"minutes": 5}}<|im_end|>'


def test_the_page_counts_what_the_template_did(pages: dict[str, str]) -> None:
    assert "9 texts trimmed: the template removes spaces at both ends" in pages["en"]
    assert "9 textos recortados: la plantilla quita los espacios" in pages["es"]
    assert "conversations dropped: the template refuses them" not in pages["en"]


def test_the_family_of_the_run_is_marked(pages: dict[str, str]) -> None:
    assert used_template(pages["en"]) == ["ChatML"]


def used_template(page: str) -> list[str]:
    return re.findall(r'<tr class="used"><th scope="row">(.*?)</th>', page)


def test_a_template_of_the_model_s_own_is_marked(page_with: Callable[..., str]) -> None:
    page = page_with("chat_template=model")
    assert used_template(page) == ["The model’s own"]
    assert "The template that comes with the tokenizer of data/embedded ;" in words_of(page)


def test_each_family_writes_the_same_conversation(pages: dict[str, str]) -> None:
    """In the words of the page's language; system messages go where each family has them."""
    english, spanish = (
        [
            unescape(text).replace("↵\n", "\n")
            for text in re.findall(r"<pre>(.*?)</pre>", pages[code], re.DOTALL)
        ]
        for code in ("en", "es")
    )
    assert (
        english[3]
        == "<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nTwo and two?[/INST] Four.</s>"
    )
    assert spanish[4].startswith("<bos><start_of_turn>user\nSé breve.\n\nHola<end_of_turn>\n")
    assert len(english) == len(spanish) == 5


@pytest.mark.parametrize(
    ("steps", "epochs", "learned", "wrote"),
    [
        (100, 133.33, "learned from 12 conversations", "It wrote a checkpoint every 30 steps."),
        (
            30,
            40.0,
            "learned from 12 conversations",
            "trainer.save_steps = 30 the first one was not due.",
        ),
        (1, 0.5, "learned from 6 of 12 conversations", "It wrote no checkpoint:"),
    ],
)
def test_what_a_short_training_did_is_said(
    tmp_path: Path, steps: int, epochs: float, learned: str, wrote: str
) -> None:
    root = write_inputs(tmp_path, ["trainer.save_steps=30"])
    facts = {"num_steps": steps, "kept_step": steps, "num_epochs": epochs, "global_batch_size": 6}
    edit(root / "reports/train.json", lambda train: train.update(facts))
    text = words_of(build_words(root))
    assert f"of 20,000 parameters, {learned}." in text
    assert wrote in text
    assert f"{epochs:.2f}" in text or f"{epochs:.1f}" in text


@pytest.mark.parametrize(
    ("overrides", "facts", "early"),
    [
        (["trainer.num_train_epochs=4.5"], {"kept_step": 80}, True),
        (["trainer.num_train_epochs=4.0"], {}, False),
        (["trainer.max_steps=101"], {}, True),
        (["trainer.max_steps=100"], {}, False),
    ],
)
def test_an_early_end_and_the_weights_of_an_earlier_step_are_said(
    tmp_path: Path, overrides: list[str], facts: dict[str, int], early: bool
) -> None:
    root = write_inputs(tmp_path, overrides)
    edit(root / "reports/train.json", lambda train: train.update(facts))
    text = words_of(build_words(root))
    assert ("It stopped early." in text) == early
    assert ("The weights are those of step 80, the best one." in text) == bool(facts)


ANSWERS = {"metric": "exact_match", "num_records": 64, "max_new_tokens": 68}


@pytest.mark.parametrize(
    ("best", "step", "why"),
    [
        ("true", 50, "The saved weights are those of step 50, the first with the best score"),
        ("false", 100, "The saved weights are those of step 100, the last one"),
    ],
)
def test_the_curve_of_the_answers_and_the_chosen_step_are_shown(
    tmp_path: Path, best: str, step: int, why: str
) -> None:
    options = (
        "trainer.metric_for_best_model=exact_match",
        f"trainer.load_best_model_at_end={best}",
    )
    root = write_inputs(tmp_path, [*options, "trainer.max_steps=100"])
    facts = {"answers": ANSWERS, "kept_step": step, "validation_exact_match": 0.875}
    edit(root / "reports/train.json", lambda train: train.update(facts))
    rows = "step,epoch,loss,token_accuracy,exact_match\n50,2.0,0.4,0.8,0.875\n100,4.0,0.2,0.9,0.5\n"
    (root / "reports/validation.csv").write_text(rows)
    english, spanish = build(root).values()
    assert 'id="figure-answers"' in english and 'id="figure-answers"' in spanish
    said = words_of(english)
    assert "Exact match of the answers to 64 validation records" in said
    assert why in said and "They score 0.875" in said
    assert (
        "The weights are those of step 50, the first with the highest Exact match." in said
    ) == (step == 50)
    assert "Su valor es 0,875" in words_of(spanish)


def test_packed_records_are_counted_by_epochs(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    facts = {"num_steps": 1, "num_epochs": 0.75, "global_batch_size": 1, "packing": {"length": 512}}
    edit(root / "reports/train.json", lambda train: train.update(facts))
    assert "learned from 9 of 12 conversations." in words_of(build_words(root))


def test_an_example_is_in_the_language_of_the_page(pages: dict[str, str]) -> None:
    """Records 15 and 16 are the first right ones: one Spanish, one English by its number."""
    shown = [
        words_of(re.findall(r'<div class="bubble user">.*?</div>', pages[code], re.DOTALL)[0])
        for code in ("en", "es")
    ]
    assert shown[1].startswith("Petición Pon un temporizador")
    assert shown[0].startswith("Prompt")


def test_both_ways_of_attention_are_compared(pages: dict[str, str], tmp_path: Path) -> None:
    text = words_of(pages["en"])
    assert "the largest difference of a logit is 2.00e−05 (largest logit: 12.5)" in text
    assert "the same at 39 of 40 positions" in text
    root = write_inputs(tmp_path)
    edit(root / "reports/attention.json", lambda found: found.update(skipped="sdpa is not there"))
    assert "eager and sdpa were not compared: sdpa is not there" in words_of(build_words(root))


def test_a_base_without_a_score_leaves_a_dash(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)

    def forget(base: dict[str, Any]) -> None:
        base["exact_match"] = None
        for parts in base["by"].values():
            for label, part in parts.items():
                parts[label] = part | {"exact_match": None}

    edit(root / "reports/evaluation_base.json", forget)
    page = build_words(root, plots=True)
    assert "From – to 50.0% exactly right" in words_of(page)
    assert ["Exact match", "–", "10.0%", "50.0%"] in rows_of(page)
    assert 'id="figure-kinds"' not in page


def test_changed_parameters_come_first(tmp_path: Path) -> None:
    root = write_inputs(tmp_path)
    assert "No value is set over the rest of conf/ for this run." in words_of(build_words(root))
    (root / "conf/overrides.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: attention\nlora: {r: 8}\n"
    )
    changed = build_words(root).partition('<section id="params">')[2].partition("<details")[0]
    assert [row[0] for row in rows_of(changed)] == ["Key", "lora.preset", "lora.r"]


def test_a_cell_knows_the_heading_of_its_column(pages: dict[str, str]) -> None:
    """A phone stacks a row; each cell then says what it is."""
    cells = re.findall(r"<td[^>]*>", pages["es"])
    named = [cell for cell in cells if "data-h=" in cell]
    assert len(named) > 0.9 * len(cells) > 100
    assert '<td data-h="Registros">12</td>' in pages["es"]


def test_a_prompt_goes_through_both_tokenizers(pages: dict[str, str]) -> None:
    text = words_of(pages["es"])
    assert re.search(
        r"Arriba, el del modelo: \d+ tokens. Abajo, BPE como lo hace SentencePiece", text
    )
    assert "▁" in pages["es"].partition("SentencePiece, aprendido")[2]


# The terms of the primer that users are taught with, as they stand there.
TERMS = (
    *(
        "NumPy",
        "PyTorch",
        "CUDA",
        "cuDNN",
        "Transformers",
        "Datasets",
        "Accelerate",
        "PEFT",
        "Unsloth",
    ),
    *("bitsandbytes", "Trainer", "dataset", "Token", "BPE", "SentencePiece", "Embedding", "loss"),
    *(
        "backward pass",
        "backpropagation",
        "autograd",
        "Adam",
        "AdamW",
        "SGD",
        "learning rate",
        "epoch",
    ),
    *(
        "batch",
        "step",
        "attention_mask",
        "padding",
        "pad_token_id",
        "eos_token_id",
        "apply_chat_template",
    ),
    *(
        "Llama 3",
        "Mistral",
        "Qwen",
        "Gemma",
        "do_sample",
        "Multinomial",
        "temperature",
        "top_k",
        "top_p",
    ),
    *("nucleus", "attn_implementation", "eager", "sdpa", "LoRA"),
)
SPANISH = {"backpropagation": "retropropagación", "epoch": "época"}


@pytest.mark.parametrize("code", ["en", "es"])
def test_every_term_of_the_primer_is_on_the_page(pages: dict[str, str], code: str) -> None:
    text = words_of(pages[code]).lower()
    terms = [SPANISH.get(term, term) if code == "es" else term for term in TERMS]
    assert [term for term in terms if term.lower() not in text] == []


@pytest.mark.parametrize("code", ["en", "es"])
def test_every_concept_and_layer_has_a_number_of_this_run(pages: dict[str, str], code: str) -> None:
    """Unsloth alone has none where it is not used, and the template where it has a name."""
    here = dict(
        re.findall(r'id="concept-(\w+)">.*?<p class="here">(.*?)</p>', pages[code], re.DOTALL)
    )
    layers = dict(re.findall(r'id="layer-(\w+)">.*?<p>(.*?)</p>', pages[code], re.DOTALL))
    assert len(here) == 23 and len(layers) == 12
    without = [
        name for name, text in {**here, **layers}.items() if not re.search(r"\d", words_of(text))
    ]
    assert without == ["unsloth"]
