"""Output projectors: from hidden states of the LLM to the condition of a generator."""
