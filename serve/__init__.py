"""Contract, encoders, gallery, retrieval. Never imports torch, train or export."""
