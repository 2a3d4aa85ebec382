from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "test": [
        "openai>=2",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.15",
        "pyright>=1.1.400",
        "triton>=3.6",
    ],
    "endpoint": ["openai>=2"],
    "eval": ["openai>=2", "lm-eval>=0.4.13", "sacrebleu>=2.5", "rouge-score>=0.1.2"],
    "gguf": ["gguf>=0.10"],
    "qlora": ["bitsandbytes>=0.46"],
    "gptq": ["optimum>=1.24", "gptqmodel>=1.4.3"],
    "datasets": ["datasets>=3"],
    "triton": ["triton>=3.6"],
    "flash-attn": ["flash-attn>=2.7"],
    "xformers": ["xformers>=0.0.35"],
}
EXTRAS["test"] += EXTRAS["eval"] + EXTRAS["gguf"] + EXTRAS["qlora"]

setup(
    name="longpatch",
    version="0.1.0",
    description="Make any Hugging Face causal language model read and write text of any length",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ itself is not a package: transformers would mistake it for the PyPI package of that name.
    packages=[*find_packages(include=["longpatch", "longpatch.*"]), *find_packages("kernels")],
    package_dir={"longpatch_kernels": "kernels/longpatch_kernels"},
    package_data={"longpatch.demo": ["model/*"], "longpatch_kernels.native": ["*.cpp", "*.h"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "peft>=0.19",
        "accelerate>=1.1",
        "jinja2>=3.1",
        "pyyaml>=6",
        "safetensors>=0.5",
        "einops>=0.8",
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["longpatch = longpatch.cli:main"]},
)
