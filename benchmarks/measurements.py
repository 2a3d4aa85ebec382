"""What docs/results.md shows: each measurement's command, and the figure published for another model beside it."""

from dataclasses import dataclass

ALL_BOOKS = "BOOKS/50031.txt BOOKS/50797.txt BOOKS/51355.txt BOOKS/52654.txt BOOKS/5274.txt"

BY_LENGTH = (
    "Published for another model (LM-Infinite, Llama-2 on ArXiv), perplexity at 2K / 4K / 8K / 16K / 32K: original "
    "3.4 / 3.8 / 8.5e3 / NaN / NaN, converted 4.3 / 3.6 / 3.3 / 4.2 / 6.5."
)
BY_SINKS = (
    "Published for another model (LM-Infinite), NLL at 16K by number of sinks: 0: 6.43, 1: 1.03, 10: 1.02, 100: 1.02, "
    "1000: 1.81, 2000: 4.96. The tables hold perplexity, which is exp of the NLL."
)
SMOLLM2_WALK = (
    "longpatch eval temp-lora smollm2 BOOKS/5274.txt BOOKS/51355.txt --tokens 50000"
    " --local-branch 2048 --global-branch 10 --chunk-tokens 1024 --context-tokens 1024"
)
WALK = ("learn", "cache_reuse_chunks", "fresh_base")  # settings that the command beside the table says
STREAM = ("perplexity", "perplexity of all tokens", "cache")

MEMORY = "Published for another model (LM-Infinite, at 32K on an A100): 7.53 times less memory than the original."
PASSKEY = (
    "Published for another model (LM-Infinite, Llama-2-chat, 6K to 16K), the 5 best of the middle recalled: 81.2 %, "
    "against 44.0 % where prompts were truncated."
)

NEEDLE = (
    "Published for another model (Llama-3-8B-Instruct-80K-QLoRA, its model card): a heatmap to past 80K, "
    "without a table."
)


@dataclass(frozen=True)
class Measurement:
    """Commands, one a line; BOOKS in them stands for the folder of books."""

    name: str
    title: str
    command: str
    text: str = ""
    published: str = ""
    metrics: tuple[str, ...] = ()  # the tables to show; empty means all but those that page.py leaves out everywhere
    hidden: tuple[str, ...] = ()  # settings that are left out of tables
    figure: bool = False
    records: str = ""  # a pattern of files in results/; default: evaluations/NAME.jsonl


MEASUREMENTS = [
    Measurement(
        "demo-length",
        "The small model by length",
        f"longpatch eval perplexity demo {ALL_BOOKS} --local-branch 256 --global-branch 4"
        " --baseline original,fresh:256 --length 8192 --chunk 1024",
        published=BY_LENGTH,
    ),
    Measurement(
        "demo-far",
        "The small model at 256 times its training length",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline original,fresh:256 --length 65536 --chunk 1024",
    ),
    Measurement(
        "smollm2-length",
        "SmolLM2-135M by length",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 2048"
        " --baseline original,fresh:2048 --length 24576 --chunk 1024",
        published=BY_LENGTH,
    ),
    Measurement(
        "smollm2-far",
        "SmolLM2-135M to 65,536 tokens",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 2048 --length 65536 --chunk 1024",
        text="The model as it is was not read this far: its cost grows with the square of the length.",
    ),
    Measurement(
        "smollm2-original",
        "SmolLM2-135M as it is, to 32,768 tokens",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --no-convert --length 32768 --chunk 1024 --save-every 4096",
        text="The same book as above, further than the first table; with --resume it goes on after a kill.",
    ),
    Measurement(
        "demo-stream",
        "Two million tokens in one stream",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --length 210001 --repeat 10 --bucket 210000 --chunk 1024",
        text="The same 210,000 tokens ten times over, in one stream: every line of the table is the same text.",
        metrics=STREAM,
    ),
    Measurement(
        "smollm2-stream",
        "Two million tokens in one stream, SmolLM2-135M",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 1024 --global-branch 4"
        " --length 210001 --repeat 10 --bucket 210000 --chunk 1024 --save-every 50000",
        text="About 0.7 PFLOP: hours on a CPU. State is kept every 50,000 tokens; --resume goes on from there. This "
        "run was stopped several times.",
        metrics=STREAM,
    ),
    Measurement(
        "demo-memory",
        "Memory, small model",
        "longpatch eval memory demo --text BOOKS/5274.txt --local-branch 256 --global-branch 4 --baseline original"
        " --lengths 1024,4096,16384 --new-tokens 16",
        text="Cache: keys and values held after the text. Peak: of the whole process, weights and libraries included.",
        published=MEMORY,
        metrics=("cache", "peak_memory"),
    ),
    Measurement(
        "smollm2-memory",
        "Memory, SmolLM2-135M",
        "longpatch eval memory smollm2 --text BOOKS/5274.txt --local-branch 2048 --baseline original"
        " --lengths 1024,4096,16384 --new-tokens 16",
        text="Prefill and decode are milliseconds a token, with one thread and nothing else running.",
        published=MEMORY,
        metrics=("cache", "peak_memory", "prefill", "decode"),
    ),
    Measurement(
        "demo-sinks",
        "NLL by number of sinks, small model",
        "longpatch eval perplexity demo BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline 256/0,256/1,256/10,256/64,256/128,256/255 --length 4096 --chunk 1024",
        published=BY_SINKS,
    ),
    Measurement(
        "smollm2-sinks",
        "NLL by number of sinks, SmolLM2-135M",
        "longpatch eval perplexity smollm2 BOOKS/5274.txt --local-branch 1024"
        " --baseline 1024/0,1024/1,1024/4,1024/100,1024/512,1024/1000 --length 8192 --chunk 1024",
        published=BY_SINKS,
    ),
    Measurement(
        "demo-passkey",
        "Passkey, small model",
        "longpatch eval passkey demo --text BOOKS/5274.txt --local-branch 256 --global-branch 4"
        " --baseline original,truncate:256 --lengths 128,256,512,1024 --depths 5 --trials 4",
        text="Nothing is recalled here, so what left the window cannot be found; the original may still find it some "
        "way past its training length, where its perplexity is lost already.",
        published=PASSKEY,
        metrics=("exact",),
        figure=True,
    ),
    Measurement(
        "smollm2-passkey",
        "Passkey, SmolLM2-135M",
        "longpatch eval passkey smollm2 --wording lm-infinite --local-branch 1024"
        " --recall top_k=5,queries=16,from_layer=8,to_layer=24 --baseline 1024/10,original,truncate:1024"
        " --lengths 2048,4096,8192 --depths 5 --trials 1",
        text="One key a cell; with more of them, and amid real text: [recall.md](recall.md).",
        published=PASSKEY,
        metrics=("exact",),
        figure=True,
    ),
    Measurement(
        "demo-needle",
        "Needle, small model",
        "longpatch eval needle demo BOOKS --local-branch 256 --global-branch 4 --baseline original"
        " --lengths 256,512,1024 --depths 5",
        text="It was not trained to answer questions: its marks are those of any English sentence.",
        published=NEEDLE,
        metrics=("rougeL", "match"),
        figure=True,
    ),
    Measurement(
        "smollm2-needle",
        "Needle, SmolLM2-135M",
        "longpatch eval needle smollm2 BOOKS --local-branch 512 --baseline original --lengths 512,1024 --depths 3",
        published=NEEDLE,
        metrics=("rougeL", "match"),
        figure=True,
    ),
    Measurement(
        "smollm2-needle-recall",
        "Needle, SmolLM2-135M with recall",
        "longpatch eval needle smollm2 BOOKS --local-branch 1024 --recall top_k=5,queries=16 --baseline 1024/10"
        " --lengths 2048,4096,8192 --depths 5 --new-tokens 40\n"
        "longpatch eval needle smollm2 BOOKS --local-branch 1024 --recall top_k=5,queries=16,from_layer=8,to_layer=24"
        " --lengths 2048,4096,8192 --depths 5 --new-tokens 40",
        text="Without recall, the needle in the last 1,024 tokens is found. See [recall.md](recall.md).",
        published=NEEDLE,
        metrics=("rougeL", "match"),
        figure=True,
        records="recall_needle.jsonl",
    ),
    Measurement(
        "demo-attention",
        "Attention by position, small model",
        "longpatch eval attention demo BOOKS/5274.txt BOOKS/50031.txt --local-branch 256 --global-branch 4"
        " --baseline original --length 2048",
        published="LM-Infinite finds the same of other models: far beyond the trained length entropy and logits grow.",
        metrics=("entropy", "largest_logit"),
        figure=True,
    ),
    Measurement(
        "temp-lora",
        "Temp-LoRA",
        f"longpatch eval temp-lora demo {ALL_BOOKS} --local-branch 256 --global-branch 4 --chunk-tokens 512"
        " --context-tokens 256 --rank 16 --alpha 16 --dropout 0 --learning-rate 1e-3 --epochs 1"
        " --out benchmarks/results/temp_lora_books.jsonl",
        text="Both read the same text in one pass; each token is scored before any update that saw it.",
        published="Published for another model (Temp-LoRA, Llama-2-7B on PG19): perplexity up to 13.2 % lower.",
        metrics=("perplexity",),
        hidden=WALK,
        records="temp_lora_books.jsonl",
    ),
    Measurement(
        "temp-lora-smollm2",
        "Temp-LoRA, SmolLM2-135M",
        f"{SMOLLM2_WALK} --rank 32 --dropout 0 --learning-rate 2e-3 --epochs 1 --no-context-grad"
        " --out benchmarks/results/temp_lora_smollm2.jsonl",
        text="The first 50,000 tokens of two books. [More](temp-lora.md).",
        metrics=("perplexity",),
        hidden=WALK,
        records="temp_lora_smollm2.jsonl",
    ),
    Measurement(
        "temp-lora-smollm2-paper",
        "Temp-LoRA, SmolLM2-135M, at the paper's setting",
        f"{SMOLLM2_WALK} --rank 64 --dropout 0.05 --learning-rate 5e-5 --epochs 2"
        " --out benchmarks/results/temp_lora_paper.jsonl",
        text="The same text, with the settings that Temp-LoRA's authors chose for models of billions of parameters.",
        metrics=("perplexity",),
        hidden=WALK,
        records="temp_lora_paper.jsonl",
    ),
    Measurement(
        "extension",
        "Context extension by training",
        "longpatch train examples/recipes/cpu-demo.yaml --set data.train=BOOKS\n"
        "python -m benchmarks.extension runs/cpu-demo BOOK ... --windows 1024 --stride 0.75 --out FILE\n"
        "python -m benchmarks.extension demo BOOK ... --windows 256 1024 --stride 0.5 --tokens 6000 --out FILE",
        text="A stride of 1 is fresh windows; tokens: the first of each text. [More](extending.md).",
        published="Published for other models (LongQLoRA, 8,192 tokens of PG19): Llama-2 above 1,000, LongQLoRA 7.96.",
        records="**/extension*.jsonl",
    ),
    Measurement(
        "demo-extended-distance",
        "Whether the extended small model uses far tokens",
        f"longpatch eval distance runs/cpu-demo {ALL_BOOKS} --no-convert --length 1024 --limit 15"
        " --distances 64 128 256 512",
        text="Cost of losing what lies beyond a distance, in nats a token; below zero, far context does harm.",
        metrics=("cost",),
    ),
]
