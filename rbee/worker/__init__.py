"""The worker: one process, one engine, one model, spoken to in OpenAI's HTTP."""
