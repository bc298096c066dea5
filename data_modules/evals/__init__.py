"""One file a benchmark: prompt, decoding, extraction, version."""
