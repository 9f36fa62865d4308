"""The metrics that `evaluation.metrics: auto` chooses."""

import pytest

from capas.evaluation.choice import choose_metrics

FREE = [
    "We have refunded your order, it takes three days.",
    "Please restart the device and try it again.",
]


@pytest.mark.parametrize(
    ("references", "metrics", "why"),
    [
        (['{"a": 1}', "[1, 2]"], ["exact_match", "valid_json", "json_fields"], "JSON"),
        (["yes", "no", "no", " yes"], ["exact_match"], '2 labels ("no", "yes")'),
        (["2 + 2 = 4\n#### 4", "#### 1,000"], ["final_number"], "####"),
        (["Paris", "Rome", "Buenos Aires"], ["exact_match", "chrf"], "1 word in the median"),
        (FREE, ["chrf", "rougeL"], "free text, 8.5 words"),
        ([*FREE, *FREE, '{"a": "b c"}'], ["chrf", "rougeL"], "free text"),
        (["1", "2", "3"], ["exact_match", "chrf"], "short"),
        (["#### 4", "four"], ["exact_match", "chrf"], "short"),
        ([], [], "no record has an answer"),
    ],
)
def test_the_form_of_all_answers_decides(
    references: list[str], metrics: list[str], why: str
) -> None:
    choice = choose_metrics(references)
    assert choice.metrics == metrics
    assert why in choice.why


def test_labels_are_few_short_and_each_is_frequent() -> None:
    labels = [f"label {i}" for i in range(20)] * 10
    assert choose_metrics(labels).metrics == ["label_accuracy"]
    assert choose_metrics([*labels, "label 20"]).metrics == ["exact_match", "chrf"]
    assert choose_metrics([*labels, *["label 20"] * 10]).metrics == ["exact_match", "chrf"]
    spam = choose_metrics(["ham"] * 90 + ["spam"] * 10)
    assert spam.metrics == ["label_accuracy"]
    assert spam.why == '2 labels ("ham", "spam"), the most frequent in 90% of the records'


@pytest.mark.parametrize(
    "references",
    [
        ["ham"] * 90 + ["spam"] * 9,  # a split might have none of them
        ["yes"] * 100,
        ["This is a long answer of many words"] * 50 + ["no"] * 50,
    ],
)
def test_a_few_answers_are_not_always_a_classification(references: list[str]) -> None:
    assert choose_metrics(references).metrics == ["exact_match"]
