"""Engines that serve real models over a pool. Each needs an extra that the base install has not.

transformers  decoders of Hugging Face Transformers (extra `transformers`)
"""
