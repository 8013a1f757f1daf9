"""Many prompts from a file, each sampled several times, to lines of a file."""
