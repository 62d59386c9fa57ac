"""Classification of features: k-NN, linear, logistic, fine-tuning."""
