"""Small diffusion models of scikit-learn's handwritten digits, to try and to measure the pruner on."""
