"""Several processes train one network: each part is put around the model and the trainer from outside."""
