"""(d) TRL's SFTTrainer on records that have ids and labels already.

python train_trl.py SETTINGS.json
"""

import race
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer


def main(settings: race.Settings) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32")
    set_seed(settings["trainer"]["seed"])  # SFTTrainer itself would draw other initial weights
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings["lora"]))
    clock = race.Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=settings["out"], max_length=None, **settings["trainer"]),
        train_dataset=Dataset.from_parquet(settings["train"], cache_dir=settings["out"]),
        eval_dataset=Dataset.from_parquet(settings["validation"], cache_dir=settings["out"]),
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
        callbacks=[clock.callback()],
    )
    trainer.train()
    trainer.save_model()
    clock.show("trl")


if __name__ == "__main__":
    main(race.settings())
