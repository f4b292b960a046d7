"""Training and evaluation of R1-Omni; knows the model only through the public API of `humanomni`."""
