"""SimCLR pretraining and its evaluation. Needs the extra `train` (torch, torchvision)."""
