"""(e) LLaMA-Factory's SFT on records that have ids and labels already.

    python train_llamafactory.py SETTINGS.json

It takes the data set as `datasets` saves it, tokenizer and model from one folder.
"""

from pathlib import Path

import race
from llamafactory.train.tuner import run_exp


def main(settings: race.Settings) -> None:
    lora, trainer, out = settings["lora"], dict(settings["trainer"]), settings["out"]
    del trainer["train_sampling_strategy"]  # disable_shuffling
    clock = race.Clock()
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": settings["model_with_tokenizer"],
        "tokenized_path": settings["tokenized"],
        "dataset": "train",  # required, and not used
        "eval_dataset": "validation",
        "template": "empty",
        "finetuning_type": "lora",
        "lora_rank": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "lora_target": "all",
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "output_dir": str(Path(out) / "trained"),
        **trainer,
    }
    run_exp(arguments, [clock.callback()])
    clock.show("llamafactory")


if __name__ == "__main__":
    main(race.settings())
