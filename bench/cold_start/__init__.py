"""Time a whole `rbee infer` against a whole Python process that asks the same model through llama_cpp."""
