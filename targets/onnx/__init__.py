"""ONNX for onnxruntime: every expert has a format of its own, or none; each layer keeps as many experts as it likes."""
