"""Students and the discriminator: Hugging Face networks behind the few calls that training makes."""
