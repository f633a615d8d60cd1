"""From pictures to predictions: whole, in tiles, from several views."""
