"""Prompts to conditioning: CLIP and T5, by transformers."""
