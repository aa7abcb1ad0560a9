"""The parts of `examples/pretrain_gpt.py`; nothing here is imported by the library."""
