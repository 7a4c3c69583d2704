"""What can be timed, by name; free of imports, so that a config is checked without loading torch's models."""

ODYSSEY, TRANSFORMERS, VLLM = "odyssey", "transformers", "vllm"
ENGINES = ("none", TRANSFORMERS, ODYSSEY, VLLM)
# Formats of odyssey.engine.formats and peers of odyssey.latency.peers.
METHODS = ("fp16", "w8a8", "w4a16-g128", "w4a8", "w4a8-g128")
PEERS = ("transformers-fp16", "transformers-compiled-fp16")
