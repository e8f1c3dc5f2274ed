"""Ask a model file once through llama_cpp, as a short script of one's own would.

usage: llama_cpp_answer.py MODEL.gguf PROMPT MAX_TOKENS
"""

import sys
from typing import Any

from llama_cpp import Llama


def main() -> None:
    """Print the answer as it comes."""
    path, prompt, max_tokens = sys.argv[1:]
    model = Llama(path, verbose=False)
    messages: Any = [{"role": "user", "content": prompt}]
    parts: Any = model.create_chat_completion(messages, max_tokens=int(max_tokens), temperature=0, stream=True)
    for part in parts:
        print(part["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
