"""Thin hooks that connect a training loop to the control: Hugging Face and Forgather, Lightning, plain loops."""
