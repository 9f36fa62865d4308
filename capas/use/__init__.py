"""Use a trained model: chat, merge, push, its card, the model that MLflow serves, labs."""
