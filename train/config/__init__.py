"""What a run is: typed sections, read from YAML and the command line."""
