"""What every part uses: errors for the user, processes, output files."""
