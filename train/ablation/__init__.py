"""What train.ablate trains and tabulates."""
