"""Linear heads: how they are fitted, made honest and judged. What a finished one does is in serve/classify.py."""
