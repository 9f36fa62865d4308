"""Write the HTML page, in English and in Spanish.

Reads   every stage's reports, a few records and the tokenizer, the base model's embedding
Writes  reports/index.html, reports/index.es.html: self-contained, the same bytes every time
Params  all of them, because the page shows them

The travelling record ends here, side by side:

    Could you wake me up at 7:30 on Monday?   base   Okay, at 7:30.
                                              tuned  {"name": "set_alarm", "arguments": {"time": "07:30"}}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from capas.core.dag import StageSpec, read_yaml
from capas.core.files import read_json
from capas.core.language import Language
from capas.core.params import Params, flatten
from capas.core.stage import Stage, log, run
from capas.models import tuned_weights
from capas.report import families, findings, levels, pipeline, plots, tokens
from capas.report.figure import to_svg
from capas.report.findings import read_csv, read_lines
from capas.report.tables import label_cells

TEXTS = Path(findings.__file__).parent  # words, style and template
LANGUAGES = {"en": "reports/index.html", "es": "reports/index.es.html"}
# The messages of a conversation that is shown in every family's template.
CONTENTS = {
    "en": ("Be brief.", "Hi", "Hello.", "Two and two?", "Four."),
    "es": ("Sé breve.", "Hola", "Hola.", "¿Dos más dos?", "Cuatro."),
}


def main(params: Params, stage: Stage) -> None:
    facts = gather(params, stage)
    specs = StageSpec.read_all(stage.root)
    style = (TEXTS / "style.css").read_text(encoding="utf-8")
    for code, page in LANGUAGES.items():
        language = Language(TEXTS, code, {**facts, **of_language(code, facts, params, stage)})
        figures = draw(facts, specs, language)
        html = label_cells(
            language.render("report.html.jinja", style=style, figures=figures, pages=LANGUAGES)
        )
        stage.out(page).write_text(html, encoding="utf-8")
        log.info("%s: %d kB", page, len(html.encode()) // 1000)


def gather(params: Params, stage: Stage) -> dict[str, Any]:
    """Return all facts that the page shows, under the names that its texts use."""
    versions = stage.spec.values(stage.root)["environment.yaml"]
    data, models = of_data(params, stage), of_models(params, stage)
    return {
        "params": plain(params),
        "flat_params": flatten(plain(params)),
        "overridden": findings.overridden(
            read_yaml(stage.dep("conf/overrides.yaml")) or {}, flatten(plain(params))
        ),
        "versions": versions,
        "stages": {
            n: e.get("desc", "") for n, e in read_yaml(stage.root / "dvc.yaml")["stages"].items()
        },
        **data,
        **models,
        "learned": findings.learned_from(
            models["train"], params.trainer, data["format"]["splits"]["train"]["num_records"]
        ),
        **of_results(stage),
        **findings.decoding(plain(params.generation.settings)),
    }


def of_language(code: str, facts: dict[str, Any], params: Params, stage: Stage) -> dict[str, Any]:
    """Return the facts that differ by language: a sentence in tokens, a conversation in every template."""
    return {
        "sentence": facts["sentences"][code],
        "families": families.render_all(
            stage.dep("conf/chat_template"), CONTENTS[code], params.chat_template.date_string
        ),
    }


def plain(params: Params) -> dict[str, Any]:
    return {
        key: plain(value) if isinstance(value, Params) else value for key, value in params.items()
    }


def of_data(params: Params, stage: Stage) -> dict[str, Any]:
    formatted, folder = stage.dep("data/formatted"), stage.dep("data/models/tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    records = tokens.first_records(formatted / "train.parquet")
    facts = read_json(stage.dep("reports/format.json"))
    return {
        "source": findings.origin(read_json(stage.dep("data/raw") / "source.json")),
        "chat": read_json(formatted / "chat.json"),
        "format": facts,
        "changes": findings.changes(facts["splits"]),
        "example": tokens.example(tokenizer, facts["example"]),
        "sentences": tokens.sentences(
            tokenizer, tokens.first_records(stage.dep("data/raw") / "train.parquet"), LANGUAGES
        ),
        "lengths": read_csv(stage.dep("reports/lengths.csv")),
        "tokens": tokens.describe(tokenizer, read_json(folder / "tokenizer.json"), records),
        "masks": tokens.masks(tokenizer, records),
        "padding": tokens.padding(records, params.trainer.per_device_train_batch_size),
        "embedding": tokens.embedding(stage.dep("data/models/base"), tokenizer, records),
    }


def of_models(params: Params, stage: Stage) -> dict[str, Any]:
    train = read_json(stage.dep("reports/train.json"))
    base, history = stage.dep("data/models/base"), read_csv(stage.dep("reports/history.csv"))
    config = read_json(base / "config.json")
    return {
        "config": config,
        "quantization": read_json(stage.dep("reports/quantization.json")),
        "layer_errors": read_csv(stage.dep("reports/quantization_error.csv")),
        "levels": levels.four_bit_levels(base, stage.dep("data/models/quantized")),
        "train": train,
        "used": train["used"],
        **findings.adapter(stage.dep(tuned_weights.FOLDER)),
        "history": history,
        "validation": read_csv(stage.dep("reports/validation.csv")),
        "curve": findings.curve(history, params.trainer.max_grad_norm, config["vocab_size"]),
    }


def of_results(stage: Stage) -> dict[str, Any]:
    base = read_json(stage.dep("reports/evaluation_base.json"))
    evaluation = read_json(stage.dep("reports/evaluation.json"))
    losses = read_csv(stage.dep("reports/answer_loss.csv"))
    records = findings.test_records(
        {
            "base": stage.dep("reports/predictions_base.parquet"),
            "nearest": stage.dep("reports/predictions_nearest.parquet"),
            "tuned": stage.dep("reports/predictions.parquet"),
        }
    )
    messages = findings.conversations(stage.dep("data/raw") / "test.parquet")
    scores = findings.scores(base, evaluation, records)
    lines = read_lines(stage.dep("reports/samples.jsonl"))
    probabilities = read_csv(stage.dep("reports/next_token.csv"))
    return {
        "scores": scores,
        "answers": findings.answers(records, messages, scores["headline"], LANGUAGES),
        "attention": read_json(stage.dep("reports/attention.json")),
        "answer_losses": losses,
        "num_tokens_drawn": min(len(losses), plots.MAX_TOKENS),
        "samples": findings.samples(lines, read_json(stage.dep("reports/samples.json"))),
        "probabilities": probabilities,
        "favourites": findings.favourites(probabilities),
    }


def draw(facts: dict[str, Any], specs: dict[str, StageSpec], language: Language) -> dict[str, str]:
    """Return {name: SVG}. A plot without data is left out, and the page says why."""
    words: Callable[[str], str] = lambda key: str(language.say(f"plots.{key}"))  # noqa: E731
    number, percent = language.numbers.general, language.numbers.percent
    scores = facts["scores"]
    parts = scores["groups"][scores["drawn_group"]] if scores["drawn_group"] else []
    kinds = [
        {**row, "label": label_of(row["label"], language)}
        for row in parts
        if scores["is_share"] and all(row[m] for m in ("base", "nearest", "tuned") if m in row)
    ]
    distances = [
        {
            **row,
            "label": f"{number(row['low'])}–{number(row['high'])}, n = {row['num_records']}",
        }
        for row in scores["by_similarity"]
        if scores["is_share"]
    ]
    history, validation, train = facts["history"], facts["validation"], facts["train"]
    figures = {
        "dag": pipeline.draw(specs),
        "loss": plots.loss_curves(history, validation, words, number),
    }
    if train["answers"]:
        metric = str(language.metric(train["answers"]["metric"]))
        figures["answers"] = plots.answer_scores(validation, train, metric, words, number)
    if history:
        figures["learning_rate"] = plots.learning_rate(history, words, number)
    if kinds:
        figures["kinds"] = plots.shares(kinds, words, percent)
    if distances:
        figures["distances"] = plots.shares(distances, words, percent)
    if scores["labels"]:
        figures["calibration"] = plots.calibration(scores["labels"]["curves"], words, percent)
    if facts["answer_losses"]:
        figures["answer_loss"] = plots.answer_loss(facts["answer_losses"], words, number)
    if facts["levels"]:
        figures["levels"] = plots.levels(facts["levels"], words, percent)
    if facts["layer_errors"]:
        figures["layer_errors"] = plots.layer_errors(facts["layer_errors"], words, number)
    if facts["lengths"]:
        figures["lengths"] = plots.lengths(facts["lengths"], words, number)
    if facts["probabilities"]:
        figures["next_token"] = plots.next_token(facts["probabilities"], words, percent)
    return {name: to_svg(figure, name, words(f"about_{name}")) for name, figure in figures.items()}


def label_of(kind: str, language: Language) -> str:
    key = f"kinds.{kind}"
    return str(language.say(key)) if language.has(key) else kind


if __name__ == "__main__":
    run("report", main)
