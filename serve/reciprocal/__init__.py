"""The k-reciprocal graph of a gallery, and how a probe joins it. What is made of it is in serve/rerank.py."""
