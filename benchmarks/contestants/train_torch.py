"""(b) A loop in plain torch around PEFT's model: the floor.

python train_torch.py SETTINGS.json
"""

import race
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler, set_seed


def main(settings: race.Settings) -> None:
    trainer, clock = settings["trainer"], race.Clock()
    train, validation = race.read(settings["train"]), race.read(settings["validation"])
    collate = race.collator(settings["pad_token_id"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    set_seed(trainer["seed"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings["lora"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=trainer["learning_rate"], weight_decay=0.0)
    num_steps = trainer["max_steps"]
    schedule = get_scheduler(
        trainer["lr_scheduler_type"], optimizer, trainer["warmup_steps"], num_steps
    )

    def evaluate() -> None:
        size = trainer["per_device_eval_batch_size"]
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(validation), size):
                model(**collate(validation[start : start + size])).loss.item()
        model.train()

    evaluate()
    size = trainer["per_device_train_batch_size"]
    for step in range(num_steps):
        loss = model(**collate(train[step * size : (step + 1) * size]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, trainer["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.end_step()
    evaluate()
    model.save_pretrained(settings["out"])
    clock.show("torch")


if __name__ == "__main__":
    main(race.settings())
