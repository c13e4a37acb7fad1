"""The train stage: from prepared examples and a base model to a trained PEFT adapter."""
