"""The TensorFlow port, for Keras."""
