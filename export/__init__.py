"""From a trained run to one ONNX graph and a Triton model repository. Needs the extra `train`."""
