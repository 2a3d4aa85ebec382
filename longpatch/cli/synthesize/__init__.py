"""Make question data from long texts, as JSON lines that `longpatch train` reads."""

KIND = "GENERATOR"
COMMANDS = {
    "offline": "plant facts in real text at chosen distances: no model needed",
    "endpoint": "let a language model behind an OpenAI-compatible endpoint ask and answer",
}
EXAMPLES = """\
examples:
  longpatch synthesize offline demo BOOKS rows.jsonl --length 1024 --rows 2000
  longpatch synthesize endpoint BOOKS rows.jsonl --endpoint http://localhost:8000/v1 --name MODEL
"""
