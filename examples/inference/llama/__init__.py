"""A small language model of the Llama family behind OpenAI's HTTP API, in numpy; with cupy the same code runs on a GPU."""
