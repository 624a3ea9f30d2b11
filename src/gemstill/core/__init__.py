"""What every room needs: errors, atomic files, progress, the machine probe, configuration."""
