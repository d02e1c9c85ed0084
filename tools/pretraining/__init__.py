"""The parts of tools/pretrain_tiny.py: text, tokenizer, objectives, model and state."""
