"""Models as graphs: torch.export and ONNX."""
