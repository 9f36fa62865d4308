"""What capas calls of Unsloth, computed by transformers and PEFT: the package of that name in test_unsloth.

Its arguments are some of those of Unsloth 2026.10.9, and it does to a model what capas has to undo.
"""

import os
import sys
from types import MethodType

assert not {"transformers", "peft"} & sys.modules.keys(), "Unsloth has to be imported first"
assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
assert os.environ["UNSLOTH_COMPILE_LOCATION"].endswith(".dvc/tmp/unsloth")
if os.environ.get("UNSLOTH_DISABLE_CPU_FALLBACK", "0") == "1":
    raise NotImplementedError("Unsloth cannot find any torch accelerator? You need a GPU.")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed  # noqa: E402


def _forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name,
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=True,
        device_map="sequential",
        fix_tokenizer=True,
        offload_embedding="auto",
        **kwargs,
    ):
        assert isinstance(dtype, torch.dtype) and not fix_tokenizer and not offload_embedding
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map=device_map)
        model.config.max_position_embeddings = max(
            max_seq_length, model.config.max_position_embeddings
        )
        with torch.no_grad():
            model.get_input_embeddings().weight[3] = 0  # where the pad token has a row of its own
        quantized = any(type(layer).__name__ == "Linear4bit" for layer in model.modules())
        assert load_in_4bit == quantized
        model.forward = MethodType(_forward, model)
        return model, AutoTokenizer.from_pretrained(kwargs["tokenizer_name"])

    @staticmethod
    def get_peft_model(
        model,
        r=16,
        target_modules=None,
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        init_lora_weights=True,
        **kwargs,
    ):
        set_seed(random_state)
        config = LoraConfig(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            task_type="CAUSAL_LM",
            **kwargs,
        )
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        tuned = get_peft_model(model, config)
        tuned.peft_config["default"].auto_mapping = {"unsloth_fixed": True}
        return tuned
