"""(c) `transformers.Trainer` around PEFT's model, as it is.

python train_trainer.py SETTINGS.json
"""

import race
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed


def main(settings: race.Settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32")
    set_seed(settings["trainer"]["seed"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings["lora"]))
    clock = race.Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=settings["out"], **settings["trainer"]),
        train_dataset=race.read(settings["train"]),
        eval_dataset=race.read(settings["validation"]),
        data_collator=race.collator(settings["pad_token_id"]),
        callbacks=[clock.callback()],
    )
    trainer.train()
    trainer.save_model()
    clock.show("transformers")


if __name__ == "__main__":
    main(race.settings())
